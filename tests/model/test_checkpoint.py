from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nestling.core.errors import UserError
from nestling.model import checkpoint
from nestling.model.decoder import Decoder, build
from nestling.model.heads import ScalarHead, Scored
from nestling.model.hub import make_config
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.special import CHAT, TURN_END

TEXT = ["the cat sat on the mat and the dog sat on the log"] * 4


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXT, 270)


def tiny(tokenizer: Tokenizer, **changes: object) -> Decoder:
    sizes = {"vocab_size": tokenizer.vocab_size, "context": 32, "d_model": 32, "n_layers": 2, "n_heads": 4}
    return build(make_config({**sizes, "init": "gpt2", **changes}))


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def folder(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "m", tiny(tokenizer), tokenizer)
    return tmp_path / "m"


def test_the_folder_has_the_usual_files(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "nestling.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_rope_is_written_for_both_generations_of_readers_and_read_from_both(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10_000.0
    for old in (
        {"rope_theta": 5e5, "rope_parameters": None},
        {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5}},
    ):
        rewrite(folder / "config.json", **old)
        assert checkpoint.load(folder).model.config.rope_theta == 5e5


def test_a_chat_model_ends_with_its_turn_token(tokenizer: Tokenizer, tmp_path: Path) -> None:
    chat = tokenizer.with_special(CHAT)
    checkpoint.save(tmp_path / "m", tiny(chat), chat)
    generation = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert generation["eos_token_id"][0] == chat.id(TURN_END)
    assert "chat_template" in json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gpt2", "gpt1"])
@pytest.mark.filterwarnings("ignore")
def test_scores_open_as_a_sequence_classifier(architecture: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = tiny(tokenizer, architecture=architecture)
    head = ScalarHead(model.config)
    torch.nn.init.normal_(head.score.weight)
    checkpoint.save(tmp_path / "m", model, tokenizer, head=head)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    assert type(theirs).__name__.endswith("ForSequenceClassification")
    ids = torch.randint(0, 200, (1, 9), generator=torch.Generator().manual_seed(0))
    ours = Scored(model.eval(), head)(ids)[:, -1]
    torch.testing.assert_close(ours, theirs(ids).logits[:, 0], rtol=0, atol=1e-5)
    read = checkpoint.load(tmp_path / "m")
    assert read.head is not None
    assert torch.equal(Scored(read.model, read.head)(ids)[:, -1], ours)
    assert torch.equal(read.model(ids), model(ids))  # the output layer is kept


@torch.no_grad()
@pytest.mark.parametrize("positions", ["alibi", "sinusoidal", "none", "learned"])
def test_what_a_family_cannot_say_is_saved_in_our_own_form(
    positions: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = tiny(tokenizer, positions=positions).eval()
    checkpoint.save(tmp_path / "m", model, tokenizer)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["model_type"] == "nestling-qwen3"
    ids = torch.randint(0, 200, (2, 9))
    read = checkpoint.load(tmp_path / "m").model
    assert read.config == model.config
    assert torch.equal(read(ids), model(ids))


@torch.no_grad()
def test_shards(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = tiny(tokenizer).eval()
    checkpoint.save(tmp_path / "m", model, tokenizer, shard_bytes=20_000)
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 2
    ids = torch.randint(0, 200, (2, 9))
    assert torch.equal(checkpoint.load(tmp_path / "m").model(ids), model(ids))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=0, atol=1e-5)


def test_bf16_weights_keep_exact_angles(folder: Path) -> None:
    model = checkpoint.load(folder, dtype=torch.bfloat16).model
    assert model.embedding.weight.dtype == torch.bfloat16
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_names_without_their_prefix_and_stored_masks_are_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """As in the first published GPT-2 files."""
    model = tiny(tokenizer, architecture="gpt2")
    checkpoint.save(tmp_path / "m", model, tokenizer)
    path = tmp_path / "m" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(path).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
    save_file(tensors, path)
    ids = torch.randint(0, 200, (2, 9))
    assert torch.equal(checkpoint.load(tmp_path / "m").model(ids), model.eval()(ids))


def edit_weights(folder: Path, drop: str | None = None, **changes: torch.Tensor) -> None:
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    tensors.pop(drop or "", None)
    save_file(tensors, folder / "model.safetensors")


def test_missing_weights_are_named(folder: Path) -> None:
    edit_weights(folder, drop="model.norm.weight")
    with pytest.raises(UserError, match=r"lacks the tensors model\.norm\.weight"):
        checkpoint.load(folder)


def test_unexpected_weights_are_named(folder: Path) -> None:
    edit_weights(folder, surprise=torch.ones(3))
    with pytest.raises(UserError, match="unknown tensors surprise"):
        checkpoint.load(folder)


def test_misshaped_weights_are_named(folder: Path) -> None:
    edit_weights(folder, **{"model.norm.weight": torch.ones(7)})
    with pytest.raises(UserError, match=r"model\.norm\.weight \[7\] instead of \[32\]"):
        checkpoint.load(folder)


def test_damaged_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged weights"):
        checkpoint.load(folder)


def test_unknown_model_type_names_the_nearest(folder: Path) -> None:
    rewrite(folder / "config.json", model_type="qwen33")
    with pytest.raises(UserError, match="did you mean 'qwen3'"):
        checkpoint.load(folder)


def test_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        checkpoint.load(tmp_path)


def test_another_tokenizer_is_refused(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = Tokenizer.train(["completely different words make other merges"] * 4, 270)
    other.save(folder)
    with pytest.raises(UserError, match="is not the one of the model"):
        checkpoint.load(folder)
    with pytest.raises(UserError, match="is not the one of the model"):
        checkpoint.save(tmp_path / "n", tiny(tokenizer), tokenizer.with_special(CHAT))


def test_a_folder_with_other_things_is_not_overwritten(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="other things"):
        checkpoint.save(tmp_path, tiny(tokenizer), tokenizer)
    assert (tmp_path / "thesis.txt").exists()


def test_saving_replaces_a_checkpoint(folder: Path, tokenizer: Tokenizer) -> None:
    checkpoint.save(folder, tiny(tokenizer, n_layers=3), tokenizer, {"round": 2})
    read = checkpoint.load(folder)
    assert (read.model.config.n_layers, read.provenance) == (3, {"round": 2})


PARALLEL = '''
"""Attention and feed-forward side by side, as in GPT-J and PaLM."""

from nestling.model.block import Block
from nestling.model.config import DecoderConfig
from nestling.model.decoder import Decoder

REFERENCE = None


class Config(DecoderConfig):
    architecture: str = "my_lab.parallel"


class ParallelBlock(Block):
    def __init__(self, config):
        super().__init__(config)
        del self.feed_forward_norm

    def forward(self, x, scene, memory=None):
        normed = self.attention_norm(x)
        return x + self.attention(normed, scene, memory) + self.feed_forward(normed)


def build(config):
    return Decoder(config, ParallelBlock)


def tiny():
    return Config(vocab_size=97, context=32, d_model=32, n_layers=2, n_heads=4)
'''


@torch.no_grad()
def test_an_architecture_is_one_file_even_outside(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab" / "parallel.py").write_text(PARALLEL)
    monkeypatch.syspath_prepend(tmp_path)
    model = tiny(tokenizer, architecture="my_lab.parallel").eval()
    assert type(model.blocks[0]).__name__ == "ParallelBlock"
    checkpoint.save(tmp_path / "m", model, tokenizer)
    ids = torch.randint(0, 200, (2, 9))
    assert torch.equal(checkpoint.load(tmp_path / "m").model(ids), model(ids))
