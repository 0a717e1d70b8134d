"""Folders that transformers wrote: chat, fine-tuning, export and its proof, by the commands that people type."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from calls import CALM, CommandLine
from families import FORMS, make

from nestling.core.storage import read_json, write_rows
from nestling.tokenizer.bpe import Tokenizer

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
TURNS = ("user", "assistant")


def talk(*said: str) -> dict[str, Any]:
    return {"messages": [{"role": TURNS[n % 2], "content": text} for n, text in enumerate(said)]}


@pytest.fixture(scope="module", params=["llama2", "qwen"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with SentencePiece's model alone and Llama 2's form; a random Qwen3 that thinks."""
    place = make(tmp_path_factory.mktemp("family") / request.param, FORMS[request.param])
    tokenizer = Tokenizer.load(place)
    if request.param == "llama2":
        (place / "tokenizer.json").unlink()
    kind = transformers.LlamaConfig if request.param == "llama2" else transformers.Qwen3Config
    more = {} if request.param == "llama2" else {"head_dim": 8}
    config = kind(vocab_size=tokenizer.vocab_size, **SIZES, **more, eos_token_id=tokenizer.turn_end)
    transformers.set_seed(1)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(place)
    return place


def test_it_chats_learns_and_is_exported(nestling: CommandLine, folder: Path, tmp_path: Path) -> None:
    chat = nestling("chat", folder)
    assert (chat.code, chat.err) == (0, "")
    assert chat.out.count("bot  ") == 4
    rows = [talk(f"What is {n}?", f"It is {n}.", "Thanks", "You are welcome.") for n in range(40)]
    for split, part in (("train", rows[:32]), ("val", rows[32:])):
        write_rows(tmp_path / "talks" / f"{split}.jsonl", part)
    options = ("--training.steps", 20, "--batch-rows", 4, "--training.learning-rate", 0.01)
    done = nestling("sft", "--model", folder, "--conversations", tmp_path / "talks", "--out", tmp_path / "out", *options, *CALM)
    assert done.code == 0, done.err
    taught = tmp_path / "out" / "sft" / "model"
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out" / "sft" / "metrics.jsonl").read_text().splitlines()
              if "loss" in json.loads(line)]  # fmt: skip
    assert losses[-1] < 0.8 * losses[0]
    assert nestling("export", taught, tmp_path / "exported").code == 0
    kept = read_json(tmp_path / "exported" / "tokenizer_config.json")
    assert kept["chat_template"] == read_json(folder / "tokenizer_config.json")["chat_template"]
    proof = nestling("verify-export", tmp_path / "exported", "--prompts", 10, "--new-tokens", 4)
    assert proof.code == 0, proof.out + proof.err
    assert proof.out.count("agrees") >= 2


def spoil(folder: Path, place: Path, **changes: Any) -> Path:
    shutil.copytree(folder, place)
    path = place / "tokenizer_config.json"
    path.write_text(json.dumps({**read_json(path), **changes}))
    return place


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "this is a base model"),
        ("{% for", "chat template: can't be read"),
        ("{{ messages | sing }}", "No filter named 'sing'"),
        ("{{ raise_exception('no\nthanks') }}", "chat template: refuses this conversation: no thanks"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(
    nestling: CommandLine, folder: Path, tmp_path: Path, template: str | None, reason: str
) -> None:
    if template is None and "qwen" in folder.name:
        return  # has the tokens of our form, which is then used
    place = spoil(folder, tmp_path / "model", chat_template=template)
    assert reason in nestling.refused("chat", place)
    assert nestling("generate", place, "the cat", "--max-tokens", 5).code == 0


def test_a_broken_tokenizer_is_one_line(nestling: CommandLine, folder: Path, tmp_path: Path) -> None:
    place = spoil(folder, tmp_path / "model")
    (place / "tokenizer_config.json").write_text("{broken")
    assert "tokenizer_config.json: broken JSON in line 1" in nestling.refused("chat", place)
    if (place / "tokenizer.model").exists() and not (place / "tokenizer.json").exists():
        (place / "tokenizer.model").write_bytes(b"\x0a\x05junk!")
        assert "no SentencePiece model" in nestling.refused("chat", place)
