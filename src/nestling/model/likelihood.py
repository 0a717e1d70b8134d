"""Log-probabilities of tokens: computed here and nowhere else, so that sampling, scoring and losses agree.

    log p(y | h) = z_y / τ - log Σ_v exp(z_v / τ),   z = W h

All logits [B·T, V] of a batch are never held at once: the output layer is taken in chunks of tokens. A chunk's logits
are few enough to stay in the processor's cache, and the log-sum-exp is in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from nestling.model import kernels
from nestling.model.attention import compute_dtype
from nestling.model.decoder import Decoder

OnePass = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Logits [n, V], targets and weights [n] -> Σ weight · -log p(target) and its gradient [n, V] in the logits' dtype."""
CHUNK_LOGITS = 1 << 20
"""Logits of one chunk on a CPU; a GPU takes 64 times as many, since it wants large kernels."""


class Batch(Protocol):
    """What the loss reads of a batch: ids, targets [B, T] long, weights [B, T] float, positions and segments [B, T]."""

    @property
    def ids(self) -> Tensor:
        """[B, T] long."""

    @property
    def targets(self) -> Tensor:
        """[B, T] long."""

    @property
    def weights(self) -> Tensor:
        """[B, T] float."""

    @property
    def positions(self) -> Tensor:
        """[B, T] long."""

    @property
    def segments(self) -> Tensor:
        """[B, T] long."""


def next_token_loss_sum(model: Decoder, batch: Batch, *, chunk: int | None = None) -> Tensor:
    """Σ weight · -log p(target), a scalar in float32; divide it by the number of weighted tokens of the whole batch.

    Args:
        chunk: tokens per chunk of the output layer; chosen by the vocabulary when not given.
    """
    hidden = model.hidden(batch.ids, positions=batch.positions, segments=batch.segments)
    one_pass = _one_pass(model, hidden)
    return weighted_loss_sum(hidden, model.output_weight, batch.targets, batch.weights, chunk=chunk, one_pass=one_pass)


def token_logprobs(
    model: Decoder,
    ids: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    positions: Tensor | None = None,
    segments: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """log p(targets[b, t] | ids[b, ..t]) at a temperature, [B, T] float32, differentiable.

    Args:
        targets: [B, T] token ids; negative ones are not computed and give 0, which saves the output layer's time.
    """
    hidden = model.hidden(ids, positions=positions, segments=segments)
    return hidden_logprobs(hidden, model.output_weight, targets, temperature=temperature, chunk=chunk)


def logits_logprobs(logits: Tensor, tokens: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log p(token) where logits are at hand, as in decoding: logits [.., V], tokens [..] -> [..] float32."""
    scaled = logits.float() / temperature
    return scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)


def hidden_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, chunk: int | None = None
) -> Tensor:
    """`token_logprobs` from the decoder's output: hidden [.., D], weight [V, D], targets [..] -> [..] float32."""
    wanted = targets >= 0
    places = wanted.nonzero(as_tuple=True)  # once: a GPU is waited for
    dtype = compute_dtype(hidden)
    out = torch.zeros(targets.shape, device=hidden.device)
    chosen = hidden[places].to(dtype)  # [N, D]
    found = _Logprobs.apply(chosen, weight.to(dtype), targets[places], temperature, chunk)
    return out.masked_scatter(wanted, found)


def weighted_loss_sum(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, *, chunk: int | None = None,
    one_pass: OnePass | None = None,
) -> Tensor:  # fmt: skip
    """Σ weight · -log p(target) from the decoder's output; tokens of weight 0 are not computed.

    Args:
        one_pass: computes what lies between the products of a chunk, on which torch's single operations can take longer.
    """
    places = weights.nonzero(as_tuple=True)  # once: a GPU is waited for
    dtype = compute_dtype(hidden)
    chosen = (hidden[places].to(dtype), weight.to(dtype), targets[places], weights[places].float())
    return _LossSum.apply(*chosen, chunk, one_pass)


class _Logprobs(torch.autograd.Function):
    """Forward keeps one float per token; backward computes each chunk's logits again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk: int | None
    ) -> Tensor:
        logits = _Logits(hidden, weight, temperature, _chunk_size(weight, chunk))
        out = torch.empty(targets.shape, device=hidden.device)
        normaliser = torch.empty_like(out)
        for part in _parts(len(hidden), logits.rows):
            scaled = logits.of(part)
            chosen = scaled.gather(1, targets[part].unsqueeze(1)).squeeze(1)
            top = scaled.amax(1, keepdim=True)
            normaliser[part] = scaled.sub_(top).exp_().sum(1).log_() + top.squeeze(1)
            out[part] = chosen - normaliser[part]
        ctx.save_for_backward(hidden, weight, targets, normaliser)
        ctx.temperature, ctx.size = temperature, logits.rows
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normaliser = ctx.saved_tensors
        scale = gradients[0] / -ctx.temperature  # d -log p / d z = (p - onehot) / τ
        logits = _Logits(hidden, weight, ctx.temperature, ctx.size)
        total = _Gradients(logits, ctx.needs_input_grad[1])
        for part in _parts(len(hidden), ctx.size):
            p = logits.of(part).sub_(normaliser[part].unsqueeze(1)).exp_()
            total.add(part, p.mul_(scale[part].unsqueeze(1)), targets[part], scale[part])
        to_weight = None if total.weight is None else total.weight.to(weight.dtype)
        return total.hidden, to_weight, None, None, None


class _LossSum(torch.autograd.Function):
    """The loss is one number, so its gradient is known up to a factor already in the forward pass: each chunk's logits
    are computed once and used for both (three matrix products instead of four)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, chunk: int | None, one_pass: OnePass | None
    ) -> Tensor:
        loss = torch.zeros((), device=hidden.device)
        logits = _Logits(hidden, weight, 1.0, _chunk_size(weight, chunk))
        total = _Gradients(logits, ctx.needs_input_grad[1]) if any(ctx.needs_input_grad[:2]) else None
        for part in _parts(len(hidden), logits.rows):
            if one_pass is not None and total is not None:
                found, dz = one_pass(logits.rounded(part), targets[part], weights[part])
                loss += found
                total.through(part, dz)
                continue
            scaled, scale = logits.of(part), weights[part]
            scaled.sub_(scaled.amax(1, keepdim=True))
            chosen = scaled.gather(1, targets[part].unsqueeze(1)).squeeze(1)
            sums = scaled.exp_().sum(1)
            loss += ((sums.log() - chosen) * scale).sum()
            if total is not None:
                total.add(part, scaled.mul_((scale / sums).unsqueeze(1)), targets[part], scale)
        if total is not None:
            ctx.save_for_backward(total.hidden, total.weight)
            ctx.dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        to_hidden, to_weight = ctx.saved_tensors
        factor = gradients[0]
        weight = None if to_weight is None else (to_weight * factor).to(ctx.dtype)
        return to_hidden * factor.to(to_hidden.dtype), weight, None, None, None, None


def _one_pass(model: Decoder, hidden: Tensor) -> OnePass | None:
    """On a GPU what a compiler makes of it, on a CPU native code where the model's attention is native too."""
    if hidden.device.type == "cuda":
        return _compiled() if model.compiled else None
    native = kernels.serve(model.config, hidden.device, compute_dtype(hidden))
    return kernels.loss_and_gradient if native else None


@cache
def _compiled() -> OnePass:
    return torch.compile(_loss_and_gradient)


def _loss_and_gradient(logits: Tensor, targets: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Σ scale · -log p(target) of logits [n, V], and its gradient dz = scale · (p - onehot) in their dtype.

    The same as the loop of `_LossSum` computes in place, in a form that a compiler makes two kernels of.
    """
    wide = logits.float()
    normaliser = wide.logsumexp(1, keepdim=True)
    hit = targets.unsqueeze(1) == torch.arange(wide.shape[1], device=wide.device)
    loss = (normaliser - wide.gather(1, targets.unsqueeze(1))).squeeze(1) * scale
    dz = ((wide - normaliser).exp() - hit.float()) * scale.unsqueeze(1)
    return loss.sum(), dz.to(logits.dtype)


class _Logits:
    """Logits / τ of `rows` tokens at a time, [n, V] float32. Each chunk overwrites the last: fresh memory costs more time
    than what is computed in it."""

    def __init__(self, hidden: Tensor, weight: Tensor, temperature: float, rows: int) -> None:
        self.hidden, self.weight, self.temperature = hidden, weight, temperature
        self.rows = min(rows, max(1, len(hidden)))
        self.products = hidden.new_empty(self.rows, weight.shape[0])

    @cached_property
    def wide(self) -> Tensor:
        """Room for a chunk in float32."""
        return self.products.float()

    def rounded(self, part: slice) -> Tensor:
        """The chunk's logits before division by τ, as the product gives them."""
        hidden = self.hidden[part]
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.mm(hidden, self.weight.T, out=self.products[: len(hidden)])

    def of(self, part: slice) -> Tensor:
        """The chunk's logits, the caller's to overwrite."""
        products = self.rounded(part)
        wide = self.wide[: len(products)].copy_(products)
        return wide if self.temperature == 1.0 else wide.div_(self.temperature)


class _Gradients:
    """Gradients of the output layer, filled chunk by chunk: for `hidden` [N, D] in its own dtype, for the weight [V, D]
    in float32, since all chunks add to it; a frozen weight has none."""

    def __init__(self, logits: _Logits, learnt: bool) -> None:
        self.logits = logits
        self.hidden = torch.empty_like(logits.hidden)
        self.weight = torch.zeros_like(logits.weight, dtype=torch.float32) if learnt else None
        self.share = torch.empty_like(logits.weight) if learnt else None

    def add(self, part: slice, p: Tensor, targets: Tensor, scale: Tensor) -> None:
        """One chunk of Σ scale · -log p(target): dz = scale · (p - onehot). `p` [n, V] holds scale · p and is used up."""
        p.scatter_add_(1, targets.unsqueeze(1), -scale.unsqueeze(1))
        self.through(part, self.logits.products[: len(p)].copy_(p))

    def through(self, part: slice, dz: Tensor) -> None:
        """The same from dz [n, V]."""
        hidden = self.logits.hidden[part]
        with torch.autocast(hidden.device.type, enabled=False):
            torch.mm(dz, self.logits.weight, out=self.hidden[part])
            if self.weight is not None:
                self.weight += torch.mm(dz.T, hidden, out=self.share)


def _parts(total: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, total, size))


def _chunk_size(weight: Tensor, chunk: int | None) -> int:
    limit = CHUNK_LOGITS if weight.device.type == "cpu" else 64 * CHUNK_LOGITS
    return chunk or max(16, limit // weight.shape[0])
