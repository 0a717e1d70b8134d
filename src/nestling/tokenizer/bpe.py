"""The tokenizer: one value that trains, loads, saves, encodes and decodes.

Its single source of truth is the content of Hugging Face's tokenizer.json, so what is saved is what was used.
Text can never become a control token: text and control tokens go through different code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from nestling.core.errors import UserError
from nestling.tokenizer import folder as hub_folder
from nestling.tokenizer.bytelevel import ByteLevel, Characters, byte_symbols, check_text
from nestling.tokenizer.patterns import Pattern, split_pattern
from nestling.tokenizer.special import END_OF_TEXT, SHOWN, TURN_END, TURN_START
from nestling.tokenizer.template import CHAT_TEMPLATE

_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>")  # ours and GPT-2's and Qwen's; Llama 3's; older families'


@dataclass(frozen=True)
class TokenPiece:
    """One token as a picture of a text shows it.

    >>> TokenPiece(id=257, text=" a", bytes=b" a", control=False).text
    ' a'
    """

    id: int
    text: str
    """Readable text; bytes that are not whole characters appear as \\xNN."""
    bytes: bytes
    control: bool


class Tokenizer:
    """Text to ids and back. Immutable: `with_special` gives a new one.

    Args:
        definition: the content of a tokenizer.json of the BPE family (byte-level, or characters as saved here).
        where: named in error messages.

    Raises:
        UserError: the definition is of another family.

    >>> tokenizer = Tokenizer.train(["a rose is a rose"], vocab_size=260)
    >>> tokenizer.decode(tokenizer.encode("a rose ☃"))
    'a rose ☃'
    """

    def __init__(self, definition: Mapping[str, Any], where: str | Path = "tokenizer.json") -> None:
        self.definition = hub_folder.check_definition(definition, where)
        self._codec = Characters(definition) if hub_folder.is_characters(definition) else ByteLevel(definition)
        self.special: dict[str, int] = {token["content"]: token["id"] for token in definition["added_tokens"]}
        self.vocab_size: int = max([*self._codec.token_bytes, *self.special.values()]) + 1
        self._control = {number: name for name, number in self.special.items()}
        self._bytes = [self._codec.token_bytes.get(number, b"") for number in range(self.vocab_size)]

    # ---- making one ----

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, *, pattern: Pattern = "gpt4", digits: int = 1) -> Tokenizer:
        """Learn byte-level BPE merges.

        Args:
            texts: training texts; read once.
            vocab_size: tokens in all: 256 bytes, END_OF_TEXT and vocab_size − 257 merges (fewer on a tiny text).
            pattern: "gpt4" or "gpt2", see `patterns.split_pattern`.
            digits: longest run of digits in one token (1 to 3); the default 1 lets tiny models copy numbers.

        Raises:
            UserError: a vocabulary below 256 + 1, or text with a lone surrogate.
        """
        if vocab_size < 257:
            raise UserError(
                "vocabulary is smaller than 256 bytes + 1 special token",
                where="tokenizer.vocab_size", value=vocab_size, fix="use at least 257",
            )  # fmt: skip
        core = tokenizers.Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(split_pattern(pattern, digits)), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        core.decoder = decoders.ByteLevel()
        alphabet = list(byte_symbols().values())
        trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
        core.train_from_iterator(_checked(texts), trainer)
        return cls(json.loads(core.to_str())).with_special([END_OF_TEXT])

    @classmethod
    def characters(cls, texts: Iterable[str], *, byte_fallback: bool = True) -> Tokenizer:
        """A character-level tokenizer: one token per character of `texts`, in code point order.

        Args:
            byte_fallback: write a character never seen as its UTF-8 bytes (256 more tokens), so that any text
                round-trips; without it such a character is a UserError.
        """
        seen: set[str] = set()
        for text in _checked(texts):
            seen.update(text)
        return cls(hub_folder.character_definition(sorted(seen), byte_fallback)).with_special([END_OF_TEXT])

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read tokenizer.json from a checkpoint folder (ours, or a local Hugging Face folder of the BPE family).

        Raises:
            UserError: no such file, or a tokenizer of another family.
        """
        return cls(hub_folder.read_definition(Path(folder)), where=folder)

    @classmethod
    def from_gpt2(cls, vocab_json: str | Path, merges_txt: str | Path) -> Tokenizer:
        """GPT-2's two files: `vocab.json` and `merges.txt`.

        >>> Tokenizer.from_gpt2("gpt2/vocab.json", "gpt2/merges.txt").encode("Write a")   # doctest: +SKIP
        [16594, 257]
        """
        return cls(hub_folder.gpt2_definition(Path(vocab_json), Path(merges_txt)), where=vocab_json)

    def with_special(self, names: Sequence[str]) -> Tokenizer:
        """The same tokenizer with control tokens appended after all present ids; names it already has are kept."""
        missing = [name for name in dict.fromkeys(names) if name not in self.special]
        added = [
            hub_folder.added_token(self.vocab_size + place, name, hidden=name not in SHOWN)
            for place, name in enumerate(missing)
        ]
        return Tokenizer({**self.definition, "added_tokens": [*self.definition["added_tokens"], *added]})

    def save(self, folder: str | Path, *, context: int | None = None) -> None:
        """Write tokenizer.json and tokenizer_config.json (with the chat template once chat tokens are present).

        Args:
            context: the model's context length in tokens, stored as `model_max_length`.
        """
        hub_folder.write(Path(folder), self.definition, self.special, self._end_name(), context)

    # ---- text to ids ----

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Words that spell a control token stay text.

        Raises:
            UserError: a lone surrogate, or a character that a character vocabulary lacks.
        """
        check_text(text)
        return self._codec.encode(text)

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of many texts as uint32 arrays: the way for bulk text, on all cores of this process."""
        for text in texts:
            check_text(text)
        return self._codec.encode_arrays(texts)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts as lists."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    # ---- ids to text ----

    def decode_bytes(self, ids: Iterable[int], *, control: bool = False) -> bytes:
        """The bytes that ids stand for. Control tokens are left out, or spelled when `control` is true."""
        if not control:
            return b"".join(self._bytes[number] for number in ids)
        return b"".join(self._control.get(number, "").encode() or self._bytes[number] for number in ids)

    def decode(self, ids: Iterable[int], *, control: bool = False) -> str:
        """The text that ids stand for; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids, control=control).decode("utf-8", errors="replace")

    def view(self, text: str | Sequence[int]) -> list[TokenPiece]:
        """Every token of a text (or of ids) with its id and what it stands for."""
        return [self._piece(number) for number in (self.encode(text) if isinstance(text, str) else text)]

    def _piece(self, number: int) -> TokenPiece:
        if number in self._control:
            return TokenPiece(number, self._control[number], b"", True)
        return TokenPiece(number, self._bytes[number].decode(errors="backslashreplace"), self._bytes[number], False)

    # ---- facts ----

    def id(self, name: str) -> int:
        """The id of a control token.

        Raises:
            UserError: this tokenizer has no such control token.
        """
        if name not in self.special:
            known = ", ".join(self.special) or "none"
            raise UserError(
                "the tokenizer lacks this control token", value=name, fix=f"it has {known}; chat tokens come with sft"
            )
        return self.special[name]

    @property
    def end_of_text(self) -> int:
        """The id that stands after each document (<|endoftext|>, or what the loaded family calls it)."""
        return self.id(self._end_name() or END_OF_TEXT)

    @property
    def chat_template(self) -> str | None:
        """The Jinja template that says how messages are written; None for a base model's tokenizer."""
        return CHAT_TEMPLATE if TURN_START in self.special and TURN_END in self.special else None

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end a reply or a document."""
        ends = {self.special[name] for name in (TURN_END,) if name in self.special}
        return frozenset(ends | ({self.end_of_text} if self._end_name() else set()))

    def _end_name(self) -> str | None:
        return next((name for name in _ENDS if name in self.special), None)

    @cached_property
    def byte_lengths(self) -> list[int]:
        """Bytes of text that each id stands for, [V]; 0 for control tokens."""
        return [len(piece) for piece in self._bytes]

    @property
    def is_fast(self) -> bool:
        """True when bulk text goes through tiktoken (its ids proven equal for this vocabulary)."""
        return self._codec.is_exactly_fast

    @cached_property
    def hash(self) -> str:
        """Identity of the whole tokenizer, control tokens included."""
        return _digest(self.definition)

    @cached_property
    def text_hash(self) -> str:
        """Identity of what plain text becomes: unchanged when control tokens are appended, so shards stay valid."""
        return _digest({key: self.definition.get(key) for key in ("model", "normalizer", "pre_tokenizer")})


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def _checked(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        check_text(text)
        yield text
