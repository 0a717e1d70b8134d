"""Files: atomic writes, rows with bad-row policy, content hashes, folder locks. An artifact is whole or absent."""

from __future__ import annotations

import errno
import fcntl
import gzip
import hashlib
import io
import json
import math
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO, TypeVar

import zstandard
from safetensors import SafetensorError

from nestling.core.errors import UserError

T = TypeVar("T")
BadRows = Literal["stop", "skip"]
_TEMPORARY = re.compile(r"\..*\.\d+\.(tmp|old)|\.\d+\.tmp\..*")
GLANCES = 20  # times that a lock is tried again
MAX_LINE = 64 * 1024 * 1024  # characters; a longer "line" is a file of another kind


def write_bytes(path: Path, data: bytes) -> None:
    """Write to a temporary neighbour, fsync, rename: after a crash the old or the new content stands, never a mixture.

    Raises:
        UserError: the disk is full or the folder can't be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise disk_error(error, path) from None


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode())


def sweep(folder: Path) -> None:
    """Remove what a killed process left half-written in a folder that nobody else writes into now."""
    for stale in [path for path in folder.glob(".*") if _TEMPORARY.fullmatch(path.name)]:
        if stale.is_dir():
            shutil.rmtree(stale, ignore_errors=True)
        else:
            stale.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON; NaN is refused, since other readers would not take it."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """`value` with null for every number inside it that is not finite: JSON has no word for those.

    >>> finite({"loss": [1.0, float("nan")]})
    {'loss': [1.0, None]}
    """
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    """The JSON value in a file.

    Raises:
        UserError: missing file or broken JSON, with the line.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"can't be read: {error.strerror}", where=path) from None
    except json.JSONDecodeError as error:
        raise UserError(f"broken JSON in line {error.lineno}: {error.msg}", where=path) from None
    except UnicodeDecodeError:
        raise UserError("broken JSON: this is not UTF-8 text", where=path) from None


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_GO_ON = "free some space and run the same command again: what was finished or saved is kept"
_ELSEWHERE = "choose another folder with --out"


def disk_error(error: OSError | SafetensorError, path: Path) -> UserError:
    """The one-line form of a failed write: disk full, read-only folder, a file where a folder should be, …"""
    if isinstance(error, SafetensorError):  # "… I/O error: No space left on device (os error 28)"
        found = re.search(r"os error (\d+)", str(error))
        error = OSError(int(found[1]), os.strerror(int(found[1]))) if found else OSError(str(error))
    fix = _GO_ON if error.errno in _FULL else _ELSEWHERE
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return UserError("a file stands where a folder should be", where=path, fix=fix)
    return UserError(f"can't be written: {error.strerror or error}", where=path, fix=fix)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill; on success every file is fsynced and the folder takes the place of `path`.

    Raises:
        UserError: the disk is full or read-only; what stood at `path` is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _fsync(file)
        _fsync(temporary)
        _replace_folder(temporary, path)
    except (OSError, SafetensorError) as error:
        raise disk_error(error, path) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace_folder(new: Path, path: Path) -> None:
    """Rename `new` to `path`; a folder that stood there steps aside first and is removed last."""
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        path.rename(old)
    new.rename(path)
    _fsync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_text(path: Path) -> TextIO:
    """A text file for reading as strict UTF-8, decompressed by its ending (.gz, .zst).

    Raises:
        UserError: the file is missing or can't be opened. Decoding errors surface while reading: see `read_lines`.
    """
    try:
        if path.suffix == ".gz":
            return gzip.open(path, "rt", encoding="utf-8", newline="\n")
        if path.suffix == ".zst":
            return io.TextIOWrapper(io.BufferedReader(_ZstdStream(path)), encoding="utf-8", newline="\n")
        return path.open(encoding="utf-8", newline="\n")
    except OSError as error:
        raise UserError(f"can't be read: {error.strerror}", where=path) from None


def zstd_blocks(path: Path) -> Iterator[bytes]:
    """All frames of a Zstandard file, piece by piece; the library's own reader would take a cut-off frame for the end.

    Raises:
        EOFError: the last frame has no end.
        zstandard.ZstdError: the data is damaged.
    """
    frame = zstandard.ZstdDecompressor().decompressobj()
    inside = False
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            while data:
                if frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(data)
                inside, data = not frame.eof, frame.unused_data if frame.eof else b""
    if inside:
        raise EOFError("the last frame has no end")


class _ZstdStream(io.RawIOBase):
    """`zstd_blocks` as a file for reading."""

    def __init__(self, path: Path) -> None:
        path.open("rb").close()  # a missing file is an error now, not at the first read
        self._blocks, self._rest = zstd_blocks(path), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = block
        taken = self._rest[: len(buffer)]
        buffer[: len(taken)] = taken
        self._rest = self._rest[len(taken) :]
        return len(taken)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end) of a text file.

    Raises:
        UserError: not UTF-8, a truncated or damaged archive, or one gigantic line; names the line.
    """
    number = 0
    with open_text(path) as file:
        try:
            while line := file.readline(MAX_LINE):
                number += 1
                if len(line) == MAX_LINE:
                    raise UserError(
                        f"line {number} is longer than {MAX_LINE:,} characters", where=path, fix="split it into lines"
                    )
                yield number, line.rstrip("\r\n").removeprefix("\ufeff" if number == 1 else "")
        except UnicodeDecodeError as error:
            bad = f"0x{error.object[error.start]:02x}" if error.object else "?"
            place = f" some lines after line {number}" if number else ""
            raise UserError(
                f"not UTF-8 text{place}: byte {bad}", where=path, fix="convert it with iconv -t UTF-8"
            ) from None
        except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            raise UserError(
                f"archive is cut off or damaged after line {number}: {error}", where=path, fix="fetch the file again"
            ) from None


def read_rows(
    path: Path,
    parse: Callable[[Mapping[str, Any]], T],
    on_bad_row: BadRows = "stop",
    skipped: list[str] | None = None,
) -> Iterator[T]:
    """Each JSON line of a file, parsed.

    Args:
        parse: such as `Conversation.from_row`; its UserError becomes "file:line: reason".
        on_bad_row: "stop" raises at the first bad row; "skip" appends the reason to `skipped` and goes on.

    Raises:
        UserError: a bad row under "stop", or a file that can't be read at all.
    """
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            yield parse(_json_object(line))
        except UserError as error:
            reason = f"{path}:{number}: {error}"
            if on_bad_row == "stop":
                raise UserError(reason, fix="mend the row or pass --on-bad-row skip") from None
            if skipped is not None:
                skipped.append(reason)


def _json_object(line: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"broken JSON at column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets a thousand deep
        raise UserError(f"not usable JSON: {error}") from None
    if not isinstance(row, dict):
        raise UserError("a row must be a JSON object", value=line)
    if "\\ud" in line.lower():  # an escape that may be half of a character, which no tokenizer could take
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise UserError(f"a lone surrogate U+{ord(error.object[error.start]):04X}, half of a character") from None
    return row


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write JSON lines atomically (gzip or zstandard by the file's ending); returns how many."""
    count = 0
    temporary = path.with_name(f".{os.getpid()}.tmp.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _create_text(temporary) as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
        _fsync(temporary)
        temporary.replace(path)
    except OSError as error:
        raise disk_error(error, path) from None
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _create_text(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "wt", encoding="utf-8")
    if path.suffix == ".zst":
        return io.TextIOWrapper(zstandard.open(path, "wb"), encoding="utf-8")
    return path.open("w", encoding="utf-8")


def content_hash(path: Path) -> str:
    """A hash of a file's bytes, or of every file below a folder with its name; hidden files don't count."""
    digest = hashlib.blake2b(digest_size=16)
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file() and f.name[0] != ".")
    for file in files:
        digest.update(str(file.relative_to(path)).encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


class FolderLock:
    """An exclusive lock on a folder for one process, released by the kernel even after kill -9.

    Raises:
        UserError: on entering, when another process holds it or the folder can't be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"

    def __enter__(self) -> FolderLock:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+")
            self._take()
        except BlockingIOError:
            holder = self.path.read_text().strip()
            raise UserError(
                f"another run (process {holder or 'unknown'}) is writing here",
                where=self.path.parent,
                fix="wait for it, or choose another folder with --out",
            ) from None
        except OSError as error:
            raise disk_error(error, self.path.parent) from None
        self._file.seek(0)
        self._file.truncate()
        self._file.write(str(os.getpid()))
        self._file.flush()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _take(self) -> None:
        """Lock; tried for half a second, since somebody may only be looking (`is_locked`)."""
        for patience in range(GLANCES, -1, -1):
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if not patience:
                    raise
            time.sleep(0.5 / GLANCES)


def is_locked(folder: Path) -> bool:
    """Whether a process holds the `FolderLock` of a folder now."""
    try:
        with (folder / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
