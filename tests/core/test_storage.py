"""Files: atomic or absent; bad input named by file and line."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from nestling.core import storage
from nestling.core.errors import UserError
from nestling.core.types import Conversation, Ranking

GOOD = '{"messages": [{"role": "user", "content": "Hi"}]}\n'


@pytest.mark.parametrize("ending", ["rows.jsonl", "rows.jsonl.gz", "rows.jsonl.zst"])
def test_rows_round_trip(tmp_path: Path, ending: str) -> None:
    rows = [{"messages": [{"role": "user", "content": "白日依山盡 🐣"}]}] * 3
    assert storage.write_rows(tmp_path / ending, rows) == 3
    assert [c.to_row() for c in storage.read_rows(tmp_path / ending, Conversation.from_row)] == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + '{"message": []}\n', ":2: field 'messages' is missing; a row needs messages"),
        (
            GOOD + '{"messages": [{"role": "usr"}]}\n',
            ":2: field 'messages.0.role': unknown role 'usr'; did you mean 'user'?",
        ),
        (GOOD + "{not json}\n", ":2: broken JSON at column 2"),
        ("[1]\n", ":1: a row must be a JSON object"),
        ('{"messages": []}\n', ":1: field 'messages': a conversation has no message"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        list(storage.read_rows(path, Conversation.from_row))
    assert str(caught.value).startswith(f"{path}{message}")


def test_skipping_counts_what_it_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD + "{}\n" + GOOD)
    skipped: list[str] = []
    assert len(list(storage.read_rows(path, Conversation.from_row, "skip", skipped))) == 2
    assert len(skipped) == 1
    assert ":2:" in skipped[0]


def test_a_ranking_with_one_response_is_refused(tmp_path: Path) -> None:
    row = {"prompt": [{"role": "user", "content": "Hi"}], "responses": [{"content": "a", "score": 1}]}
    (tmp_path / "r.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="needs 2 to 9 responses, this one has 1"):
        list(storage.read_rows(tmp_path / "r.jsonl", Ranking.from_row))


@pytest.mark.parametrize(("ending", "compress"), [("gz", gzip.compress), ("zst", zstandard.ZstdCompressor().compress)])
def test_a_truncated_archive_is_named(tmp_path: Path, ending: str, compress: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"rows.jsonl.{ending}"
    path.write_bytes(compress("".join(f"{n} {GOOD}" for n in range(9000)).encode())[:-20])
    with pytest.raises(UserError, match="cut off or damaged"):
        list(storage.read_lines(path))


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\nb\xffd\n")
    with pytest.raises(UserError, match="not UTF-8 text"):
        list(storage.read_lines(tmp_path / "a.txt"))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    storage.write_rows(path, [{"a": 1}])
    with pytest.raises(TypeError):
        storage.write_rows(path, [{"a": object()}])
    assert path.read_text() == '{"a": 1}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_full_disk_is_one_line_and_the_old_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    storage.write_json(path, 1)

    def full(handle: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="can't be written: No space left on device"):
        storage.write_json(path, 2)
    assert storage.read_json(path) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_an_atomic_folder_replaces_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with storage.atomic_folder(target) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(RuntimeError), storage.atomic_folder(target) as folder:
        (folder / "a").write_text("2")
        raise RuntimeError
    assert (target / "a").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_lock_keeps_a_second_process_out_and_dies_with_its_holder(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from nestling.core.storage import FolderLock\n"
        f"with FolderLock(Path({str(tmp_path)!r})):\n    print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"process {holder.pid}"), storage.FolderLock(tmp_path):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with storage.FolderLock(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_content_hash_sees_names_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    first = storage.content_hash(tmp_path)
    (tmp_path / "a").write_text("2")
    second = storage.content_hash(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({first, second, storage.content_hash(tmp_path)}) == 3
