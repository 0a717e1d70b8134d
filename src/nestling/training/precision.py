"""Matmul precision of training: which weights compute, which weights learn.

- fp32: the modules' own weights do both.
- bf16: the modules hold bf16 working weights, the optimiser steps fp32 masters, gradients are summed in fp32. Against
  autocast this saves the casts of weights and activations in every block: on two EPYC (Zen 5)
  cores, a 3.5 M-parameter decoder compiled by block trained 15.4k tokens/s this way and 14.0k under autocast.
- fp16 (GPUs older than SM80): autocast over fp32 weights, with loss scaling.
- fp8: as bf16, and the blocks' linear layers round further while they multiply (`float8.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from nestling.core.runtime import Runtime, named_dtype
from nestling.training.parameters import Assembly, named_parameters
from nestling.training.resume import Region, read


def training_dtype(precision: str, runtime: Runtime) -> torch.dtype:
    """The dtype of weights and activations that a `precision` setting means on this runtime."""
    return runtime.dtype if precision == "auto" else named_dtype("bf16" if precision == "fp8" else precision)


class Weights:
    """The parameters of the trained modules, as the optimiser sees them.

    `masters` are fp32 by name. Under bf16 the modules compute with rounded copies until `close`, and a microbatch's
    gradients reach the masters through `collect`, an optimiser step reaches the modules through `publish`.
    How several processes share them is said in `parallel.py`; here one process holds everything.
    """

    sharded = False
    """Whether a master is only this process's piece of its parameter."""
    assembly: Assembly | None = None
    """How an optimiser comes by whole matrices, where masters are pieces."""

    def __init__(self, modules: Mapping[str, nn.Module], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.norms: dict[str, Tensor] = {}  # of each gradient when it was last clipped, before that
        self.regions: dict[str, Region] = {}  # of which rectangle of its parameter a master is, where it isn't all
        everything = named_parameters(modules)
        self._all = list(everything.values())
        self._copied = dtype == torch.bfloat16
        self._full = [_master(p) if self._copied else p for p in self._all]
        self.masters = {
            name: full for (name, p), full in zip(everything.items(), self._full, strict=True) if p.requires_grad
        }
        self._pairs = [(p, full) for p, full in zip(self._all, self._full, strict=True) if p.requires_grad]
        if self._copied:
            for parameter in self._all:
                parameter.data = parameter.data.to(dtype)

    @torch.no_grad()
    def collect(self) -> None:
        """Add the modules' gradients to the masters' in fp32, and clear them."""
        if not self._copied:
            return
        for parameter, master in self._pairs:
            if parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad.add_(parameter.grad)
            parameter.grad = None

    def reduce(self) -> None:
        """Sum the masters' gradients over the processes, after the last microbatch."""

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the modules' weights and clear the masters' gradients."""
        for master in self.masters.values():
            master.grad = None
        if self._copied:
            torch._foreach_copy_([p.data for p, _ in self._pairs], [m.data for _, m in self._pairs])

    def whole(self) -> AbstractContextManager[None]:
        """While this lasts, the modules can be called by one process alone."""
        return nullcontext()

    def numel(self) -> int:
        """How many weights are trained."""
        return sum(m.numel() for m in self.masters.values())

    def piece(self, master: Tensor, value: Any) -> Any:
        """A value of a master's state (itself, its momentum) as it is saved."""
        return value

    def part(self, master: Tensor, saved: Any) -> Any:
        """What this process needs of a saved value of a master's state."""
        return read(saved)

    def close(self, failed: bool = False) -> None:
        """Give the modules their full-precision weights; after a failure only where that asks for no other process."""
        if self._copied:
            for parameter, full in zip(self._all, self._full, strict=True):
                parameter.data = full.data
                parameter.grad = None

    def gradients(self) -> dict[str, float]:
        """The norm of each trained parameter's gradient when it was last clipped, before that; 0 where there was none."""
        missing = dict.fromkeys(self.masters.keys() - self.norms.keys(), 0.0)
        values = torch.stack(list(self.norms.values())).tolist() if self.norms else []  # one transfer
        return {**missing, **dict(zip(self.norms, values, strict=True))}

    @contextmanager
    def context(self, device: torch.device) -> Iterator[None]:
        """What the objective's code runs in: autocast under fp16, nothing otherwise."""
        with torch.autocast(device.type, torch.float16, enabled=self.dtype == torch.float16):
            yield

    def clip(self, largest: float) -> Tensor:
        """Scale the masters' gradients to a global norm of at most `largest` (0: no limit); returns the norm before."""
        grads = {name: m.grad for name, m in self.masters.items() if m.grad is not None}
        self.norms = dict(zip(grads, torch._foreach_norm(list(grads.values())), strict=True)) if grads else {}
        norm = torch.linalg.vector_norm(torch.stack(list(self.norms.values()))) if grads else torch.zeros(())
        if largest > 0:
            torch.nn.utils.clip_grads_with_norm_(self.masters.values(), largest, norm)
        return norm


def _master(parameter: nn.Parameter) -> nn.Parameter:
    if not parameter.requires_grad:  # nothing steps it: it only comes back at the end
        return nn.Parameter(parameter.detach(), requires_grad=False)
    return nn.Parameter(parameter.detach().float().clone(), requires_grad=parameter.requires_grad)
