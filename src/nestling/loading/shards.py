"""Token ids on disk: flat little-endian files with an index beside them, read as memory maps.

The stream is  e d₁ e d₂ e … dₙ e  with e the end-of-text token: each document is introduced and followed by one, so its
first token is learnt too, and a prompt that begins a new document begins with e.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nestling.core.errors import UserError
from nestling.core.storage import atomic_folder, read_json, write_json
from nestling.tokenizer.bpe import Tokenizer

VERSION = 1
_CHUNK = 4_000_000  # characters encoded at a time: enough for threads, little memory


def encode_documents(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The ids of each text, encoded in large chunks on all cores."""
    waiting: list[str] = []
    size = 0
    for text in texts:
        waiting.append(text)
        size += len(text)
        if size >= _CHUNK:
            yield from tokenizer.encode_arrays(waiting)
            waiting, size = [], 0
    yield from tokenizer.encode_arrays(waiting)


def write_shards(
    folder: str | Path, token_arrays: Iterable[np.ndarray], tokenizer: Tokenizer, *, shard_tokens: int = 2**28
) -> dict[str, Any]:
    """Write one document per array, atomically.

    Args:
        token_arrays: ids of each document, without end-of-text tokens: they are placed here.
        shard_tokens: a new file begins once one holds at least so many tokens.

    Returns:
        the index: version, tokenizer (its text_hash), end_of_text, dtype, files, offsets, documents, tokens, bytes.

    Raises:
        UserError: no document at all, or the disk is full.
    """
    folder = Path(folder)
    with atomic_folder(folder) as temporary:
        index = _write(temporary, token_arrays, tokenizer, shard_tokens)
        if not index["documents"]:
            raise UserError("there is no document to write", where=folder, fix="look at the corpus' sources and split")
        write_json(temporary / "index.json", index)
    return index


def _write(folder: Path, arrays: Iterable[np.ndarray], tokenizer: Tokenizer, shard_tokens: int) -> dict[str, Any]:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    lengths = np.asarray(tokenizer.byte_lengths, dtype=np.int64)
    end = np.array([tokenizer.end_of_text], dtype=dtype)
    files: list[dict[str, Any]] = []
    starts = [0]
    size = 0
    file = None
    for ids in arrays:
        if file is None or files[-1]["tokens"] >= shard_tokens:
            file = _next_file(folder, files, file)
            files[-1]["tokens"] += _append(file, end) if len(files) == 1 else 0
        files[-1]["tokens"] += _append(file, ids.astype(dtype)) + _append(file, end)
        size += int(lengths[ids].sum())
        starts.append(starts[-1] + len(ids) + 1)
    if file is not None:
        file.close()
    np.asarray(starts, dtype="<u8").tofile(folder / "documents.u64")
    return {
        "version": VERSION,
        "tokenizer": tokenizer.text_hash,
        "end_of_text": tokenizer.end_of_text,
        "dtype": dtype.name,
        "files": files,
        "offsets": "documents.u64",
        "documents": len(starts) - 1,
        "tokens": sum(part["tokens"] for part in files),
        "bytes": size,
    }


def _next_file(folder: Path, files: list[dict[str, Any]], file: Any) -> Any:
    if file is not None:
        file.close()
    files.append({"name": f"{len(files):05d}.bin", "tokens": 0})
    return (folder / files[-1]["name"]).open("wb")


def _append(file: Any, ids: np.ndarray) -> int:
    file.write(ids.tobytes())
    return len(ids)


class Shards:
    """A folder written by `write_shards`, memory-mapped.

    >>> shards = Shards.open("runs/demo/tokens/train")   # doctest: +SKIP
    >>> shards.tokens, shards.documents, shards.bytes    # doctest: +SKIP
    (3120455, 20000, 10485760)
    """

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        self.folder, self.index = folder, index
        self.tokens: int = index["tokens"]
        self.documents: int = index["documents"]
        self.bytes: int = index["bytes"]
        self.end_of_text: int = index["end_of_text"]
        self.offsets = np.fromfile(folder / index["offsets"], dtype="<u8").astype(np.int64)
        """[documents + 1] where the end-of-text token before each document stands; the last one ends the stream."""
        parts = [self._map(folder / part["name"], part["tokens"]) for part in index["files"]]
        self._parts, self._ends = parts, np.cumsum([len(part) for part in parts])

    @classmethod
    def open(cls, folder: str | Path, tokenizer: Tokenizer | None = None) -> Shards:
        """Open a folder of shards; with a tokenizer, make sure it is the one that wrote them.

        Raises:
            UserError: no index, another format version, a file cut off, or another tokenizer.
        """
        folder = Path(folder)
        if not (folder / "index.json").is_file():
            raise UserError("no index.json here", where=folder, fix="run the tokenize stage first")
        index = read_json(folder / "index.json")
        if index.get("version") != VERSION:
            raise UserError("another shard format", where=folder, value=index.get("version"), fix="tokenize again")
        if tokenizer is not None and index["tokenizer"] != tokenizer.text_hash:
            raise UserError(
                "these tokens were written with another tokenizer", where=folder,
                fix="tokenize again, or give the tokenizer that wrote them",
            )  # fmt: skip
        return cls(folder, index)

    def _map(self, path: Path, tokens: int) -> np.ndarray:
        dtype = np.dtype(self.index["dtype"]).newbyteorder("<")
        if not path.is_file() or path.stat().st_size != tokens * dtype.itemsize:
            raise UserError("token file is missing or cut off", where=path, fix="tokenize again")
        return np.memmap(path, dtype=dtype, mode="r")

    def __len__(self) -> int:
        return self.tokens

    def __getitem__(self, span: slice) -> np.ndarray:
        """Tokens [start, stop) of the whole stream, across files."""
        start, stop, step = span.indices(self.tokens)
        assert step == 1, "a stream is read in order"
        first = int(np.searchsorted(self._ends, start, side="right"))
        last = int(np.searchsorted(self._ends, stop, side="left"))
        found = []
        for part, end in zip(self._parts[first : last + 1], self._ends[first : last + 1], strict=True):
            begin = int(end) - len(part)
            found.append(part[max(0, start - begin) : max(0, stop - begin)])
        return found[0] if len(found) == 1 else np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    def document(self, number: int) -> np.ndarray:
        """The ids of one document, without end-of-text tokens."""
        return self[int(self.offsets[number]) + 1 : int(self.offsets[number + 1])]
