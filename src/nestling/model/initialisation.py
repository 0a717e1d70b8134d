"""Start values. Drawn on the CPU from one generator, so that a seed gives the same model on every device."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nestling.model.config import DecoderConfig
from nestling.model.experts import StackedLinear

STD = 0.02


@torch.no_grad()
def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """Draw all matrices of a decoder anew; norms start at one, biases at zero.

    "gpt2": N(0, 0.02), and N(0, 0.02 / sqrt(2 n_layers)) for the matrices that write to the residual stream
    (Radford et al., 2019, 2.3).
    "zero": those matrices are zero, so that every block starts as the identity, and the other hidden matrices are
    N(0, 1/fan_in), which keeps activations at unit size whatever the width; it learns faster in short runs.
    """
    config: DecoderConfig = model.config  # type: ignore[assignment]
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            _normal(module.weight, STD, generator)
        elif isinstance(module, nn.Linear | StackedLinear):
            _normal(module.weight, _std(name, module.in_features, config), generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()


def _std(name: str, fan_in: int, config: DecoderConfig) -> float:
    writes_to_stream = name.endswith((".output", ".down"))
    if name == "head":
        return STD
    if config.init == "gpt2":
        return STD / math.sqrt(2 * config.n_layers) if writes_to_stream else STD
    return 0.0 if writes_to_stream else fan_in**-0.5


def _normal(weight: Tensor, std: float, generator: torch.Generator) -> None:
    drawn = torch.empty(weight.shape, dtype=torch.float32).normal_(0.0, 1.0, generator=generator)
    weight.copy_(drawn * std)


@torch.no_grad()
def new_rows(weight: Tensor, size: int, generator: torch.Generator | None) -> Tensor:
    """`weight` [V, D] with `size` rows: new ones are the mean of the old plus a hundredth of their spread as noise.

    At the mean a new token starts with an average logit (Hewitt, 2021); the noise tells new tokens apart.
    """
    generator = generator or torch.Generator().manual_seed(0)
    extra = max(0, size - weight.shape[0])
    noise = torch.empty(extra, weight.shape[1]).normal_(0.0, 1.0, generator=generator)
    fresh = weight.mean(0) + 0.01 * weight.std(0) * noise.to(weight)
    return torch.cat([weight[:size], fresh.to(weight.dtype)]).detach().clone()
