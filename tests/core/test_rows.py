"""Rows of any shape: a value or one line of complaint, never another error."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestling.core.errors import UserError
from nestling.core.storage import finite, read_rows, sweep, write_rows
from nestling.core.types import Conversation, Document, Problem, PromptRow, Ranking, Row

KINDS: list[type[Row]] = [Conversation, Document, Problem, PromptRow, Ranking]
WORDS = st.sampled_from([
    "messages", "role", "content", "user", "assistant", "prompt", "responses", "score", "rank", "chosen", "rejected",
    "tool_calls", "function", "name", "arguments", "tools", "meta", "id", "text", "answer", "verifier",
])  # fmt: skip
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(KINDS), st.dictionaries(WORDS, ANYTHING, max_size=6))
def test_any_row_is_read_or_refused(kind: type[Row], row: dict) -> None:
    try:
        value = kind.from_row(row)
    except UserError:
        return
    assert kind.from_row(value.to_row()) == value


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_bytes(content)
        skipped: list[str] = []
        with suppress(UserError):
            list(read_rows(path, Document.from_row, "skip", skipped))
        assert all(line.startswith(f"{path}:") for line in skipped)


@pytest.mark.parametrize("line", ["[" * 100_000, "9" * 5000, '{"id": "a", "text": "\\ud800"}', "{", "1", '{"a": 1'])
def test_a_line_that_is_no_row_names_its_place(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"id": "a", "text": "b"}}\n{line}\n')
    with pytest.raises(UserError, match=r"rows.jsonl:2: "):
        list(read_rows(path, Document.from_row))


def test_a_whole_character_may_be_spelt_as_two_escapes(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('\ufeff{"id": "a", "text": "\\ud83d\\ude00"}\n', encoding="utf-8")
    assert [row.text for row in read_rows(path, Document.from_row)] == ["😀"]


def test_numbers_that_json_cannot_say_become_null() -> None:
    assert (
        json.dumps(finite({"a": [1.5, float("inf")], "b": (float("nan"), "x")}))
        == '{"a": [1.5, null], "b": [null, "x"]}'
    )


def test_only_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    for name in (".a.json.12.tmp", ".12.tmp.train.jsonl", "mine.tmp", ".hidden", ".12.tmp"):
        (tmp_path / name).write_text("x")
    for name in (".train.12.tmp", ".model.12.old"):
        (tmp_path / name / "inside").mkdir(parents=True)
    write_rows(tmp_path / "rows.jsonl", [])
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".12.tmp", ".hidden", "mine.tmp", "rows.jsonl"]
