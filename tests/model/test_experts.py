"""Experts against transformers' Qwen3-MoE and against an obvious loop."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from nestling.core.errors import UserError
from nestling.model import experts
from nestling.model.architectures import qwen3_moe
from nestling.model.config import DecoderConfig, Experts
from nestling.model.decoder import Decoder, build
from nestling.model.experts import (
    GatedExperts,
    active_share,
    balance_loss,
    by_expert,
    grouped_linear,
    one_by_one,
    route,
)
from nestling.model.hub import make_config


def config(**changes: Any) -> DecoderConfig:
    return qwen3_moe.tiny().with_(experts=Experts(**{"count": 4, "per_token": 2, "d_ff": 24, **changes}))


def scrambled(settings: DecoderConfig) -> Decoder:
    model = build(settings)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data.normal_(0.1, 0.2, generator=generator)
    return model


def slow_experts(layer: GatedExperts, x: Tensor) -> Tensor:
    """Every expert computes every token, and a token takes what it chose."""
    probabilities = layer.router(x).softmax(-1)
    smallest = probabilities.topk(layer.config.per_token).values[..., -1:]
    kept = probabilities * (probabilities >= smallest)
    if layer.config.normalised:
        kept = kept / kept.sum(-1, keepdim=True)
    every = [
        (layer.activation(x @ gate.T) * (x @ up.T)) @ down.T
        for gate, up, down in zip(layer.gate.weight, layer.up.weight, layer.down.weight, strict=True)
    ]
    return sum(kept[..., n, None] * one for n, one in enumerate(every))  # type: ignore[return-value]


@pytest.mark.parametrize("changes", [{}, {"normalised": False}, {"count": 7, "per_token": 3}, {"per_token": 1}])
def test_sorted_experts_equal_the_obvious_loop_forward_and_backward(changes: dict[str, Any]) -> None:
    layer = scrambled(config(**changes)).blocks[0].feed_forward
    grads = []
    for function in (layer, lambda x: slow_experts(layer, x)):
        x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out = function(x)
        wanted = torch.autograd.grad((out * out.detach().cos()).sum(), [x, *layer.parameters()])
        grads.append((out, *wanted))
    for ours, slow in zip(*grads, strict=True):
        torch.testing.assert_close(ours, slow, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_grouped_kernel_is_a_product_per_expert_also_where_one_has_no_tokens(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(3, 8, 16, generator=generator).to(dtype).requires_grad_()
    counts = torch.tensor([2, 0, 4])
    assert experts._has_grouped_kernel(x, weight)
    found = []
    for function in (grouped_linear, one_by_one):
        out = function(x, weight, counts)
        found.append((out, *torch.autograd.grad((out * out.detach()).sum(), [x, weight])))
    for kernel, slow in zip(*found, strict=True):
        torch.testing.assert_close(kernel, slow)
    assert (found[0][2][1] == 0).all()


@pytest.mark.parametrize("per_token", [1, 2, 3])
def test_the_balance_loss_is_the_one_of_transformers(per_token: int) -> None:
    transformers = pytest.importorskip("transformers")
    settings = config(per_token=per_token)
    ours = scrambled(settings)
    theirs = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**qwen3_moe.to_hub(settings)))
    theirs.load_state_dict(fused(ours, theirs))
    ids = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    for valid in (None, mask.bool()):
        hidden = ours.hidden(ids)
        got = balance_loss(ours, valid)
        expected = theirs(ids, attention_mask=None if valid is None else mask, output_router_logits=True).aux_loss
        torch.testing.assert_close(hidden, theirs.model(ids).last_hidden_state, rtol=0, atol=1e-5)
        torch.testing.assert_close(got.double(), expected.double(), rtol=1e-4, atol=0)
        assert got > per_token - 1e-3
    got.backward()
    routers = [block.feed_forward.router.weight.grad for block in ours.blocks]
    assert all(grad.abs().max() > 0 for grad in routers)


def fused(ours: Decoder, theirs: Any) -> dict[str, Tensor]:
    """Our weights under the names of their class in memory, which joins gate and up of all experts."""
    state = qwen3_moe.export_weights(ours.state_dict(), ours.config)
    for layer, block in enumerate(ours.blocks):
        part = block.feed_forward
        name = f"model.layers.{layer}.mlp.experts"
        state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
        state[f"{name}.gate_up_proj"] = torch.cat([part.gate.weight, part.up.weight], 1)
        state[f"{name}.down_proj"] = part.down.weight
    return {"lm_head.weight": state["model.embed_tokens.weight"], **state}


def test_equally_busy_experts_cost_as_many_as_a_token_uses() -> None:
    model = build(config(count=4, per_token=2))
    for block in model.blocks:
        block.feed_forward.router.weight.data.zero_()
    model(torch.zeros(1, 4, dtype=torch.long))
    assert balance_loss(model).item() == pytest.approx(2.0)


def test_a_dense_model_has_nothing_to_balance() -> None:
    model = build(DecoderConfig(vocab_size=10, d_model=32, n_layers=1))
    with pytest.raises(UserError, match="no experts"):
        balance_loss(model)


def test_a_token_is_multiplied_with_its_share_of_the_experts() -> None:
    model = build(config(count=4, per_token=1))
    shares = {name: active_share(parameter, model) for name, parameter in model.named_parameters()}
    assert {share for name, share in shares.items() if name.endswith(("gate.weight", "up.weight", "down.weight"))} == {0.25}
    assert shares["blocks.0.feed_forward.router.weight"] == shares["blocks.0.attention.query.weight"] == 1.0


def test_more_experts_per_token_than_there_are() -> None:
    sizes = {"architecture": "qwen3_moe", "experts": {"count": 2, "per_token": 3, "d_ff": 8}}
    with pytest.raises(UserError, match="more experts per token"):
        make_config(sizes)


def test_rows_by_expert_are_few_numbers_and_every_choice_has_a_place_of_its_own() -> None:
    generator = torch.Generator().manual_seed(4)
    for skew in (0.0, 1.0, 9.0):
        logits = torch.randn(200, 6, generator=generator) + skew * torch.arange(6)
        _, chosen = route(logits, 3, normalised=True)
        places, counts, rows = by_expert(chosen, 6, step=8)
        assert (counts % 8 == 0).all()
        assert counts.sum() == rows == (6 + (600 - 6) // 8) * 8
        assert len(places.unique()) == 600
        owners = torch.arange(6).repeat_interleave(counts)
        assert torch.equal(owners[places], chosen)


def test_rows_of_nobody_change_neither_outputs_nor_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = scrambled(config()).blocks[0].feed_forward.to(torch.bfloat16)
    seen: list[Tensor] = []
    real = experts.by_expert

    def spied(chosen: Tensor, count: int, step: int = 1) -> Any:
        found = real(chosen, count, step)
        seen.append(found[1])
        return found

    monkeypatch.setattr(experts, "by_expert", spied)
    x = torch.randn(2, 256, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    grads = []
    for fineness in (16, 10**9):
        monkeypatch.setattr(experts, "FINENESS", fineness)
        inputs = x.clone().requires_grad_()
        out = layer(inputs)
        grads.append((out, *torch.autograd.grad(out.square().sum(), [inputs, *layer.parameters()])))
    assert (seen[0] % 16 == 0).all(), "256 choices an expert"
    assert seen[0].sum() > seen[1].sum() == 1024
    for padded, ragged in zip(*grads, strict=True):
        torch.testing.assert_close(padded, ragged, rtol=0.02, atol=0.02 * ragged.detach().abs().max().item())


def test_ragged_numbers_of_rows_leave_few_kernels_behind() -> None:
    """In bf16 on a CPU each new number of rows used to cost about half a megabyte for each product, for ever."""
    script = """
import torch
from nestling.core.machine import held_memory
from nestling.core.runtime import detect
from nestling.model.architectures import qwen3_moe
from nestling.model.config import Experts
from nestling.model.decoder import build
cpu = detect("cpu", threads=1).device
config = qwen3_moe.tiny().with_(d_model=64, experts=Experts(count=8, per_token=2, d_ff=64))
layer = build(config).blocks[-1].feed_forward.bfloat16()
def steps(count):
    for _ in range(count):
        torch.nn.init.normal_(layer.router.weight, std=0.02)
        layer(torch.randn(1, 2048, 64).bfloat16()).float().square().sum().backward()
steps(1)
held = held_memory(cpu)
steps(25)
print((held_memory(cpu) - held) / 1e6)
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert float(done.stdout) < 120
