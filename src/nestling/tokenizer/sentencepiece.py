"""SentencePiece's `tokenizer.model` as the tokenizer.json that gives the same ids.

The file is a protobuf of which a few fields matter (sentencepiece_model.proto): pieces with score and kind, and how text is
normalised. SentencePiece merges the neighbours whose joint piece scores highest; `tokenizers` merges by a list of pairs,
so each piece becomes the pairs that make it, best score first.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestling.core.errors import UserError
from nestling.tokenizer.folder import added_token, definition_of

UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of pieces; llama.cpp counts them alike."""
SPACE = "▁"


@dataclass(frozen=True)
class Model:
    """What a model of SentencePiece's says, as Llama's does where nothing is given.

    >>> Model([("<unk>", 0.0, UNKNOWN), ("a", -1.0, NORMAL)], byte_fallback=False).definition()["model"]["vocab"]
    {'<unk>': 0, 'a': 1}
    """

    pieces: list[tuple[str, float, int]]
    """Spelling, score and kind of each id."""
    algorithm: int = BPE
    byte_fallback: bool = True
    unknown: int = 0
    charsmap: bytes = b""
    """How characters are replaced, compiled; Unicode's compatibility forms, mostly."""
    prefix: bool = True
    """Whether a space is put before a text."""
    trims: bool = False
    """Whether blanks at both ends of a text go, and runs of them become one."""

    def definition(self) -> dict[str, Any]:
        """The tokenizer.json that it stands for."""
        model = self._bpe() if self.algorithm == BPE else self._unigram()
        added = [added_token(number, text, kind != USER_DEFINED) for number, (text, _, kind) in enumerate(self.pieces)
                 if kind in (UNKNOWN, CONTROL, USER_DEFINED)]  # fmt: skip
        # `Prepend` is SentencePiece's rule, but `tokenizers` applies it after every added token too; `Metaspace` does not.
        cuts = self.prefix and any(kind == USER_DEFINED for _, _, kind in self.pieces)
        cut = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False} if cuts else None
        back = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
        back += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * self.prefix
        decoder = {"type": "Sequence", "decoders": back}
        normalizer = {"type": "Sequence", "normalizers": self._normalizers(prepend=self.prefix and not cuts)}
        return definition_of(model, added_tokens=added, normalizer=normalizer, pre_tokenizer=cut, decoder=decoder)

    def _unigram(self) -> dict[str, Any]:
        vocab = [[text, score] for text, score, _ in self.pieces]
        return {"type": "Unigram", "unk_id": self.unknown, "vocab": vocab, "byte_fallback": self.byte_fallback}

    def _bpe(self) -> dict[str, Any]:
        merged = {text: (score, number) for number, (text, score, kind) in enumerate(self.pieces) if kind == NORMAL}
        pairs = [
            (-score, merged[text[:cut]][1], merged[text[cut:]][1], [text[:cut], text[cut:]])
            for text, (score, _) in merged.items()
            for cut in range(1, len(text))
            if text[:cut] in merged and text[cut:] in merged
        ]
        nothing = dict.fromkeys(("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        rules = {"unk_token": self.pieces[self.unknown][0], "fuse_unk": True, "byte_fallback": self.byte_fallback}
        vocab = {text: number for number, (text, _, _) in enumerate(self.pieces)}
        merges = [pair for *_, pair in sorted(pairs)]
        return {"type": "BPE", **nothing, **rules, "ignore_merges": False, "vocab": vocab, "merges": merges}

    def _normalizers(self, prepend: bool) -> list[dict[str, Any]]:
        """What is done to a text before it is cut."""
        compiled = base64.b64encode(self.charsmap).decode()
        steps: list[dict[str, Any]] = [{"type": "Precompiled", "precompiled_charsmap": compiled}] * bool(compiled)
        if self.trims:
            steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
            steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
        steps += [{"type": "Prepend", "prepend": SPACE}] * prepend
        return [*steps, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]


def read_sentencepiece(path: Path) -> dict[str, Any]:
    """The tokenizer.json that a `tokenizer.model` stands for.

    Raises:
        UserError: the file can't be read, or is of a kind other than BPE and unigram.
    """
    try:
        file = list(_fields(path.read_bytes()))
        pieces = [_piece(value) for number, value in file if number == 1]
        trainer, rules = (dict(_fields(dict(file).get(part, b""))) for part in (2, 3))
    except OSError as error:
        raise UserError(f"can't be read: {error.strerror}", where=path) from None
    except (LookupError, ValueError, TypeError, struct.error):
        raise UserError("this is no SentencePiece model", where=path, fix="copy the file again") from None
    algorithm, is_suffix, unknown = trainer.get(3, UNIGRAM), trainer.get(24, 0), trainer.get(40, 0)
    if algorithm not in (UNIGRAM, BPE) or is_suffix or unknown >= len(pieces):
        raise UserError("this kind of SentencePiece model is not supported", where=path, fix="use BPE or unigram")
    charsmap, prefix, trims = rules.get(2, b""), rules.get(3, 1), rules.get(4, 1)
    return Model(pieces, algorithm, bool(trainer.get(35)), unknown, charsmap, bool(prefix), bool(trims)).definition()


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protobuf message: an int, 4 or 8 raw bytes, or the bytes of what is inside."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        if key & 7 == 0:
            value, place = _varint(data, place)
            yield key >> 3, value
            continue
        size, place = _varint(data, place) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], place)
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


def _piece(data: bytes) -> tuple[str, float, int]:
    found = dict(_fields(data))
    [score] = struct.unpack("<f", found.get(2, bytes(4)))
    return found[1].decode(), score, found.get(3, NORMAL)
