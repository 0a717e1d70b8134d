"""A feed-forward of many experts, of which each token uses a few: more weights for the same work per token.

    y = Σ_{e in top-k} p_e · Expert_e(x),   p = softmax(router(x))              (Shazeer et al., 2017; Qwen3-MoE)

Tokens are sorted by expert, so that each expert is one matrix product over its own tokens and no token is dropped. On a
CPU rows of zeros between them make the products' sizes few: see `by_expert`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.core.errors import UserError
from nestling.model.config import DecoderConfig
from nestling.model.feed_forward import ACTIVATIONS

FINENESS = 16
"""A CPU's products in bf16 take numbers of rows in steps of a 16th to a 32nd of what an expert has on average. oneDNN
compiles a kernel for each number and keeps a thousand of them, 0.45 MB each: ragged numbers cost half a gigabyte, and more
time for compiling, again and again, than the rows of zeros, about 1 in 20, take to multiply."""


class StackedLinear(nn.Module):
    """E linear layers without biases as one tensor [E, out, in]."""

    def __init__(self, count: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.zeros(count, out_features, in_features))

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x [N, in] sorted by layer, of which counts [E] belong to each -> [N, out]."""
        return grouped_linear(x, self.weight, counts)


class GatedExperts(nn.Module):
    """The router and its experts, each down(act(gate(x)) · up(x)).

    After a forward pass with gradient, `logits` [N, E] holds what the router said of each token: see `balance_loss`.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        assert config.experts is not None
        self.config = config.experts
        count, width = self.config.count, self.config.d_ff
        self.router = nn.Linear(config.d_model, count, bias=False)
        self.gate = StackedLinear(count, config.d_model, width)
        self.up = StackedLinear(count, config.d_model, width)
        self.down = StackedLinear(count, width, config.d_model)
        self.activation = ACTIVATIONS[config.activation]
        self.logits: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        tokens = x.reshape(-1, x.shape[-1])  # [N, D]
        logits = self.router(tokens)
        self.logits = logits if torch.is_grad_enabled() else None
        share, chosen = route(logits, self.config.per_token, self.config.normalised)  # [N, k]
        compiled = x.device.type == "cpu" and x.dtype == torch.bfloat16  # in float32 MKL's kernels are ready
        most = chosen.numel() // (FINENESS * self.config.count) if compiled else 1
        places, counts, rows = by_expert(chosen, self.config.count, step=1 << max(most.bit_length() - 1, 0))
        inputs = tokens.new_zeros(rows, tokens.shape[1])  # [R, D]
        inputs[places] = tokens.unsqueeze(1)
        outputs = self.down(self.activation(self.gate(inputs, counts)) * self.up(inputs, counts), counts)
        return (outputs[places] * share.unsqueeze(-1)).sum(1).view_as(x)


def route(logits: Tensor, per_token: int, normalised: bool) -> tuple[Tensor, Tensor]:
    """The experts of each token: router logits [N, E] -> (weights [N, k] in their dtype, numbers [N, k])."""
    share, chosen = logits.float().softmax(-1).topk(per_token, dim=-1)
    if normalised:
        share = share / share.sum(-1, keepdim=True)
    return share.to(logits.dtype), chosen


def by_expert(chosen: Tensor, count: int, step: int = 1) -> tuple[Tensor, Tensor, int]:
    """A place for each choice [N, k] in R rows sorted by expert, of which each of `count` has a multiple of `step`.

    Returns:
        The places [N, k], the number of rows of each expert [E], and R, which follows from the shape alone: no device has
        to be waited for. Rows that are nobody's lie at the end of each expert's, most of them of the last one's.
    """
    flat = chosen.flatten()
    taken = torch.zeros(count, dtype=torch.long, device=flat.device).scatter_add(0, flat, torch.ones_like(flat))
    counts = -(-taken // step) * step
    rows = (count + (len(flat) - count) // step) * step
    counts[-1] += rows - counts.sum()
    spare = counts - taken
    ahead = spare.cumsum(0) - spare  # rows of nobody's before each expert's first
    places = flat.argsort(stable=True).argsort() + ahead[flat]
    return places.view_as(chosen), counts, rows


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Rows of x [N, in], the first counts[0] by weight[0], the next counts[1] by weight[1], …: -> [N, out]."""
    if _has_grouped_kernel(x, weight):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=counts.cumsum(0).to(torch.int32))
    return one_by_one(x, weight, counts)


def one_by_one(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """`grouped_linear` as a matrix product per expert that has tokens: for every dtype and device."""
    pieces = zip(x.split(counts.tolist()), weight, strict=True)
    return torch.cat([F.linear(rows, matrix) for rows, matrix in pieces if len(rows)])


def _has_grouped_kernel(x: Tensor, weight: Tensor) -> bool:
    """It takes rows of whole 16 bytes, on GPUs in bf16; on a CPU it saves a tenth."""
    fits = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    if x.device.type == "cuda":
        return fits and x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) >= (8, 0)
    return fits and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def balance_loss(model: nn.Module, valid: Tensor | None = None) -> Tensor:
    """How unevenly the experts of the last forward pass were used: k where they are equally busy, more otherwise.

    E · Σ_e f_e P_e over all layers' tokens, f_e the share of tokens that use expert e and P_e its mean probability
    (Fedus et al., 2021, equations 4 to 6, with k choices as in transformers). It is a mean over a whole batch, so it
    doesn't decompose into sums over tokens: as a `Term` it is counted per microbatch.

    Args:
        valid: [B, T] or [N] true at tokens that count; all when not given.

    Raises:
        UserError: the model has no experts.
    """
    layers = list(_expert_layers(model))
    if not layers:
        raise UserError("this model has no experts to balance", where="model.experts")
    used = meant = total = layers[0].router.weight.new_zeros((), dtype=torch.float32)
    for layer in layers:
        assert layer.logits is not None, "balance_loss needs a forward pass with gradient before it"
        share = layer.logits.softmax(-1).float()  # [N, E]
        counts = torch.ones_like(share[:, 0]) if valid is None else valid.flatten().to(share.dtype)
        chosen = share.topk(layer.config.per_token, dim=-1).indices
        hits = torch.zeros_like(share).scatter(1, chosen, 1.0)
        used = used + (hits * counts.unsqueeze(1)).sum(0)
        meant = meant + (share * counts.unsqueeze(1)).sum(0)
        total = total + counts.sum()
    return layers[0].config.count * (used / total * (meant / total)).sum()


def active_share(parameter: nn.Parameter, model: nn.Module) -> float:
    """Which part of a parameter one token is multiplied with: k / E of stacked experts, all of anything else."""
    for layer in _expert_layers(model):
        if any(parameter is own for stack in (layer.gate, layer.up, layer.down) for own in stack.parameters()):
            return layer.config.per_token / layer.config.count
    return 1.0


def _expert_layers(model: nn.Module) -> Iterable[GatedExperts]:
    return (module for module in model.modules() if isinstance(module, GatedExperts))
