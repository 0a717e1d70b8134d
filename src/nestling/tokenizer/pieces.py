"""SentencePiece's way as tokenizer.json says it: pieces with "▁" for a space, BPE or Unigram, bytes where nothing fits."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from nestling.core.errors import UserError
from nestling.tokenizer.bytelevel import library
from nestling.tokenizer.folder import numbered, steps_of


class Pieces:
    """The codec of a tokenizer.json whose decoder turns pieces into text by replacing "▁".

    Args:
        definition: tokenizer.json as a dict.
        control: tokens that no text becomes; other added tokens are text.

    Raises:
        UserError: a decoder of another kind, named as `where`.
    """

    is_exactly_fast = False

    def __init__(self, definition: Mapping[str, Any], control: Collection[str], where: str | Path) -> None:
        model = definition["model"]
        self._bytes = _byte_pieces(model)
        kept = [token for token in definition["added_tokens"] if token["content"] not in control]
        closed = {*control, *self._bytes}
        plain = {**definition, "model": _closed(model, closed), "added_tokens": kept, "post_processor": None}
        self._plain = library(plain, where)
        inner = _without_prefix(definition)
        same = inner == steps_of(definition.get("pre_tokenizer"), "pretokenizers")
        cut = {"type": "Sequence", "pretokenizers": inner}
        self._inner = self._plain if same else library(plain | {"pre_tokenizer": cut}, where)
        self._unknown = model.get("unk_id") if model["type"] == "Unigram" and self._bytes else None
        replaced, self.strips_first = _decoder(definition, where)
        self.token_bytes = {number: _spelled(piece, replaced) for piece, number in numbered(model).items()}
        self.token_bytes |= {number: bytes([byte]) for byte, number in enumerate(self._bytes.values())}
        self.token_bytes |= {token["id"]: token["content"].encode() for token in kept}
        self.token_bytes |= dict.fromkeys((numbered(model)[name] for name in control if name in numbered(model)), b"")

    def encode(self, text: str) -> list[int]:
        """Ids of a text from its beginning: where the model says so, a space is put before it."""
        return self._ids(self._plain.encode(text, add_special_tokens=False))

    def encode_within(self, text: str) -> list[int]:
        """Ids of a text that goes on after a control token."""
        return self._ids(self._inner.encode(text, add_special_tokens=False))

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of many texts as uint32 arrays."""
        found = self._plain.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(self._ids(encoding), dtype=np.uint32) for encoding in found]

    def spans(self, text: str, within: bool) -> list[tuple[int, int]]:
        """Which characters each id of `encode` (or `encode_within`) stands for, as (start, end)."""
        found = (self._inner if within else self._plain).encode(text, add_special_tokens=False)
        sizes = [len(ids) for ids in self._parts(found)]
        return [span for span, size in zip(found.offsets, sizes, strict=True) for _ in range(size)]

    def _ids(self, found: tokenizers.Encoding) -> list[int]:
        if self._unknown is None or self._unknown not in found.ids:
            return found.ids
        return [number for part in self._parts(found) for number in part]

    def _parts(self, found: tokenizers.Encoding) -> list[list[int]]:
        """The ids that each token of the library stands for: an unknown one is written in bytes."""
        ids = list(self._bytes.values())
        return [
            [number] if number != self._unknown else [ids[byte] for byte in token.encode()]
            for number, token in zip(found.ids, found.tokens, strict=True)
        ]


def _byte_pieces(model: Mapping[str, Any]) -> dict[str, int]:
    """<0x00> to <0xFF> and their ids, in order; empty where characters don't fall back to bytes."""
    numbers = numbered(model)
    found = {name: numbers[name] for byte in range(256) if (name := f"<0x{byte:02X}>") in numbers}
    return found if model.get("byte_fallback") and len(found) == 256 else {}


def _closed(model: Mapping[str, Any], closed: Collection[str]) -> dict[str, Any]:
    """The model without any way from text to some of its pieces: no merge makes them, no text spells them.

    Unigram finds every piece of its list in a text, those for bytes too, so they get a name with a space, which no text has
    that reaches the model; what is unknown then becomes bytes in `Pieces`.
    """
    if model["type"] == "BPE":
        pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
        return {**model, "merges": [pair for pair in pairs if "".join(pair) not in closed]}
    vocab = [[f" {n}" if piece in closed else piece, score] for n, (piece, score) in enumerate(model["vocab"])]
    return {**model, "vocab": vocab, "byte_fallback": False}


def _without_prefix(definition: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The pre-tokenizer's steps as they work inside a text: the scheme "first" puts a space only before the whole one."""
    steps = steps_of(definition.get("pre_tokenizer"), "pretokenizers")
    return [{**step, "prepend_scheme": "never"} if step.get("prepend_scheme") == "first" else step for step in steps]


def _decoder(definition: Mapping[str, Any], where: str | Path) -> tuple[list[tuple[str, str]], bool]:
    """(what is replaced in a piece, whether the first space of a text is dropped)."""
    replaced: list[tuple[str, str]] = []
    strips = False
    steps = steps_of(definition.get("decoder"), "decoders")
    for step in steps:
        if step["type"] == "Metaspace":
            replaced.append((step["replacement"], " "))
            strips = step.get("prepend_scheme", "always") != "never"
        elif step["type"] == "Replace" and "String" in step["pattern"]:
            replaced.append((step["pattern"]["String"], step["content"]))
        elif step["type"] == "Strip" and (step["content"], step["start"], step["stop"]) == (" ", 1, 0):
            strips = True
        elif step["type"] not in ("ByteFallback", "Fuse"):
            raise UserError("ids of this tokenizer can't be read back", where=where, value=step["type"])
    if not steps:
        raise UserError("this tokenizer doesn't say how ids are read back: it has no decoder", where=where)
    return replaced, strips


def _spelled(piece: str, replaced: Sequence[tuple[str, str]]) -> bytes:
    for old, new in replaced:
        piece = piece.replace(old, new)
    return piece.encode()
