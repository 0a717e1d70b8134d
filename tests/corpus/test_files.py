"""The files source: every kind of file read, every kind of damage reported in one line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import zstandard

from nestling.core.config import parse
from nestling.core.errors import UserError
from nestling.corpus.paragraphs import cut_paragraphs
from nestling.corpus.sources import files
from nestling.corpus.splits import Split, split_rows

ROWS = [{"id": f"r{n}", "text": f"Row number {n}.", "title": f"T{n}"} for n in range(30)]


def _settings(*paths: Path, **given: Any) -> files.Settings:
    return parse(files.Settings, {"paths": [str(path) for path in paths], **given}, "sources.0.settings")


def _texts(settings: files.Settings, split: Split = "train") -> list[str]:
    return [document.text for document in files.documents(settings, 0, split, [])]


def _jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture(params=["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "folder"])
def rows_path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"rows.{request.param}"
    if request.param == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif request.param == "folder":
        (tmp_path / "in" / "deep").mkdir(parents=True)
        (tmp_path / "in" / "a.jsonl").write_bytes(_jsonl(ROWS[:10]))
        (tmp_path / "in" / "deep" / "b.jsonl.gz").write_bytes(gzip.compress(_jsonl(ROWS[10:])))
        (tmp_path / "in" / "picture.png").write_bytes(b"\x89PNG\0")
        (tmp_path / "in" / ".hidden.txt").write_text("no")
        return tmp_path / "in"
    else:
        pack = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.ZstdCompressor().compress}
        path.write_bytes(pack[request.param](_jsonl(ROWS)))
    return path


def test_rows_are_divided_without_loss(rows_path: Path) -> None:
    settings = _settings(rows_path, val_share=0.2)
    train, val = _texts(settings), _texts(settings, "val")
    assert sorted(train + val) == sorted(row["text"] for row in ROWS)
    assert len(val) == 6
    assert _texts(settings) == train


def test_template_id_limit_and_replace(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(_jsonl(ROWS))
    settings = _settings(path, template="{title}: {text}", id_field="title", replace={"number": "no."}, limit=2)
    first, second = files.documents(settings, 0, "train", [])
    assert (first.id, first.text) == ("T0", "T0: Row no. 0.")
    assert second.source == "rows.jsonl"


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.ZstdCompressor().compress])
def test_one_text_is_divided_by_position(tmp_path: Path, pack: Any) -> None:
    path = tmp_path / ("text.txt" + {gzip.compress: ".gz", bytes: ""}.get(pack, ".zst"))
    text = "".join(f"{n:05d} " for n in range(1000))
    path.write_bytes(pack(text.encode()))
    settings = _settings(path, document_characters=0)
    assert _texts(settings) == [text[:5400]]
    assert _texts(settings, "val") == [text[5400:]]


def test_long_texts_become_documents_at_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    paragraphs = [f"Paragraph {n}. " + "word " * 30 for n in range(50)]
    path.write_text("\r\n\r\n".join(paragraphs))
    documents = list(files.documents(_settings(path, document_characters=1000, val_share=0), 0, "train", []))
    assert "\n\n".join(document.text for document in documents) == "\n\n".join(paragraphs)
    assert all(len(document.text) <= 1000 for document in documents)
    assert documents[1].id == "book.txt#1"


@pytest.mark.parametrize("text", ["x" * 5000, "word " * 1000, "一二三四。" * 1000, "line\n" * 1000])
def test_one_gigantic_line_is_cut(text: str) -> None:
    pieces = list(cut_paragraphs(text, 700))
    assert "".join(pieces).replace("\n", "") == text.replace("\n", "")
    assert all(350 <= len(piece) <= 700 for piece in pieces[:-1])


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b" \n", "empty"),
        ("a.txt", b"\x7fELF\0\0\1", "binary"),
        ("a.txt", b"fine\nfine\nnot \xff fine\n", "line 3: byte 0xff"),
        ("a.txt.gz", gzip.compress(b"text " * 99, mtime=0)[:-9], "cut off"),
        ("a.txt.gz", b"no gzip at all", "can't be read"),
        ("a.txt.zst", zstandard.ZstdCompressor().compress(b"text " * 9999)[:-5], "cut off"),
        ("a.jsonl", b"", "empty"),
        ("a.jsonl", b'{"text": "ok"}\n{"body": "x"}\n', ":2: field 'text' is missing"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": 3}\n', ":2: field 'text' is not text"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "o\n', ":2: broken JSON"),
        ("a.jsonl", b'{"text": "ab\\ud800"}\n', "U+D800"),
        ("a.jsonl", b'{"text": "\xff"}\n', "not UTF-8"),
        ("a.jsonl", b"[1]\n", "JSON object"),
        ("a.jsonl.gz", gzip.compress(_jsonl(ROWS), mtime=0)[:-9], "cut off"),
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress(_jsonl(ROWS * 99))[:-4], "cut off"),
        ("a.parquet", b"PAR1 nonsense", "Parquet"),
    ],
)
def test_damage_is_one_line_with_the_place(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        _texts(_settings(path))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_zstandard_frames_are_one_file(tmp_path: Path) -> None:
    path = tmp_path / "text.txt.zst"
    path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(part) for part in (b"one two ", b"three")))
    assert _texts(_settings(path, val_share=0)) == ["one two three"]


def test_missing_paths_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        _texts(_settings(tmp_path / "nothing.txt"))
    with pytest.raises(UserError, match="holds no text"):
        _texts(_settings(tmp_path))
    with pytest.raises(UserError, match="text_field"):
        _settings(tmp_path, text_feild="x")


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"body": "x"}\nnonsense\n{"text": " "}\n{"text": "two"}\n')
    skipped: list[str] = []
    settings = _settings(path, on_bad_row="skip", val_share=0)
    assert [document.text for document in files.documents(settings, 0, "train", skipped)] == ["one", "two"]
    assert len(skipped) == 3
    assert f"{path}:2" in skipped[0]
    assert f"{path}:3" in skipped[1]


def test_conversations_rankings_prompts(tmp_path: Path) -> None:
    chats, pairs = tmp_path / "chats.jsonl", tmp_path / "pairs.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "I am Vicuna."}]
    chats.write_bytes(_jsonl([{"messages": turns, "tools": ["calculator"]}]))
    pairs.write_bytes(_jsonl([{"prompt": turns[:1], "chosen": "Hello!", "rejected": "No."}]))
    settings = _settings(chats, replace={"Vicuna": "Nestling"}, val_share=0)
    (chat,) = files.conversations(settings, 0, "train", [])
    assert chat.messages[1].content == "I am Nestling."
    (ranking,) = files.rankings(_settings(pairs, val_share=0), 0, "train", [])
    assert [response.value for response in ranking.responses] == [1.0, 0.0]
    for path in (chats, pairs):
        (prompt,) = files.prompts(_settings(path, val_share=0), 0, "train", [])
        assert [message.content for message in prompt.prompt] == ["Hi"]
    assert next(files.prompts(_settings(chats, val_share=0), 0, "train", [])).meta["tools"] == ["calculator"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "bot", "content": "x"}]}, "unknown role 'bot'"),
        ({"text": "x"}, "'messages' is missing"),
        ({"messages": []}, "no message"),
    ],
)
def test_bad_conversations_name_the_line(tmp_path: Path, row: Any, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(_jsonl([row]))
    with pytest.raises(UserError, match=message) as caught:
        list(files.conversations(_settings(path), 0, "train", []))
    assert f"{path}:1" in str(caught.value)


def test_a_ranking_with_one_response_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    prompt = [{"role": "user", "content": "x"}]
    path.write_bytes(_jsonl([{"prompt": prompt, "responses": [{"content": "a", "score": 1}]}]))
    with pytest.raises(UserError, match="2 to 9 responses"):
        list(files.rankings(_settings(path), 0, "train", []))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match="read from rows"):
        list(files.rankings(_settings(tmp_path / "a.txt"), 0, "train", []))


@pytest.mark.parametrize("count", [2, 3, 50, 2000])
def test_splits_are_complete_and_keep_equal_keys_together(count: int) -> None:
    rows = [(f"key{n // 2}", n) for n in range(count * 2)]
    parts: dict[Split, list[tuple[str, int]]] = {
        split: list(split_rows(rows, lambda row: row[0], 0.1, split)) for split in ("train", "val")
    }
    assert sorted(parts["train"] + parts["val"]) == sorted(rows)
    assert not {key for key, _ in parts["train"]} & {key for key, _ in parts["val"]}
    assert 0 < len(parts["val"]) < len(parts["train"]) or count == 2
    assert abs(len(parts["val"]) / len(rows) - 0.1) < 0.05 or count < 50
