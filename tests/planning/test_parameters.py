"""Counts from configurations alone: equal to what is built, and to what was published."""

from __future__ import annotations

from typing import Any

import pytest

from nestling.core import registry
from nestling.model.config import DecoderConfig
from nestling.model.decoder import Decoder
from nestling.model.hub import make_config
from nestling.planning.parameters import count_parameters
from nestling.training.parameters import hidden_names

NAMES = registry.names("model.architectures")
CHANGES: list[dict[str, Any]] = [
    {},
    {"tied": True},
    {"tied": False},
    {"bias": True},
    {"bias": False},
    {"qkv_bias": True, "n_kv_heads": 1},
    {"norm": "layer"},
    {"norm": "rms", "qk_norm": True},
    {"block": "post"},
    {"gated": False, "d_ff": 40},
    {"gated": True, "d_ff": None},
    {"positions": "learned"},
    {"positions": "alibi"},
]
GPT2: dict[str, Any] = {"architecture": "gpt2", "vocab_size": 50257, "context": 1024}
LLAMA: dict[str, Any] = {"architecture": "llama", "vocab_size": 32000, "context": 2048}
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    # Exact counts of the published checkpoints; the first papers gave 117M, 345M and 762M, which is too few.
    "gpt2": ({**GPT2, "d_model": 768, "n_layers": 12, "n_heads": 12}, 124_439_808),
    "gpt2-medium": ({**GPT2, "d_model": 1024, "n_layers": 24, "n_heads": 16}, 354_823_168),
    "gpt2-large": ({**GPT2, "d_model": 1280, "n_layers": 36, "n_heads": 20}, 774_030_080),
    "gpt2-xl": ({**GPT2, "d_model": 1600, "n_layers": 48, "n_heads": 25}, 1_557_611_200),
    "gpt3": ({**GPT2, "context": 2048, "d_model": 12288, "n_layers": 96, "n_heads": 96}, 174_604_259_328),
    "gpt1": (
        {"architecture": "gpt1", "vocab_size": 40478, "context": 512, "d_model": 768, "n_layers": 12, "n_heads": 12},
        116_534_784,
    ),
    "llama-7b": ({**LLAMA, "d_model": 4096, "n_layers": 32, "n_heads": 32, "d_ff": 11008}, 6_738_415_616),
    "llama-13b": ({**LLAMA, "d_model": 5120, "n_layers": 40, "n_heads": 40, "d_ff": 13824}, 13_015_864_320),
    "llama-33b": ({**LLAMA, "d_model": 6656, "n_layers": 60, "n_heads": 52, "d_ff": 17920}, 32_528_943_616),
    "llama-65b": ({**LLAMA, "d_model": 8192, "n_layers": 80, "n_heads": 64, "d_ff": 22016}, 65_285_660_672),
    "llama-3-8b": (
        {**LLAMA, "vocab_size": 128256, "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "d_ff": 14336},
        8_030_261_248,
    ),
    "qwen3-0.6b": (
        {"architecture": "qwen3", "vocab_size": 151936, "d_model": 1024, "n_layers": 28, "n_heads": 16, "n_kv_heads": 8,
         "head_size": 128, "d_ff": 3072},
        596_049_920,
    ),
}  # fmt: skip


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_planners_count_is_the_real_count(name: str, changes: dict[str, Any]) -> None:
    config: DecoderConfig = registry.find("model.architectures", name).tiny().with_(**changes)
    model, counted = Decoder(config), count_parameters(config)
    sizes = {path: p.numel() for path, p in model.named_parameters()}
    hidden = {path.removeprefix("m.") for path in hidden_names({"m": model})}
    assert counted.total == sum(sizes.values())
    assert counted.hidden == sum(size for path, size in sizes.items() if path in hidden)
    parts = {
        "embedding": lambda path: path == "embedding.weight",
        "positions": lambda path: path.startswith("positions."),
        "norms": lambda path: "norm" in path,
        "attention": lambda path: ".attention." in path and "norm" not in path,
        "head": lambda path: path == "head.weight",
    }
    for part, belongs in parts.items():
        assert getattr(counted, part) == sum(size for path, size in sizes.items() if belongs(path)), part


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_published_number_of_weights(name: str) -> None:
    sizes, published = PUBLISHED[name]
    assert count_parameters(make_config(sizes)).total == published


def test_of_a_model_with_experts_a_token_uses_few() -> None:
    """Qwen3-30B-A3B: 30.5 B weights (29.9 B without embeddings), 3.3 B active, says its card; cut off, not rounded."""
    experts = {"count": 128, "per_token": 8, "d_ff": 768}
    sizes: dict[str, Any] = {"architecture": "qwen3_moe", "vocab_size": 151936, "d_model": 2048, "n_layers": 48, "tied": False}
    counted = count_parameters(make_config({**sizes, "n_heads": 32, "n_kv_heads": 4, "head_size": 128, "experts": experts}))
    assert counted.total == 30_532_122_624
    assert round((counted.total - counted.embedding - counted.head) / 1e9, 1) == 29.9
    assert 3.3e9 <= counted.active < 3.4e9


def test_the_count_of_the_textbooks() -> None:
    """l (12 h² + 13 h) + V h, positions and the last norm beside it, for a GPT with biases."""
    h, layers, vocabulary, context = 64, 3, 500, 32
    config = make_config({**GPT2, "vocab_size": vocabulary, "context": context, "d_model": h, "n_layers": layers, "n_heads": 4})
    counted = count_parameters(config)
    assert counted.total - counted.positions == layers * (12 * h * h + 13 * h) + vocabulary * h + 2 * h
