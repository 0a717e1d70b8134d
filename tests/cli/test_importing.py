"""`nestling import`, `nestling merge`, and recipes that start from a model of the user's."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from calls import CALM, CommandLine

from nestling.core.storage import content_hash, read_json

WORDS = "once upon a time\n"


@pytest.fixture
def nanogpt(tmp_path: Path) -> Path:
    """A folder as nanoGPT leaves it, of a model of characters without biases."""
    characters = sorted(set(WORDS))
    size, width = len(characters), 16
    torch.manual_seed(0)
    shapes = {"attn.c_attn": (48, 16), "attn.c_proj": (16, 16), "mlp.c_fc": (64, 16), "mlp.c_proj": (16, 64)}
    state = {f"_orig_mod.transformer.h.0.{name}.weight": torch.randn(*shape) for name, shape in shapes.items()}
    norms = {f"_orig_mod.transformer.{name}.weight": torch.ones(width) for name in ("h.0.ln_1", "h.0.ln_2", "ln_f")}
    table = torch.randn(size, width)
    tables = {"transformer.wte": table, "lm_head": table, "transformer.wpe": torch.randn(32, width)}
    state |= norms | {f"_orig_mod.{name}.weight": value for name, value in tables.items()}
    args = {
        "n_layer": 1,
        "n_head": 2,
        "n_embd": width,
        "block_size": 32,
        "bias": False,
        "vocab_size": size,
        "dropout": 0.0,
    }
    folder = tmp_path / "nano"
    folder.mkdir()
    torch.save({"model": state, "model_args": args, "iter_num": 3}, folder / "ckpt.pt")
    meta = {"vocab_size": size, "itos": dict(enumerate(characters)), "stoi": {c: n for n, c in enumerate(characters)}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


def test_an_imported_model_generates(nestling: CommandLine, nanogpt: Path, tmp_path: Path) -> None:
    done = nestling("import", nanogpt, "--out", tmp_path / "model")
    assert done.code == 0, done.err
    assert "read a nanoGPT checkpoint" in done.err
    assert "it has no biases: they are written as zeros" in done.err
    for prompt in ("once", ""):
        written = nestling("generate", tmp_path / "model", prompt, "--max-tokens", 5, "--device", "cpu")
        assert written.code == 0, written.err
        assert set(written.out.strip("\n")) <= set(WORDS)


def test_an_import_without_tokenizer_is_refused(nestling: CommandLine, nanogpt: Path, tmp_path: Path) -> None:
    (nanogpt / "meta.pkl").unlink()
    assert "--tokenizer" in nestling.refused("import", nanogpt, "--out", tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.fixture
def tuned(nestling: CommandLine, finished: Path, tmp_path: Path) -> Path:
    """The run of the user who gave a recipe a model of another run's, and conversations."""
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": str(n)}]}
        for n in range(40)
    ]
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shutil.copytree(finished / "sft" / "model", tmp_path / "given")
    words = ["--model", tmp_path / "given", "--conversations", tmp_path / "talks.jsonl", "--out", tmp_path / "run"]
    less = ["--set", "sft.training={steps: 3, compile: off}", "--set", "sft.batch_rows=2"]
    done = nestling("run", "lora", *words, *less, *CALM)
    assert done.code == 0, done.err
    return tmp_path / "run"


def test_a_recipe_starts_from_a_model(nestling: CommandLine, tuned: Path, tmp_path: Path) -> None:
    before = content_hash(tmp_path / "given")
    stages = [stage["name"] for stage in read_json(tuned / "recipe.json")["stages"]]
    assert stages == ["conversations", "sft", "evaluate"]
    assert (tuned / "sft" / "model" / "adapter_model.safetensors").exists()
    merged = nestling("merge", tuned, "--out", tmp_path / "merged")
    assert merged.code == 0, merged.err
    texts = [nestling("generate", model, "Say", "--temperature", 0, "--max-tokens", 8, "--device", "cpu").out
             for model in (tuned, tmp_path / "merged")]  # fmt: skip
    assert texts[0] == texts[1]
    assert content_hash(tmp_path / "given") == before
    assert (tmp_path / "merged" / "model.safetensors").exists()
    assert "the adapter still needs this folder" in nestling.refused("merge", tuned, "--out", tmp_path / "given")
    assert "has no adapters to merge" in nestling.refused("merge", tmp_path / "merged", "--out", tmp_path / "again")
    shutil.rmtree(tmp_path / "given")
    assert "base model is not on this machine" in nestling.refused("chat", tuned)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["lora", "--model", "/nowhere"], "no model here"),
        (["lora", "--conversations", "/nowhere"], "no such file or folder"),
        (["own-text", "--conversations", "."], "the recipe learns no conversations"),
    ],
)
def test_mistakes(nestling: CommandLine, tmp_path: Path, words: list[str], reason: str) -> None:
    assert reason in nestling.refused("run", *words, "--out", tmp_path / "run")
