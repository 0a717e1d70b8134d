"""Opening whatever the user points at: text, JSON lines, Parquet, compressed or not, one file or a folder of them."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import zstandard

from nestling.core.errors import UserError
from nestling.core.runtime import data_root
from nestling.core.storage import zstd_blocks

ROWS = (".jsonl", ".ndjson")
TABLES = (".parquet",)
TEXTS = (".txt", ".md", ".text")
PACKED = (".gz", ".zst")
DATA = "$NESTLING_DATA"


def kind_of(path: Path) -> str:
    """The ending that says what a file holds, without compression; "" for an ending that is not known.

    >>> kind_of(Path("a/b.jsonl.gz"))
    '.jsonl'
    """
    name = path.with_suffix("") if path.suffix in PACKED else path
    return name.suffix.lower() if name.suffix.lower() in ROWS + TABLES + TEXTS else ""


def list_files(paths: tuple[str, ...]) -> list[Path]:
    """The files that paths stand for; of a folder, those of a known kind below it, sorted. Hidden files don't count.

    A path that begins with $NESTLING_DATA lies in the folder of optional real data (`core.runtime.data_root`).

    Raises:
        UserError: a path that does not exist, or a folder with nothing readable in it.
    """
    found: list[Path] = []
    for path in map(_expanded, paths):
        if path.is_dir():
            inside = [file for file in sorted(path.rglob("*")) if file.is_file() and not _hidden(file, path)]
            known = [file for file in inside if kind_of(file)]
            if not known:
                endings = ", ".join(TEXTS + ROWS + TABLES)
                raise UserError("the folder holds no text", where=path, fix=f"give files that end in {endings}")
            found += known
        elif path.is_file():
            found.append(path)
        else:
            fix = "set NESTLING_DATA to the folder that holds it, or pass --text" if DATA in paths[0] else None
            raise UserError("no such file or folder", where=path, fix=fix)
    return found


def _expanded(path: str) -> Path:
    return Path(path.replace(DATA, str(data_root()), 1))


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def read_text(path: Path) -> str:
    """A whole text file, decompressed; line ends become "\\n".

    Raises:
        UserError: empty, binary, not UTF-8 (names the line), or a damaged archive.
    """
    data = _bytes(path)
    if not data.strip():
        raise UserError("the file is empty", where=path, fix="give a file with text in it")
    if b"\0" in data[:65536]:
        raise UserError("this looks like a binary file, not text", where=path, fix="give UTF-8 text")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(
            f"not UTF-8 text in line {line}: byte 0x{data[error.start]:02x}",
            where=path, fix="convert it with iconv -t UTF-8",
        ) from None  # fmt: skip


def _bytes(path: Path) -> bytes:
    try:
        if path.suffix == ".gz":
            return gzip.decompress(path.read_bytes())
        if path.suffix == ".zst":
            return b"".join(zstd_blocks(path))
        return path.read_bytes()
    except OSError as error:  # gzip's BadGzipFile is one of these, without a strerror
        raise UserError(f"can't be read: {error.strerror or error}", where=path) from None
    except (EOFError, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"archive is cut off or damaged: {error}", where=path, fix="fetch the file again") from None


def read_table(path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a Parquet file.

    Raises:
        UserError: pyarrow is not installed, or the file is damaged.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError("Parquet files need an extra", where=path, fix="pip install 'nestling[parquet]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"not a readable Parquet file: {reason}", where=path, fix="fetch the file again") from None
