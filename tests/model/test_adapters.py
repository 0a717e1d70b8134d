"""Adapters against the formula, and against PEFT in both directions."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import peft as library
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nestling.core import registry
from nestling.core.errors import UserError
from nestling.generation.engine import Engine
from nestling.generation.sampling import Sampling
from nestling.generation.sequence import Request
from nestling.model import checkpoint
from nestling.model.adapters import (
    Adaptation,
    Adapted,
    AdapterSettings,
    adapt,
    adaptation,
    adapted_layers,
    copied,
    merge,
    merged,
    trained,
)
from nestling.model.decoder import Decoder, build
from nestling.model.heads import ScalarHead
from nestling.model.likelihood import hidden_logprobs, weighted_loss_sum
from nestling.model.locate import checkpoint_folder
from nestling.tokenizer.bpe import Tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # transformers and PEFT about each other
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*"),
    # PEFT looks only at modules' names before it says so, and takes the ranks of parameters all the same
    pytest.mark.filterwarnings("ignore:.*_pattern keys did not match any targeted module.*"),
]
ARCHITECTURES = registry.names("model.architectures")
TOKENS = (3, 260)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat sat on the mat and the dog sat on the log"] * 4, 270)


def family(name: str) -> ModuleType:
    return registry.find("model.architectures", name)


def scrambled(model: nn.Module, std: float = 0.2, only_trained: bool = False) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not only_trained:
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.data.normal_(centre, std, generator=generator)


def saved_base(folder: Path, name: str, tokenizer: Tokenizer, **changes: Any) -> Path:
    """A random tiny model of a family, as a folder."""
    model = build(family(name).tiny().with_(vocab_size=tokenizer.vocab_size, **changes))
    scrambled(model)
    checkpoint.save(folder, model, tokenizer)
    return folder


def adapted(base: Path, tokens: tuple[int, ...] = (), **settings: Any) -> Decoder:
    """The model of a folder with random adapters."""
    model, _ = checkpoint.load_model(base)
    chosen = AdapterSettings(**{"rank": 3, "alpha": 5.0, **settings})
    adapt(model, Adaptation(chosen, base), torch.Generator().manual_seed(2), tokens)
    scrambled(model, 0.1, only_trained=True)
    return model.eval()


def ids(size: int, *shape: int) -> Tensor:
    return torch.randint(0, size, shape or (2, 12), generator=torch.Generator().manual_seed(0))


def assert_close(found: Tensor, wanted: Tensor) -> None:
    """Equal to 1e-5 of the largest logit."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * max(1.0, float(wanted.abs().max())))


# --- the layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_formula(use_rslora: bool) -> None:
    settings = AdapterSettings(rank=4, alpha=6.0, use_rslora=use_rslora)
    plain = nn.Linear(5, 7)
    a, b, x = torch.randn(4, 5), torch.randn(7, 4), torch.randn(3, 5)
    layer = Adapted(plain, a, b, settings.scale(), Adaptation(settings, Path()))
    scale = 6.0 / (math.sqrt(4) if use_rslora else 4)
    weight = plain.weight.double() + scale * b.double() @ a.double()
    wanted = x.double() @ weight.T + plain.bias.double()
    torch.testing.assert_close(layer(x).double(), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(layer.merged()(x).double(), wanted, rtol=0, atol=1e-5)


def test_gradients_are_those_of_the_formula_and_the_base_has_none() -> None:
    settings = AdapterSettings(rank=4, alpha=6.0)
    plain = nn.Linear(5, 7).requires_grad_(False)
    a, b, x = torch.randn(4, 5), torch.randn(7, 4), torch.randn(3, 5)
    layer = Adapted(plain, a, b, settings.scale(), Adaptation(settings, Path()))
    layer(x).square().sum().backward()
    a64, b64 = a.double().requires_grad_(), b.double().requires_grad_()
    y = x.double() @ (plain.weight.double() + 1.5 * b64 @ a64).T + plain.bias.double()
    y.square().sum().backward()
    torch.testing.assert_close(layer.lora_a.grad.double(), a64.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.lora_b.grad.double(), b64.grad, rtol=1e-5, atol=1e-5)
    assert plain.weight.grad is None
    assert plain.bias.grad is None


def test_dropout_only_while_training() -> None:
    settings = AdapterSettings(rank=4, dropout=0.5)
    layer = Adapted(
        nn.Linear(50, 7), torch.randn(4, 50), torch.randn(7, 4), settings.scale(), Adaptation(settings, Path())
    )
    x = torch.randn(3, 50)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


# --- the model -------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    return saved_base(tmp_path / "base", "qwen3", tokenizer)


def test_it_starts_as_the_base(base: Path) -> None:
    plain, _ = checkpoint.load_model(base)
    model = copy.deepcopy(plain)
    adapt(model, Adaptation(AdapterSettings(), base), torch.Generator(), TOKENS)
    assert torch.equal(model(ids(260)), plain(ids(260)))


def test_only_adapters_and_named_rows_learn(base: Path, tokenizer: Tokenizer) -> None:
    model = adapted(base, TOKENS, targets=("query", "down"))
    kinds = {name.rsplit(".", 1)[-1] for name in trained(model)}
    assert kinds == {"lora_a", "lora_b", "rows"}
    assert {path.split(".", 2)[-1] for path in adapted_layers(model)} == {"attention.query", "feed_forward.down"}
    model.train()(ids(tokenizer.vocab_size)).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(trained(model))
    assert model.embedding.rows.shape == (2, 32)


@pytest.mark.parametrize("tokens", [(), TOKENS])
def test_the_loss_of_a_frozen_output_layer(base: Path, tokens: tuple[int, ...]) -> None:
    """The chunked losses leave the frozen weight's gradient out, and give the others as the plain one does."""
    model, row = adapted(base, tokens), ids(264)

    def gradients(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(trained(model).values())))

    wanted = gradients(
        nn.functional.cross_entropy(model(row).flatten(0, 1), row.roll(-1, 1).flatten(), reduction="sum")
    )
    hidden = model.hidden(row)
    summed = weighted_loss_sum(hidden, model.output_weight, row.roll(-1, 1), torch.ones(row.shape), chunk=5)
    each = hidden_logprobs(model.hidden(row), model.output_weight, row.roll(-1, 1), chunk=5)
    for found in (gradients(summed), gradients(-each.sum())):
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_copies_share_what_is_frozen(base: Path) -> None:
    model = adapted(base)
    other = copied(model)
    scrambled(other, 0.1, only_trained=True)
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (mine is theirs) == (not mine.requires_grad), name


@torch.no_grad()
def test_merging_changes_neither_logits_nor_the_model_it_is_copied_from(base: Path) -> None:
    model = adapted(base, TOKENS)
    wanted = model(ids(264))
    plain = merged(model)
    assert_close(plain(ids(264)), wanted)
    assert torch.equal(model(ids(264)), wanted)
    assert adaptation(plain) is None
    assert merged(plain) is plain
    assert all(p.requires_grad == ("lora" in name or "rows" in name) for name, p in model.named_parameters())
    assert_close(merge(model)(ids(264)), wanted)


def test_the_engine_generates_with_adapters(base: Path, tokenizer: Tokenizer) -> None:
    """The plain engine, the packed one and the merged model give the same text, other than the base's."""
    model = adapted(base, alpha=40.0)
    request = [Request(tokenizer.encode("the cat"), Sampling(temperature=0.0, max_tokens=12), 0)]
    texts = [
        Engine(one, tokenizer, rows=1, frozen=frozen).generate(request)[0].ids
        for one, frozen in ((model, False), (model, True), (merged(model), False))
    ]
    assert texts[0] == texts[1] == texts[2]
    assert Engine(checkpoint.load_model(base)[0], tokenizer, rows=1).generate(request)[0].ids != texts[0]


# --- PEFT ------------------------------------------------------------------------------------------------------------


def reference(base: Path, adapter: Path, kind: str = "AutoModelForCausalLM", **more: Any) -> nn.Module:
    model = getattr(transformers, kind).from_pretrained(base, **more)
    return library.PeftModel.from_pretrained(model, str(adapter)).eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("tokens", [(), TOKENS])
@torch.no_grad()
def test_peft_computes_what_we_saved(tmp_path: Path, tokenizer: Tokenizer, name: str, tokens: tuple[int, ...]) -> None:
    base = saved_base(tmp_path / "base", name, tokenizer)
    model = adapted(base, tokens)
    checkpoint.save(tmp_path / "adapter", model, tokenizer)
    given = ids(tokenizer.vocab_size)
    wanted = model(given)
    assert torch.equal(checkpoint.load(tmp_path / "adapter", merge=False).model(given), wanted)
    assert_close(checkpoint.load(tmp_path / "adapter").model(given), wanted)
    if family(name).REFERENCE is not None:
        assert_close(reference(base, tmp_path / "adapter")(given).logits, wanted)


@pytest.mark.parametrize(
    "settings",
    [
        {"targets": ("query", "value")},
        {"targets": ("output",), "rank": 7, "use_rslora": True},
        {"targets": ("up", "key"), "alpha": 0.5},
        {"targets": ("down", "query"), "rank": 2},
        {"targets": ("value",), "dropout": 0.3},
    ],
)
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3_moe"])
@torch.no_grad()
def test_peft_understands_every_setting(
    tmp_path: Path, tokenizer: Tokenizer, name: str, settings: dict[str, Any]
) -> None:
    base = saved_base(tmp_path / "base", name, tokenizer)
    model = adapted(base, **settings)
    checkpoint.save(tmp_path / "adapter", model, tokenizer)
    given = ids(tokenizer.vocab_size)
    assert_close(reference(base, tmp_path / "adapter")(given).logits, model(given))
    again = checkpoint.load(tmp_path / "adapter", merge=False).model
    assert adapted_layers(again).keys() == adapted_layers(model).keys()
    found, wanted = (adaptation(one).settings for one in (again, model))
    assert found.model_copy(update={"targets": wanted.targets}) == wanted


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
        ("gpt2", {"target_modules": ["attn.c_proj", "c_fc"], "fan_in_fan_out": True, "use_rslora": True}),
        ("qwen3", {"target_modules": "all-linear", "lora_dropout": 0.1}),
        (
            "llama",
            {
                "target_modules": ["q_proj", "down_proj"],
                "rank_pattern": {"down_proj": 5},
                "alpha_pattern": {"q_proj": 3},
            },
        ),
        ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}),
        (
            "qwen3_moe",
            {
                "target_modules": [],
                "target_parameters": ["mlp.experts.gate_up_proj", "layers.2.mlp.experts.down_proj", "mlp.up_proj.weight"],
                "rank_pattern": {"mlp.experts.gate_up_proj": 5},
            },
        ),
        ("qwen3_moe", {"target_modules": ["gate_proj", "up_proj", "down_proj", "o_proj"]}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
        ("qwen2", {"target_modules": ["v_proj"], "layers_to_transform": [1], "trainable_token_indices": [4, 9]}),
        (
            "mistral",
            {"target_modules": ["gate_proj"], "trainable_token_indices": {"embed_tokens": [2], "lm_head": [5, 6]}},
        ),
    ],
)
@torch.no_grad()
def test_what_peft_saved_is_read(tmp_path: Path, tokenizer: Tokenizer, name: str, settings: dict[str, Any]) -> None:
    base = saved_base(tmp_path / "base", name, tokenizer)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    chosen = library.LoraConfig(**{"r": 2, "lora_alpha": 7, "task_type": "CAUSAL_LM", **settings})
    model = library.get_peft_model(plain, chosen).eval()
    scrambled(model, 0.1, only_trained=True)
    model.save_pretrained(tmp_path / "adapter")
    given = ids(tokenizer.vocab_size)
    found = checkpoint.load(tmp_path / "adapter")  # its tokenizer is the base's
    assert_close(found.model(given), model(given).logits)
    again = checkpoint.load(tmp_path / "adapter", merge=False).model
    checkpoint.save(tmp_path / "ours", again, tokenizer)
    assert_close(reference(base, tmp_path / "ours")(given).logits, model(given).logits)


@torch.no_grad()
def test_a_reward_model(tmp_path: Path, tokenizer: Tokenizer) -> None:
    base = saved_base(tmp_path / "base", "qwen3", tokenizer)
    model, head = adapted(base), ScalarHead(family("qwen3").tiny())
    head.score.weight.data.normal_()
    checkpoint.save(tmp_path / "adapter", model, tokenizer, head=head)
    given = ids(tokenizer.vocab_size)
    found = checkpoint.load(tmp_path / "adapter")
    assert_close(found.head(found.model.hidden(given)), head(model.hidden(given)))
    kind = "AutoModelForSequenceClassification"
    theirs = reference(base, tmp_path / "adapter", kind, num_labels=1, pad_token_id=0)
    assert_close(theirs(given[:1]).logits.view(-1), head(model.hidden(given[:1]))[:, -1])


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(base: Path, tokenizer: Tokenizer) -> Path:
    """A saved adapter beside its base."""
    checkpoint.save(base.parent / "adapter", adapted(base), tokenizer)
    return base.parent / "adapter"


def rewritten(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_moved_run_finds_its_base(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    place = shutil.copytree(folder.parent, tmp_path_factory.mktemp("moved") / "run")
    shutil.rmtree(folder.parent)
    assert adaptation(checkpoint.load(place / "adapter", merge=False).model).base == (place / "base").resolve()
    assert checkpoint_folder(place / "adapter") == place / "adapter"


def spoil(folder: Path, name: str, tokenizer: Tokenizer) -> None:
    base = folder.parent / "base"
    if name == "no base":
        shutil.rmtree(base)
    elif name == "whole embedding":
        tensors = load_file(folder / "adapter_model.safetensors")
        table = checkpoint.load_model(base)[0].embedding.weight.detach()
        save_file({**tensors, "base_model.model.model.embed_tokens.weight": table}, folder / "adapter_model.safetensors")
    elif name == "its own base":
        (folder / "nestling.json").unlink()
        rewritten(folder, base_model_name_or_path=".")
    elif name == "another base":
        other = adapted(base)
        checkpoint.save(base, merge(other), tokenizer)
    elif name == "another size":
        (folder / "nestling.json").unlink()
        shutil.rmtree(base)
        saved_base(base, "qwen3", tokenizer, d_model=48)
    elif name == "another family":
        (folder / "nestling.json").unlink()
        shutil.rmtree(base)
        saved_base(base, "gpt2", tokenizer)
    elif name == "damaged":
        whole = (folder / "adapter_model.safetensors").read_bytes()
        (folder / "adapter_model.safetensors").write_bytes(whole[:99])
    elif name == "no weights":
        (folder / "adapter_model.safetensors").unlink()
    else:
        rewritten(folder, **json.loads(name))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no base", "the adapter's base model is not on this machine"),
        ("its own base", "the adapter's base model is not on this machine"),
        ("another base", "this adapter belongs to another base model"),
        ("another size", "this adapter does not fit its base model"),
        ("another family", "this adapter does not fit its base model"),
        ("damaged", "damaged weights"),
        ("no weights", "weights are missing"),
        ('{"use_dora": true}', "adapters with use_dora are not supported"),
        ('{"peft_type": "LOHA"}', "adapters with peft_type are not supported"),
        ('{"bias": "all"}', "adapters with bias are not supported"),
        ('{"target_parameters": ["mlp.experts.down_proj"]}', "adapters with target_parameters are not supported"),
        ('{"modules_to_save": ["norm"]}', "adapters with modules_to_save are not supported"),
        ("whole embedding", "trains the embedding apart from the output layer that shares it"),
        ('{"init_lora_weights": "pissa_niter_4"}', "this way of starting changes the base model too"),
        ('{"r": 0}', "rank: must be greater than or equal to 1"),
    ],
)
def test_what_is_refused(folder: Path, tokenizer: Tokenizer, name: str, words: str) -> None:
    spoil(folder, name, tokenizer)
    with pytest.raises(UserError, match=words) as caught:
        checkpoint.load(folder)
    assert "\n" not in str(caught.value)


def test_a_target_that_the_model_lacks(base: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(
        UserError, match=r"no such layers to adapt \(got 'gate'\); it has down, key, output, query, up, value"
    ):
        adapted(saved_base(tmp_path / "gpt2", "gpt2", tokenizer), targets=("query", "gate"))


def test_experts_are_not_dropped_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """PEFT refuses it too."""
    base = saved_base(tmp_path / "moe", "qwen3_moe", tokenizer)
    with pytest.raises(UserError, match=r"experts are adapted without dropout \(got 0.1\); use 0, or name targets"):
        adapted(base, dropout=0.1)
    assert adapted_layers(adapted(base, dropout=0.1, targets=("query",)))


def test_weights_are_written_in_full_precision(base: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Whatever the base's dtype."""
    model, _ = checkpoint.load_model(base, dtype=torch.bfloat16)
    adapt(model, Adaptation(AdapterSettings(), base), torch.Generator())
    assert model(ids(260)).dtype == torch.bfloat16
    checkpoint.save(tmp_path / "adapter", model, tokenizer)
    assert {t.dtype for t in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()} == {torch.float32}
