"""Ids to text, one at a time, for streaming: what is shown never has to be taken back."""

from __future__ import annotations

import codecs

from nestling.tokenizer.bpe import Tokenizer


class StreamDecoder:
    """Collects bytes until they are whole characters. Control tokens give no text.

    Args:
        begins: as for `Tokenizer.decode`.

    >>> tokenizer = Tokenizer.train(["a"], vocab_size=257)
    >>> stream = StreamDecoder(tokenizer)
    >>> [stream.push(id) for id in tokenizer.encode("é!")]
    ['', 'é', '!']
    """

    def __init__(self, tokenizer: Tokenizer, begins: bool = True) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = begins and tokenizer.strips_first

    def push(self, *ids: int) -> str:
        """The text that became whole with these ids; often "" inside a character of several tokens."""
        text = self._decoder.decode(self._tokenizer.decode_bytes(ids))
        if self._at_start and text:
            self._at_start, text = False, text.removeprefix(" ")
        return text

    def ends_whole(self, id: int) -> bool:
        """Whether nothing is left over behind this id, whatever came before: its last byte is a character."""
        return b"" < self._tokenizer.decode_bytes((id,))[-1:] < b"\x80"

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character cut off in the middle, else ""."""
        left = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return left
