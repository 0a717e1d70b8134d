"""The two ways text becomes ids: byte-level BPE and single characters. Neither knows control tokens.

Byte-level BPE is encoded by tiktoken where its ids provably equal those of the `tokenizers` model that is saved
(4 to 5 times faster), and by `tokenizers` otherwise.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import tokenizers

from nestling.core.errors import UserError
from nestling.tokenizer import patterns
from nestling.tokenizer.folder import steps_of

# tiktoken's regular expressions recurse once per blank of a run and end the process' stack near 100,000 of them.
_LONG_BLANK = re.compile(r"\s{5000}")
_PARALLEL_FROM = 200_000  # characters; below this, threads cost more than they give


def byte_symbols() -> dict[int, str]:
    """GPT-2's printable stand-in for each of the 256 bytes.

    >>> byte_symbols()[32]
    'Ġ'
    """
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in set(kept)]
    return {byte: chr(byte) for byte in kept} | {byte: chr(256 + n) for n, byte in enumerate(moved)}


def check_text(text: str) -> None:
    """Refuse text that UTF-8 can't hold.

    Raises:
        UserError: a lone surrogate; names its position.
    """
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise UserError(
            f"lone surrogate {code} at character {error.start} is not text", fix="decode the source as UTF-8"
        ) from None


def library(definition: Mapping[str, Any], where: str | Path) -> tokenizers.Tokenizer:
    """The tokenizer of the `tokenizers` library that a tokenizer.json describes.

    Raises:
        UserError: the library can't read it.
    """
    try:
        return tokenizers.Tokenizer.from_buffer(json.dumps(definition).encode())
    except ValueError as error:
        raise UserError(f"the tokenizers library can't read it: {error}", where=where) from None


class ByteLevel:
    """Byte-level BPE from the parts of a tokenizer.json.

    Args:
        definition: tokenizer.json as a dict.
        control: tokens that no text becomes; other added tokens are text.

    Raises:
        UserError: the `tokenizers` library can't read it; names it as `where`.
    """

    strips_first = False

    def __init__(self, definition: Mapping[str, Any], control: Collection[str], where: str | Path) -> None:
        kept = [token for token in definition["added_tokens"] if token["content"] not in control]
        named = {token["content"] for token in definition["added_tokens"]}
        model = dict(definition["model"])
        model["vocab"] = {token: number for token, number in model["vocab"].items() if token not in named}
        if named & definition["model"]["vocab"].keys():  # no merge may make one of them
            pairs = (pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"])
            model["merges"] = [pair for pair in pairs if not named & {*pair, "".join(pair)}]
        plain = dict(definition) | {"model": model, "added_tokens": kept, "post_processor": None}
        self._plain = library(plain, where)
        symbols = {symbol: byte for byte, symbol in byte_symbols().items()}
        self.token_bytes: dict[int, bytes] = {
            number: bytes(symbols[symbol] for symbol in token) for token, number in model["vocab"].items()
        }
        self._fast: Any = None if kept else self._tiktoken(definition, model)
        self.token_bytes |= {token["id"]: token["content"].encode() for token in kept}

    def encode(self, text: str) -> list[int]:
        """Ids of one text."""
        if self._is_fast(text):
            return self._fast.encode_ordinary(self._normal(text))
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_within(self, text: str) -> list[int]:
        """Ids of a text that goes on after a control token: as anywhere."""
        return self.encode(text)

    def spans(self, text: str, within: bool) -> list[tuple[int, int]]:
        """Which characters each id of `encode` stands for, as (start, end)."""
        return self._plain.encode(text, add_special_tokens=False).offsets

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of many texts as uint32 arrays, on all cores that this process may use."""
        if sum(map(len, texts)) < _PARALLEL_FROM:
            return [self._array(text) for text in texts]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2) as pool:
            return list(pool.map(self._array, texts))

    def _array(self, text: str) -> np.ndarray:
        if self._is_fast(text):
            return self._fast.encode_to_numpy(self._normal(text), disallowed_special=()).astype(np.uint32, copy=False)
        return np.array(self._plain.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    @property
    def is_exactly_fast(self) -> bool:
        """True when tiktoken's ids are proven equal for this vocabulary."""
        return self._fast is not None

    def _is_fast(self, text: str) -> bool:
        return self._fast is not None and (len(text) < 5000 or _LONG_BLANK.search(text) is None)

    def _normal(self, text: str) -> str:
        return text if self._plain.normalizer is None else self._plain.normalizer.normalize_str(text)

    def _tiktoken(self, definition: Mapping[str, Any], model: Mapping[str, Any]) -> Any:
        """tiktoken's encoder on the same merges, or None where its ids could differ.

        tiktoken merges any two neighbours whose bytes form a token, lowest id first; the saved model merges listed
        pairs, lowest merge first. Both agree on every text when (1) merges and their ids are in the same order and
        (2) every token, encoded alone, gives itself: a span whose ends no merge crossed goes through the same states
        in any context as it does alone, so its last two parts are the listed pair.
        """
        pattern = split_regex(definition)
        merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
        ids = [model["vocab"].get("".join(pair), -1) for pair in merges]
        bare = len(model["vocab"]) - len(ids)
        if pattern is None or bare != 256 or any(a >= b for a, b in itertools.pairwise(ids)):
            return None
        strict = dict(definition) | {"model": dict(model) | {"ignore_merges": False}, "added_tokens": []}
        bpe = tokenizers.Tokenizer.from_str(json.dumps(strict | {"post_processor": None})).model
        if any([piece.id for piece in bpe.tokenize("".join(pair))] != [n] for pair, n in zip(merges, ids, strict=True)):
            return None
        ranks = {piece: number for number, piece in self.token_bytes.items()}
        return tiktoken.Encoding(name="nestling", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def split_regex(definition: Mapping[str, Any]) -> str | None:
    """The one regular expression by which a tokenizer.json cuts text, or None when it cuts in another way."""
    steps = steps_of(definition.get("pre_tokenizer"), "pretokenizers")
    if any(step.get("add_prefix_space") for step in steps):
        return None
    if len(steps) == 1 and steps[0]["type"] == "ByteLevel" and steps[0].get("use_regex", True):
        return patterns.GPT2
    plain = len(steps) == 2 and steps[0]["type"] == "Split" and steps[1]["type"] == "ByteLevel"
    if not plain or steps[1].get("use_regex", True):
        return None
    split = steps[0]
    whole = split["behavior"] == "Isolated" and not split["invert"]
    return split["pattern"].get("Regex") if whole else None


class Characters:
    """One id per character of the training text, found in a table.

    Args:
        definition: tokenizer.json as a dict, of the shape that `bpe.character_definition` gives.
    """

    def __init__(self, definition: Mapping[str, Any]) -> None:
        model = definition["model"]
        control = {token["content"] for token in definition["added_tokens"]}
        vocabulary = {token: number for token, number in model["vocab"].items() if token not in control}
        self._fallback = [vocabulary.pop(f"<0x{byte:02X}>") for byte in range(256)] if model["byte_fallback"] else []
        self.token_bytes = {number: token.encode() for token, number in vocabulary.items()}
        self.token_bytes |= {number: bytes([byte]) for byte, number in enumerate(self._fallback)}
        self._table = np.full(max(map(ord, vocabulary), default=0) + 2, -1, dtype=np.int64)
        for character, number in vocabulary.items():
            self._table[ord(character)] = number

    is_exactly_fast = False
    strips_first = False

    def encode(self, text: str) -> list[int]:
        """Ids of one text.

        Raises:
            UserError: a character that the vocabulary lacks, when there is no byte fallback.
        """
        return self._array(text).tolist()

    def encode_within(self, text: str) -> list[int]:
        """Ids of a text that goes on after a control token: as anywhere."""
        return self.encode(text)

    def spans(self, text: str, within: bool) -> list[tuple[int, int]]:
        """Which characters each id of `encode` stands for, as (start, end)."""
        sizes = [len(self.encode(character)) for character in text]
        return [(place, place + 1) for place, size in enumerate(sizes) for _ in range(size)]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of many texts as uint32 arrays."""
        return [self._array(text) for text in texts]

    def _array(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        ids = self._table[np.minimum(codes, len(self._table) - 1)]
        unknown = np.flatnonzero(ids < 0)
        if unknown.size == 0:
            return ids.astype(np.uint32)
        if not self._fallback:
            raise UserError(
                f"character {int(unknown[0])} is not in the character vocabulary",
                value=text[unknown[0]],
                fix="train the tokenizer on text that has it, or with byte_fallback",
            )
        pieces = np.split(ids, np.stack([unknown, unknown + 1], axis=1).ravel())
        for place, position in enumerate(unknown):
            pieces[2 * place + 1] = np.array([self._fallback[byte] for byte in text[position].encode()])
        return np.concatenate(pieces).astype(np.uint32)
