"""What the person at the keyboard gets for bad data: one line, exit code 2, no traceback, nothing lost."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import zstandard
from calls import CALM, TINY, CommandLine

from nestling.core.storage import read_json, read_rows
from nestling.core.types import Document

ROWS = "".join(
    json.dumps({"id": str(n), "text": f"Row {n}, {n * n % 97} and {n**3 % 89}."}) + "\n" for n in range(3000)
)
TEXTS: dict[str, tuple[bytes, str]] = {
    "empty.txt": (b"", "the file is empty"),
    "blank.txt": (b" \n\n", "the file is empty"),
    "x": (b"x", "no document"),  # too small for a train and a val split
    "binary.txt": (bytes(range(256)) * 40, "looks like a binary file"),
    "no_ending": (b"\x7fELF\0\0" * 40, "looks like a binary file"),
    "latin1.txt": ("Müßiggang ist aller Laster Anfang. ".encode("latin-1") * 20, "not UTF-8 text in line 1: byte 0xfc"),
    "cut.txt.gz": (gzip.compress(ROWS.encode())[:-30], "archive is cut off"),
    "cut.txt.zst": (zstandard.compress(ROWS.encode())[:-30], "archive is cut off"),
    "cut.jsonl.gz": (gzip.compress(ROWS.encode())[:-30], "archive is cut off or damaged after line"),
    "cut.jsonl.zst": (zstandard.compress(ROWS.encode())[:-30], "archive is cut off or damaged after line"),
    "false.txt.gz": (b"plain text " * 30, "Not a gzipped file"),
    "field.jsonl": (b'{"id": "a", "text": "b"}\n{"id": "a", "txet": "b"}\n', ":2: field 'text' is missing"),
    "broken.jsonl": (b'{"id": "a", "text": "b"}\n{"id": "a", "te\n', ":2: broken JSON at column 13"),
    "deep.jsonl": (b"[" * 100_000, ":1: not usable JSON"),
    "list.jsonl": (b'["a"]\n', ":1: a row must be a JSON object"),
    "surrogate.jsonl": (b'{"text": "\\ud83d"}\n', "lone surrogate U+D83D"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_an_unusable_text_is_refused_in_one_line(nestling: CommandLine, tmp_path: Path, name: str) -> None:
    content, reason = TEXTS[name]
    (tmp_path / name).write_bytes(content)
    message = nestling.refused("run", TINY, "--out", tmp_path / "run", "--until", "tokenize", "--text", tmp_path / name)
    assert reason in message
    assert str(tmp_path) in message


def test_a_folder_without_text_is_refused(nestling: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    message = nestling.refused("run", TINY, "--out", tmp_path / "run", "--text", tmp_path / "texts")
    assert "texts: the folder holds no text" in message


@pytest.mark.parametrize("name", ["line.txt", "text.txt.gz", "folder", "rows.jsonl"])
def test_every_form_of_text_is_read(nestling: CommandLine, tmp_path: Path, name: str) -> None:
    """One gigantic line is cut into documents; folders and archives are read as they are."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "line.txt").write_text("word " * 400_000)
    (tmp_path / "text.txt.gz").write_bytes(gzip.compress(b"Once there was a hen. " * 3000))
    (folder / "a.txt").write_text("A first text. " * 2000)
    (folder / "b.jsonl").write_text(ROWS)
    (tmp_path / "rows.jsonl").write_text("\ufeff" + ROWS)
    words = ("run", TINY, "--out", tmp_path / "run", "--until", "tokenize", "--text", tmp_path / name)
    done = nestling(*words)
    assert done.code == 0, done.err
    assert read_json(tmp_path / "run" / "tokenize" / "stage.json")["report"]["train_tokens"] > 1000


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def conversation(*turns: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(turns)}


ANSWER = {"role": "assistant", "content": "Good day."}
CHATS: dict[str, tuple[dict[str, Any], str]] = {
    "role": (conversation(user("Hi"), {"role": "robot", "content": "b"}), "'messages.1.role': unknown role 'robot'"),
    "field": ({"message": [user("Hi")]}, "field 'messages' is missing; a row needs messages"),
    "none": (conversation(), "a conversation has no message"),
    "call": (conversation(user("Hi"), {**ANSWER, "tool_calls": [{"function": 5}]}), "the row has another shape"),
    "number": (
        conversation(user("Hi"), {**ANSWER, "content": 5}),
        "'messages.1.content': must be a valid string (got 5)",
    ),
}


def point(stage: str, path: Path) -> tuple[str, str]:
    """The override that makes a data stage read a file."""
    return "--set", f'{stage}.sources=[{{source: files, settings: {{paths: ["{path}"]}}}}]'


@pytest.mark.parametrize("name", CHATS)
def test_a_bad_conversation_is_named_by_file_and_line(nestling: CommandLine, tmp_path: Path, name: str) -> None:
    row, reason = CHATS[name]
    rows = [conversation(user(f"Hello {n}"), ANSWER) for n in range(20)]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in [*rows, row]))
    sources = f'[{{source: files, settings: {{paths: ["{path}"]}}}}]'
    message = nestling.refused("conversations", "--out", tmp_path / "run", "--sources", sources)
    assert f"{path}:21: " in message
    assert reason in message
    assert "--on-bad-row skip" in message


@pytest.mark.parametrize(
    ("responses", "reason"),
    [
        ([{"content": "a", "score": 1}], "a ranking needs 2 to 9 responses, this one has 1"),
        ([{"content": "a"}, {"content": "b"}], "a response has neither score nor rank"),
        ([{"content": "a", "score": float("nan")}, {"content": "b", "score": 1}], "must be a finite number (got nan)"),
    ],
)
def test_a_bad_ranking_is_named(
    nestling: CommandLine, tmp_path: Path, responses: list[dict[str, Any]], reason: str
) -> None:
    path = tmp_path / "ranked.jsonl"
    path.write_text(json.dumps({"prompt": [user("Hi")], "responses": responses}))
    sources = f'[{{source: files, settings: {{paths: ["{path}"]}}}}]'
    message = nestling.refused("rankings", "--out", tmp_path / "run", "--sources", sources)
    assert f"{path}:1: field 'responses" in message
    assert reason in message


def test_bad_rows_are_skipped_and_counted_when_asked(nestling: CommandLine, tmp_path: Path) -> None:
    """`--on-bad-row skip` reaches every data stage; the stages that had finished are not begun anew by it."""
    texts, chats = tmp_path / "texts.jsonl", tmp_path / "chats.jsonl"
    texts.write_text(ROWS + '{"id": "a", "txet": "b"}\n{"id": "b", "te\n')
    turns = [conversation(user(f"Hello {n}"), ANSWER) for n in range(20)]
    chats.write_text("".join(json.dumps(row) + "\n" for row in [*turns, CHATS["role"][0]]))
    words = ("run", TINY, "--out", tmp_path / "run", *CALM, *point("corpus", texts), *point("conversations", chats),
             "--set", "pretrain.training.steps=1", "--until", "conversations")  # fmt: skip
    assert f"{texts}:3001: field 'text' is missing" in nestling.refused(*words)
    (tmp_path / "run" / "corpus" / "mine.txt").write_text("a sign of the first attempt")
    done = nestling(*words, "--on-bad-row", "skip")
    assert done.code == 0, done.err
    assert f"skipped {texts}:3002: broken JSON" in done.err
    reports = {
        name: read_json(tmp_path / "run" / name / "stage.json")["report"] for name in ("corpus", "conversations")
    }
    assert {name: report["skipped"] for name, report in reports.items()} == {"corpus": 2, "conversations": 1}
    assert len(list(read_rows(tmp_path / "run" / "corpus" / "train.jsonl", Document.from_row))) > 2000
    again = nestling(*words)
    assert "[5/6] pretrain: unchanged, skipped" in again.err


@pytest.mark.parametrize("model", ["", "pretrain"])
def test_a_prompt_longer_than_the_context_is_refused(nestling: CommandLine, finished: Path, model: str) -> None:
    message = nestling.refused("generate", finished / model, "word " * 3000)
    assert "the prompt is longer than the context (got 6003); use at most 383 tokens" in message


def test_prompts_that_leave_no_room_for_an_answer_are_refused(
    nestling: CommandLine, finished: Path, tmp_path: Path
) -> None:
    reads = [word for role, stage in (("policy", "sft"), ("reward", "reward"), ("prompts", "prompts"))
             for word in (f"--{role}", finished / stage)]  # fmt: skip
    options = ("--objective.max-tokens", 380, "--objective.text-weight", 0, "--training.steps", 1)
    message = nestling.refused("ppo", "--out", tmp_path / "run", *reads, *options)
    assert "prompts: all 40 prompts are longer than 4 tokens" in message
