"""The dial: sizes and rates of a depth, what is named beside it, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nestling.core.config import parse
from nestling.core.errors import UserError
from nestling.model.decoder import build
from nestling.model.depth import rates
from nestling.model.hub import make_config
from nestling.stages import pretrain


@pytest.mark.parametrize("depth", [1, 2, 6, 20])
def test_a_depth_is_three_sizes(depth: int) -> None:
    config = make_config({"depth": depth})
    assert (config.n_layers, config.d_model, config.n_heads, config.head) == (depth, 64 * depth, depth, 64)
    assert config.with_(context=64).d_model == 64 * depth  # nothing of the dial is left in the model


@pytest.mark.parametrize(
    ("beside", "sizes"),
    [
        ({"n_layers": 9}, (9, 256, 4)),
        ({"d_model": 192}, (4, 192, 3)),
        ({"n_heads": 8}, (4, 256, 8)),
        ({"head_size": 32}, (4, 256, 8)),
        ({"architecture": "gpt2", "d_model": 128, "n_heads": 4}, (4, 128, 4)),
    ],
)
def test_what_is_named_beside_it_wins(beside: dict[str, Any], sizes: tuple[int, int, int]) -> None:
    config = make_config({"depth": 4, **beside})
    assert (config.n_layers, config.d_model, config.n_heads) == sizes


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"depth": 0}, r"pretrain\.depth: the number of layers is a whole number from 1 \(got 0\)"),
        ({"depth": "six"}, r"whole number from 1 \(got 'six'\)"),
        ({"depth": 6, "d_model": "wide"}, r"d_model: sizes are whole numbers from 1 \(got 'wide'\)"),
        ({"depth": 6, "d_model": 256, "n_layers": 4, "n_heads": 4}, "depth has nothing left to set"),
    ],
)
def test_what_is_refused(model: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse(pretrain.Settings, {"model": model, "training": {"steps": 10}}, "pretrain")


def settings(**training: Any) -> pretrain.Settings:
    return parse(pretrain.Settings, {"model": {"depth": 4}, "training": {"steps": 10, **training}}, "pretrain")


def test_a_depth_sets_the_rates_that_nobody_named() -> None:
    found = settings().training
    assert {"learning_rate": found.learning_rate, "adam_learning_rate": found.adam_learning_rate} == rates(256)
    assert settings(adam_learning_rate=0.5).training.adam_learning_rate == 0.5
    assert settings(learning_rate=0.5).training.learning_rate == 0.5
    assert settings(learning_rate=0.5).training.adam_learning_rate == rates(256)["adam_learning_rate"]
    plain = parse(pretrain.Settings, {"training": {"steps": 10}}, "pretrain").training
    assert plain.adam_learning_rate is None


def test_other_optimisers_are_told_their_rate() -> None:
    with pytest.raises(UserError, match=r"the rates of muon only \(got 'adamw'\); set training.learning_rate"):
        settings(optimizer="adamw")
    assert settings(optimizer="adamw", learning_rate=0.001).training.adam_learning_rate is None


@torch.no_grad()
def test_signals_keep_their_size_whatever_the_depth() -> None:
    """At the start queries and the inner feed-forward are of unit size, and the blocks leave the stream as it is."""
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    for depth in (1, 4, 8):
        model = build(make_config({"depth": depth, "vocab_size": 64, "context": 16, "qk_norm": False}))
        block = model.blocks[0]
        inner = block.attention.query(block.attention_norm(model.embedding(ids)))
        assert 0.8 < float(inner.square().mean().sqrt()) < 1.2
        torch.testing.assert_close(model.hidden(ids), model.norm(model.embedding(ids)))
