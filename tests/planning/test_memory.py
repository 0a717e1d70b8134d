"""Memory: the published accounting, what autograd really keeps, and the peak of real training in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nestling.core import registry
from nestling.model.adapters import Adaptation, AdapterSettings, adapt
from nestling.model.decoder import Decoder
from nestling.model.experts import FINENESS
from nestling.model.hub import make_config
from nestling.planning.activations import Microbatch, activations
from nestling.planning.flops import flops_per_token
from nestling.planning.memory import (
    ADAMW,
    FRESH,
    KERNEL,
    WASTE,
    Learning,
    Memory,
    Weights,
    cache_memory,
    training_memory,
)
from nestling.planning.work import Work

SIZES: dict[str, Any] = {"vocab_size": 512, "context": 64, "d_model": 64, "n_layers": 3, "n_heads": 4}
TOLERANCE = 0.15


def learning(rows: int = 2, dtype: torch.dtype = torch.bfloat16, **how: Any) -> Learning:
    return Learning(Microbatch(rows, 64, dtype), ADAMW, **how)


def test_mixed_precision_with_adamw_takes_20_bytes_per_weight() -> None:
    """(2 + 4) + (2 + 4) + (4 + 4), where gradients of several microbatches are summed in full precision."""
    config = make_config(SIZES)
    weights = Weights.of(config)
    memory = training_memory(config, learning(pieces=2))
    assert memory.weights + memory.gradients + memory.states == 20 * weights.all
    assert training_memory(config, learning()).gradients == 4 * weights.all
    full = training_memory(config, learning(dtype=torch.float32))
    assert full.weights + full.gradients + full.states == 16 * weights.all


def test_keys_and_values_take_4bslh_bytes() -> None:
    config = make_config(SIZES)
    b, s, layers, h = 3, config.context, config.n_layers, config.d_model
    assert cache_memory(config, b) == 4 * b * s * layers * h
    grouped = make_config({**SIZES, "n_kv_heads": 1})
    assert cache_memory(grouped, b) == cache_memory(config, b) / 4


def test_weights_that_do_not_learn_have_no_gradient_and_no_state() -> None:
    config = make_config(SIZES)
    memory = training_memory(config, learning(), Weights(all=1000, learnt=10, hidden=10))
    assert (memory.gradients, memory.states) == (40, 80)


def test_the_worst_moment_is_not_the_sum() -> None:
    moments = Memory(weights=10, states=5, gradients=30, scratch=10, activations=35)
    assert moments.peak == 15 + 40
    assert (moments + Memory(activations=10)).peak == 15 + 45
    assert (moments + Memory(heap=True)).peak == 15 + int(WASTE * 35 + FRESH * 30) + 10


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", registry.names("model.architectures"))
def test_a_rehearsal_finds_what_autograd_keeps(name: str, dtype: torch.dtype, packed: bool) -> None:
    """Against the distinct storages that a real forward pass hands to autograd: the weights' aside."""
    config = registry.find("model.architectures", name).tiny().with_(n_layers=4)
    found = activations(config, Microbatch(8, 32, dtype, packed=packed))
    assert found.kept == pytest.approx(saved(config, 8, 32, dtype, packed), rel=0.1)
    assert 0 < found.passing < found.kept


@pytest.mark.parametrize("targets", [(), ("query", "value")])
@pytest.mark.parametrize("name", ["gpt2", "qwen3", "qwen3_moe"])
def test_adapters_are_counted_and_rehearsed(name: str, targets: tuple[Any, ...]) -> None:
    config = registry.find("model.architectures", name).tiny().with_(n_layers=8)
    settings = AdapterSettings(rank=8, targets=targets)
    model = Decoder(config)
    adapt(model, Adaptation(settings, Path()))
    learnt = [p for p in model.parameters() if p.requires_grad]
    counts = Weights.of(config, settings)
    assert counts.all == model.parameter_count()
    assert counts.learnt == sum(p.numel() for p in learnt) > 0
    assert counts.hidden == sum(p.numel() for p in learnt if p.ndim == 2)
    found = activations(config, Microbatch(8, 32), adapters=settings)
    assert found.kept == pytest.approx(saved(config, 8, 32, torch.float32, False, settings), rel=0.12)
    memory = training_memory(config, Learning(Microbatch(8, 32, torch.bfloat16), ADAMW, adapters=settings))
    assert memory.weights == 2 * counts.all + 4 * counts.learnt
    assert memory.states == 8 * counts.learnt


def test_frozen_weights_cost_a_product_less() -> None:
    config = make_config(SIZES)
    whole = Work((config,), steps=1, sequences=1, width=64)
    settings = AdapterSettings(rank=1, targets=("query",))
    counted, added = flops_per_token(config, 64), Weights.of(config, settings).learnt
    saving = 64 * (counted.projections + counted.feed_forward + counted.logits - 6 * added)
    assert whole.flops() - replace(whole, adapters=settings).flops() == saving


def saved(
    config: Any, rows: int, width: int, dtype: torch.dtype, packed: bool, adapters: AdapterSettings | None = None
) -> int:
    model = Decoder(config).train()
    if adapters:
        adapt(model, Adaptation(adapters, Path()))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.zeros(rows, width, dtype=torch.long)
    where = {"positions": ids, "segments": ids} if packed else {}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.hidden(ids, **where)
    kept[hidden.untyped_storage().data_ptr()] = hidden.untyped_storage()
    return sum(storage.nbytes() for storage in kept.values())


def test_recomputing_keeps_the_inputs_of_the_blocks_only() -> None:
    config = make_config({**SIZES, "n_layers": 12})
    batch = Microbatch(8, 64)
    plain, again = activations(config, batch), activations(config, batch, recompute=True)
    inputs = 12 * 8 * 64 * 64 * 4
    assert inputs <= again.kept < inputs + plain.kept / 12
    assert again.kept + again.passing < 0.35 * (plain.kept + plain.passing)


def test_activations_grow_with_rows_and_layers_alone() -> None:
    one, two, three = (activations(make_config(SIZES), Microbatch(rows, 64)).kept for rows in (4, 8, 12))
    assert three - two == pytest.approx(two - one, rel=0.02)
    assert two == pytest.approx(2 * one, rel=0.06), "what does not grow is small: buffers that all chunks of the loss share"
    double = activations(make_config({**SIZES, "n_layers": 6}), Microbatch(4, 64)).kept
    assert double == pytest.approx(2 * one, rel=0.1)


def test_layers_of_two_kinds_are_rehearsed_apart() -> None:
    tiny = registry.find("model.architectures", "qwen3_moe").tiny()
    batch = Microbatch(4, 32)
    all_sparse = {**tiny.experts.model_dump(), "dense_layers": ()}
    dense, sparse = (activations(tiny.with_(experts=experts), batch).kept for experts in (None, all_sparse))
    mixed = activations(tiny, batch).kept  # one dense layer, two sparse ones
    assert mixed == pytest.approx(dense / 3 + sparse * 2 / 3, rel=0.03)


@pytest.mark.parametrize(
    "how",
    [
        {"optimizer": "adamw"},
        {"optimizer": "muon", "recompute": "blocks"},
        {"optimizer": "adamw", "adapters": {"rank": 8, "targets": ["query", "value"]}},
        {"optimizer": "adamw", "rankings": True, "rows": 3},
    ],
)
def test_the_predicted_peak_is_the_measured_one(how: dict[str, Any]) -> None:
    """In a process whose tensors have pages of their own, so that it is tensors that are measured and not a heap."""
    script = Path(__file__).parents[2] / "benchmarks" / "memory.py"
    sizes = {"d_model": 192, "n_layers": 4, "n_heads": 4, "vocab_size": 1024, "context": 128}
    job = {"model": sizes, "rows": 8, "precision": "fp32", "pages": True, **how}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, "--one", json.dumps(job)], check=True, capture_output=True, text=True, env=environment
    )
    row = json.loads(done.stdout.splitlines()[-1])
    tolerance = 0.2 if "adapters" in how else TOLERANCE  # of which the output layer's buffers are a good part
    assert row["predicted"] == pytest.approx(row["measured"], rel=tolerance), row


def test_experts_compile_kernels_on_a_cpu_in_bf16_alone() -> None:
    tiny = registry.find("model.architectures", "qwen3_moe").tiny().with_(context=64)
    assert training_memory(tiny, learning()).kernels == KERNEL * 3 * FINENESS * 6
    assert training_memory(tiny, learning(adapters=AdapterSettings(rank=2))).kernels == KERNEL * 3 * FINENESS * 16
    assert training_memory(tiny, learning(dtype=torch.float32)).kernels == 0
    assert training_memory(make_config(SIZES), learning()).kernels == 0
    assert Memory(weights=10, kernels=5).peak == 15
