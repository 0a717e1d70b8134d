"""SentencePiece's `tokenizer.model` as the tokenizer.json that gives the same ids.

The file is a protobuf of which a few fields matter (sentencepiece_model.proto): pieces with score and kind, and how text is
normalised. SentencePiece merges the neighbours whose joint piece scores highest; `tokenizers` merges by a list of pairs,
so each piece becomes the pairs that make it, best score first.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nestling.core.errors import UserError
from nestling.tokenizer.folder import added_token, definition_of

UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of pieces; llama.cpp counts them alike."""
SPACE = "▁"
_TRAINER, _NORMALIZER = 2, 3
_MODEL_TYPE, _SUFFIX, _BYTE_FALLBACK, _UNKNOWN_ID = 3, 24, 35, 40
_CHARSMAP, _PREFIX, _TRIM = 2, 3, 4

Piece = tuple[str, float, int]
"""Spelling, score, kind."""


def read_sentencepiece(path: Path) -> dict[str, Any]:
    """The tokenizer.json that a `tokenizer.model` stands for.

    Raises:
        UserError: the file can't be read, or is of a kind other than BPE and unigram.
    """
    try:
        file = list(_fields(path.read_bytes()))
        pieces = [_piece(value) for number, value in file if number == 1]
        trainer, normalizer = (dict(_fields(dict(file).get(part, b""))) for part in (_TRAINER, _NORMALIZER))
    except OSError as error:
        raise UserError(f"can't be read: {error.strerror}", where=path) from None
    except (LookupError, ValueError, TypeError, struct.error):
        raise UserError("this is no SentencePiece model", where=path, fix="copy the file again") from None
    kind = trainer.get(_MODEL_TYPE, UNIGRAM)
    if kind not in (UNIGRAM, BPE) or trainer.get(_SUFFIX) or not pieces:
        raise UserError("this kind of SentencePiece model is not supported", where=path, fix="use BPE or unigram")
    model = _unigram(pieces, trainer) if kind == UNIGRAM else _bpe(pieces, trainer)
    added = [added_token(n, text, kind != USER_DEFINED) for n, (text, _, kind) in enumerate(pieces)
             if kind in (UNKNOWN, CONTROL, USER_DEFINED)]  # fmt: skip
    prefix, defined = bool(normalizer.get(_PREFIX, 1)), any(kind == USER_DEFINED for _, _, kind in pieces)
    # `Prepend` is SentencePiece's rule, but `tokenizers` applies it after every added token too; `Metaspace` does not.
    steps = _normalizers(normalizer, prepend=prefix and not defined)
    cut = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    decoder = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    decoder += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    parts = {"normalizer": {"type": "Sequence", "normalizers": steps}, "decoder": {"type": "Sequence", "decoders": decoder}}
    return definition_of(model, added_tokens=added, pre_tokenizer=cut if prefix and defined else None, **parts)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protobuf message: an int, 4 or 8 raw bytes, or the bytes of what is inside."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        kind = key & 7
        if kind == 0:
            value, place = _varint(data, place)
            yield key >> 3, value
            continue
        size, place = _varint(data, place) if kind == 2 else ({1: 8, 5: 4}[kind], place)
        if place + size > len(data):
            raise ValueError("cut off")
        yield key >> 3, data[place : place + size]
        place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """An integer of 7 bits per byte, lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place


def _piece(data: bytes) -> Piece:
    found = dict(_fields(data))
    [score] = struct.unpack("<f", found.get(2, bytes(4)))
    return found[1].decode(), score, found.get(3, NORMAL)


def _unigram(pieces: Sequence[Piece], trainer: Mapping[int, Any]) -> dict[str, Any]:
    vocab = [[text, score] for text, score, _ in pieces]
    fallback = bool(trainer.get(_BYTE_FALLBACK))
    return {"type": "Unigram", "unk_id": trainer.get(_UNKNOWN_ID, 0), "vocab": vocab, "byte_fallback": fallback}


def _bpe(pieces: Sequence[Piece], trainer: Mapping[int, Any]) -> dict[str, Any]:
    merged = {text: (score, n) for n, (text, score, kind) in enumerate(pieces) if kind == NORMAL}
    pairs = [
        (-score, merged[text[:cut]][1], merged[text[cut:]][1], [text[:cut], text[cut:]])
        for text, (score, _) in merged.items()
        for cut in range(1, len(text))
        if text[:cut] in merged and text[cut:] in merged
    ]
    return {
        "type": "BPE",
        **dict.fromkeys(("dropout", "continuing_subword_prefix", "end_of_word_suffix")),
        "unk_token": pieces[trainer.get(_UNKNOWN_ID, 0)][0],
        "fuse_unk": True,
        "byte_fallback": bool(trainer.get(_BYTE_FALLBACK)),
        "ignore_merges": False,
        "vocab": {text: number for number, (text, _, _) in enumerate(pieces)},
        "merges": [pair for *_, pair in sorted(pairs)],
    }


def _normalizers(found: Mapping[int, Any], prepend: bool) -> list[dict[str, Any]]:
    """What is done to a text before it is cut."""
    steps: list[dict[str, Any]] = []
    if found.get(_CHARSMAP):
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(found[_CHARSMAP]).decode()})
    if found.get(_TRIM, 1):
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if prepend:
        steps.append({"type": "Prepend", "prepend": SPACE})
    return [*steps, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
