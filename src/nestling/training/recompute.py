"""Activation recomputation: a repeated block remembers its input only, and is computed again in the backward pass
(Chen et al. 2016). Put round the blocks from outside; the numbers stay the same, dropout included."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nestling.training.compiling import repeated_blocks


def recompute_blocks(modules: Mapping[str, nn.Module]) -> Callable[[], None]:
    """Let the repeated blocks of the modules recompute when they train; returns what takes it back."""
    blocks = repeated_blocks(modules)
    for block in blocks:
        block.forward = _recomputed(block.forward, block)  # on the instance: the class stays as it is

    def undo() -> None:
        for block in blocks:
            block.__dict__.pop("forward", None)

    return undo


def _recomputed(forward: Callable[..., Any], block: nn.Module) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if block.training and torch.is_grad_enabled():
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        return forward(*args, **kwargs)

    return call
