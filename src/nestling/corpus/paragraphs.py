"""Long texts cut into documents where a reader would pause."""

from __future__ import annotations

from collections.abc import Iterator

# From the best place to cut to the worst; the last resort is the middle of a word.
_PAUSES = ("\n\n", "\n", "。", ". ", " ")


def cut_paragraphs(text: str, longest: int) -> Iterator[str]:
    """Pieces of at most `longest` characters, cut after the last paragraph that fits, else line, sentence, word.

    A piece is cut only in its second half, so pieces stay of a size. Blank lines around pieces are dropped, nothing
    else. With `longest` 0 the text stays whole.

    >>> list(cut_paragraphs("one two\\n\\nthree four", 12))
    ['one two', 'three four']
    """
    start = 0
    while longest and len(text) - start > longest:
        end = _pause(text, start, start + longest)
        piece = text[start:end].strip("\n")
        if piece:
            yield piece
        start = end
    rest = text[start:].strip("\n") if longest else text
    if rest:
        yield rest


def _pause(text: str, start: int, end: int) -> int:
    """The best place to cut between the middle and the end of a piece."""
    for mark in _PAUSES:
        found = text.rfind(mark, start + (end - start) // 2, end)
        if found >= 0:
            return found + len(mark)
    return end
