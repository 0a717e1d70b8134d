"""Causal attention and the loss's gradient in native code (`kernels.cpp`), for training in bfloat16 on a CPU.

One rule, `serve`, says where they take the place of torch's operations: a processor that multiplies pairs of bfloat16 and has
no matrix units (AMX), on which torch's products would be faster, a C++ compiler, and a decoder whose attention they know. On one
machine it is always the same answer.
"""

from __future__ import annotations

from ctypes import c_int64, c_void_p
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nestling.core.native import compiled
from nestling.model.config import DecoderConfig

LANES = 16
FIELDS = 17
"""Of `Call` in the source, each a number or an address of 8 bytes."""


class Sight(NamedTuple):
    """Who sees whom in rows of tokens: each its past and itself, of its own segment [B, T] int32 and no further back than
    `window` tokens, itself among them, where there are any."""

    segments: Tensor | None
    window: int | None


@cache
def able() -> bool:
    """Whether this machine computes, and computes faster, with these."""
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16") and not known.get("amx_bf16") and (library := _library()) and library.able())


def serve(config: DecoderConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether they compute in this dtype on this device, and all that this decoder asks of attention in training."""
    known = not config.dropout and config.head % LANES == 0 and config.positions != "alibi"
    return known and device.type == "cpu" and dtype == torch.bfloat16 and able()


def attend(q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> Tensor:
    """softmax(q kᵀ / √K) v over what is seen: q [B, T, H, K], k and v [B, T, H_kv, K] -> [B, T, H, K] bfloat16.

    K is a multiple of 16. Scores and sums are float32 and never leave a core's cache.
    """
    mixed: Tensor = _attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), sight.segments, sight.window or 0)[0]
    return mixed


def loss_and_gradient(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Σ weight · -log softmax(logits)[target] of logits [n, V] bfloat16, and its gradient, which takes their place."""
    losses = torch.empty(len(logits))
    pointers = (c_void_p(x.data_ptr()) for x in (logits, targets, weights, losses))
    _library().losses(*map(c_int64, (torch.get_num_threads(), *logits.shape)), *pointers)
    return losses.sum(), logits


@torch.library.custom_op("nestling::attend", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, window: int) -> tuple[Tensor, Tensor]:
    """What is mixed, and log2 Σ 2^score of each query [B, H, T]."""
    out, logs = _like(q, k, v, segments, window)
    _call(segments, window, logs, False, q, k, v, out)
    return out, logs


@_attend.register_fake
def _like(q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, window: int) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q[..., 0].mT.shape, dtype=torch.float32)


@torch.library.custom_op("nestling::attend_backward", mutates_args=())
def _reverse(heads: list[Tensor], segments: Tensor | None, window: int, logs: Tensor, d_out: Tensor) -> list[Tensor]:
    """Gradients of q, k and v, the first three of `heads`; the fourth is what was mixed."""
    gradients = _gradients_like(heads)
    _call(segments, window, logs, True, *heads, d_out, *gradients)
    return gradients


@_reverse.register_fake
def _gradients_like(heads: list[Tensor], *_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in heads[:3]]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)


@partial(_attend.register_autograd, setup_context=_keep)
def _differentiate(ctx: Any, d_out: Tensor, d_logs: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, segments, out, logs = ctx.saved_tensors
    return (*_reverse([q, k, v, out], segments, ctx.window, logs, d_out), None, None)


def _call(segments: Tensor | None, window: int, logs: Tensor, back: bool, *heads: Tensor) -> None:
    """One pass over tensors [B, T, H or H_kv, K], the last of which it fills."""
    (b, t, h, size), groups = heads[0].shape, heads[1].shape[2]
    tensors = [None if x is None else x.contiguous() for x in (segments, logs, *heads)]
    addresses = (0 if x is None else x.data_ptr() for x in tensors)
    call = (c_int64 * FIELDS)(b, t, h, groups, size, torch.get_num_threads(), window, *addresses)
    _library().attend(call, c_int64(back))


def _library() -> Any:
    return compiled(Path(__file__).with_suffix(".cpp"))
