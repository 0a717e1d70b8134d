"""What the person at the keyboard gets for bad input: one line, exit code 2, no traceback, nothing lost."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import pytest

TINY = Path(__file__).parents[1] / "stages" / "tiny.yaml"


def nestling(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nestling.cli.app", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def refused(*arguments: object) -> str:
    done = nestling(*arguments)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


TEXTS = {
    "empty.txt": (b"", "empty"),
    "binary.txt": (bytes(range(256)) * 40, "text"),
    "latin1.txt": ("Müßiggang ist aller Laster Anfang. ".encode("latin-1") * 20, "UTF-8"),
    "cut.jsonl.gz": (gzip.compress(b'{"id": "a", "text": "some words"}\n' * 3000)[:-30], "cut off"),
    "rows.jsonl": (b'{"id": "a", "txet": "hello"}\n', "'text' is missing"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_unusable_texts_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    content, reason = TEXTS[name]
    (tmp_path / name).write_bytes(content)
    message = refused("run", TINY, "--out", tmp_path / "run", "--until", "corpus", "--text", tmp_path / name)
    assert name in message
    assert reason in message


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("tokenizer.vocab_size=200", "greater than or equal to 257"),
        ("pretrain.model.d_model=33", "not divisible by n_heads"),
        ("sft.training.learning_rate=-1", "greater than 0"),
        ("pretrain.model.d_modle=32", "did you mean 'd_model'"),
        ("pretrian.context=9", "did you mean 'pretrain'"),
        ("pretrain.training.optimizer=adamm", "did you mean"),
    ],
)
def test_bad_settings_are_refused_before_any_work(tmp_path: Path, override: str, reason: str) -> None:
    message = refused("run", TINY, "--out", tmp_path / "run", "--until", "sft", "--set", override)
    assert reason in message
    assert not (tmp_path / "run" / "corpus").exists()


def test_a_gigantic_line_of_text_is_cut_into_documents(tmp_path: Path) -> None:
    (tmp_path / "line.txt").write_text("word " * 400_000)
    done = nestling("run", TINY, "--out", tmp_path / "run", "--until", "tokenize", "--text", tmp_path / "line.txt")
    assert done.returncode == 0, done.stderr


def test_an_unknown_role_is_named_by_file_and_line(tmp_path: Path) -> None:
    rows = tmp_path / "chats.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "robot", "content": "b"}]}\n')
    sources = f'conversations.sources=[{{source: files, settings: {{paths: ["{rows}"]}}}}]'
    message = refused("run", TINY, "--out", tmp_path / "run", "--until", "conversations", "--set", sources,
                      "--set", "pretrain.training.steps=1")  # fmt: skip
    assert "chats.jsonl:1" in message
    assert "unknown role 'robot'" in message


def test_a_missing_recipe_names_the_nearest(tmp_path: Path) -> None:
    assert "did you mean 'demo'" in refused("run", "dmeo")


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    assert "no model here" in refused("chat", tmp_path)


@pytest.mark.parametrize("text", ["", "x"])
def test_an_own_text_too_small_for_a_split_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "small.txt").write_text(text)
    refused("run", TINY, "--out", tmp_path / "run", "--until", "tokenize", "--text", tmp_path / "small.txt")
