"""Checkpoints that are not what a command needs: named in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from calls import CALM, TINY, CommandLine

from nestling.core.storage import read_json


@pytest.fixture
def model(finished: Path, tmp_path: Path) -> Path:
    """A copy of the chat model, to be spoilt."""
    return shutil.copytree(finished / "sft" / "model", tmp_path / "model")


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**read_json(path), **changes}))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "mamba"}, "config.json: unknown model_type (got 'mamba'); "),
        ({"intermediate_size": 64}, "use weights of this very model"),
        ({"num_hidden_layers": 3}, "lacks the tensors model.layers.2"),
        ({"num_hidden_layers": 1}, "has unknown tensors model.layers.1"),
        ({"vocab_size": 300}, "use weights of this very model"),
    ],
)
def test_a_checkpoint_of_another_architecture_is_refused(
    nestling: CommandLine, model: Path, changes: dict[str, Any], reason: str
) -> None:
    rewrite(model / "config.json", **changes)
    message = nestling.refused("chat", model)
    assert message.startswith(str(model))
    assert reason in message


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("config.json", b"{", "config.json: broken JSON in line 1"),
        ("config.json", b"\xff\xfe", "config.json: broken JSON: this is not UTF-8 text"),
        ("config.json", b"[]", "config.json: a model's configuration must be a JSON object"),
        ("model.safetensors", b"junk", "model.safetensors: damaged weights"),
        ("model.safetensors", None, "model.safetensors: weights are missing"),
        ("tokenizer.json", None, "no tokenizer.json here"),
        ("tokenizer.json", b"{}", "only BPE and Unigram tokenizers are supported"),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    nestling: CommandLine, model: Path, file: str, content: bytes | None, reason: str
) -> None:
    (model / file).unlink()
    if content is not None:
        (model / file).write_bytes(content)
    assert reason in nestling.refused("chat", model)


def test_a_cut_off_checkpoint_is_refused(nestling: CommandLine, model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors: damaged weights" in nestling.refused("generate", model, "Hello")


def test_a_tokenizer_of_another_model_is_refused(nestling: CommandLine, finished: Path, model: Path) -> None:
    shutil.copy(finished / "pretrain" / "model" / "tokenizer.json", model / "tokenizer.json")
    message = nestling.refused("chat", model)
    assert "is not the one of the model" in message


def test_base_and_reward_models_do_not_chat(nestling: CommandLine, finished: Path) -> None:
    assert "this is a base model: it continues text" in nestling.refused("chat", finished / "pretrain")
    for verb in ("chat", "generate"):
        assert "this is a reward model: it scores replies" in nestling.refused(verb, finished / "reward")


@pytest.fixture(scope="module")
def other(nestling: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose tokenizer is another one."""
    out = tmp_path_factory.mktemp("other") / "run"
    steps = [word for stage in ("pretrain", "sft", "reward") for word in ("--set", f"{stage}.training.steps=1")]
    done = nestling("run", TINY, "--out", out, *CALM, *steps, "--set", "tokenizer.vocab_size=400", "--until", "reward")
    assert done.code == 0, done.err
    return out


def test_shards_of_another_tokenizer_are_refused(
    nestling: CommandLine, finished: Path, other: Path, tmp_path: Path
) -> None:
    words = ("--tokens", finished / "tokenize", "--tokenizer", other / "tokenizer")
    for stage in (("ngram",), ("pretrain", "--training.steps", 1)):
        message = nestling.refused(*stage, "--out", tmp_path / "run", *words)
        assert "tokenize/train: these tokens were written with another tokenizer; tokenize again" in message


def test_a_reward_model_of_another_tokenizer_is_refused(
    nestling: CommandLine, finished: Path, other: Path, tmp_path: Path
) -> None:
    words = ("--policy", finished / "sft", "--reward", other / "reward", "--prompts", finished / "prompts",
             "--objective.text-weight", 0, "--objective.rollouts", 4, "--objective.max-tokens", 8)  # fmt: skip
    message = nestling.refused("ppo", "--out", tmp_path / "run", *words, "--training.steps", 1)
    assert "policy and reward model have different tokenizers" in message
