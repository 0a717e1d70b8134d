"""Muon (Jordan et al. 2024): momentum made orthogonal by Newton-Schulz; AdamW takes what is no hidden matrix.

`torch.optim.Muon` walks the matrices one by one; here matrices of one shape (or its transpose) go through the iteration
as one batch: fewer and larger products. `tests/training/test_optimizers.py` holds both against each other. Where each
process holds pieces of the matrices, whole ones are dealt out to the processes, each makes its share orthogonal, and the
pieces go back (`parameters.Assembly`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nestling.core.runtime import Runtime
from nestling.training.optimizers.adamw import adamw
from nestling.training.parameters import Assembly, Groups
from nestling.training.settings import TrainSettings

ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's quintic: steep at zero, so small singular values rise fast
MEMORY = {"hidden": 4, "other": 8, "scratch": 15}  # bytes per weight: kept of hidden matrices and others, and for a while
ADAM_SHARE = 0.2  # of the matrices' learning rate, where the settings name none


def build(groups: Groups, settings: TrainSettings, runtime: Runtime) -> list[torch.optim.Optimizer]:
    """Muon on the hidden matrices, AdamW on embeddings, heads, gains and biases."""
    dtype = torch.bfloat16 if runtime.dtype == torch.bfloat16 else torch.float32
    optimizers: list[torch.optim.Optimizer] = []
    if groups.hidden:
        rates = (settings.learning_rate, settings.momentum, settings.weight_decay)
        optimizers.append(Muon(groups.hidden.values(), *rates, dtype, groups.assembly))
    if groups.matrices or groups.vectors:
        rate = settings.adam_learning_rate or ADAM_SHARE * settings.learning_rate
        optimizers.append(adamw(groups.matrices.values(), groups.vectors.values(), rate, settings))
    return optimizers


class Muon(torch.optim.Optimizer):
    """Muon over matrices `[out, in]`. State: one momentum tensor per matrix, in the matrix's dtype.

    Args:
        dtype: of the Newton-Schulz products; bf16 is enough, since they only need the direction.
        assembly: where the parameters are this process's pieces of the matrices.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float,
        weight_decay: float,
        dtype: torch.dtype,
        assembly: Assembly | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._dtype, self._assembly = dtype, assembly

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        for settings in self.param_groups:
            parameters = [p for p in settings["params"] if p.grad is not None]
            if parameters:
                self._step_group(parameters, settings)

    def _step_group(self, parameters: list[nn.Parameter], settings: dict[str, Any]) -> None:
        grads = [p.grad for p in parameters if p.grad is not None]
        momenta = [self._momentum(p) for p in parameters]
        torch._foreach_lerp_(momenta, grads, 1 - settings["momentum"])
        ahead = torch._foreach_lerp(grads, momenta, settings["momentum"])  # Nesterov
        torch._foreach_mul_(list[Tensor](parameters), 1 - settings["lr"] * settings["weight_decay"])
        shapes = [self._assembly.shape(p) if self._assembly else tuple(p.shape) for p in parameters]
        for batch in _same_shapes(shapes):
            updates = self._directions([parameters[i] for i in batch], [ahead[i] for i in batch])
            for i, update in zip(batch, updates, strict=True):
                rows, columns = shapes[i]
                parameters[i].add_(update, alpha=-settings["lr"] * max(1.0, rows / columns) ** 0.5)

    def _directions(self, parameters: Sequence[nn.Parameter], ahead: list[Tensor]) -> list[Tensor]:
        if self._assembly:
            return self._assembly.through(parameters, ahead, self._orthogonal)
        return self._orthogonal(ahead)

    def _orthogonal(self, matrices: list[Tensor]) -> list[Tensor]:
        """`orthogonal` of matrices of one shape or its transpose, in one batch."""
        wide = torch.stack([_wide(matrix) for matrix in matrices])  # [n, small, large]
        found = orthogonal(wide, self._dtype).unbind()
        return [x if m.shape[0] <= m.shape[1] else x.mT for m, x in zip(matrices, found, strict=True)]

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        return state["momentum"]


def orthogonal(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Nearly U Vᵀ of each matrix's singular value decomposition U S Vᵀ.

    Args:
        matrices: `[n, rows, columns]`, rows ≤ columns.
        dtype: of the products.

    Returns:
        `[n, rows, columns]` in `matrices`' dtype, singular values about 0.7 … 1.2.
    """
    a, b, c = COEFFICIENTS
    x = matrices.to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)


def _same_shapes(shapes: list[tuple[int, ...]]) -> list[list[int]]:
    """Indices of the matrices, gathered by shape up to transposition."""
    batches: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, shape in enumerate(shapes):
        batches[tuple(sorted(shape))].append(index)
    return list(batches.values())


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
