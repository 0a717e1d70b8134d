"""Which parameter is what: the one place that decides how weights are grouped for the optimisers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn


class Assembly(Protocol):
    """Puts together the matrices of which each process holds a piece, so that something whole can be computed."""

    def shape(self, piece: nn.Parameter) -> tuple[int, ...]:
        """Of the whole parameter."""

    def through(
        self,
        parameters: Sequence[nn.Parameter],
        pieces: Sequence[Tensor],
        compute: Callable[[list[Tensor]], list[Tensor]],
    ) -> list[Tensor]:
        """This process's pieces of `compute(whole matrices)`; each matrix is computed by one process.

        Args:
            parameters: say how the pieces are cut.
            pieces: one per parameter, such as its gradient's.
        """


@dataclass(frozen=True)
class Groups:
    """Trainable parameters by kind, each by name; every parameter is in exactly one group.

    `hidden`: matrices inside a repeated block, `[out, in]`; `matrices`: every other tensor of two or more dimensions
    (embeddings, heads, positions); `vectors`: gains and biases, never decayed.
    """

    hidden: dict[str, nn.Parameter]
    matrices: dict[str, nn.Parameter]
    vectors: dict[str, nn.Parameter]
    assembly: Assembly | None = None
    """Where the parameters are pieces: how an optimiser comes by whole ones."""


def named_parameters(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Every parameter of the modules by "module.path", shared ones once, under the name met first."""
    seen: set[int] = set()
    found: dict[str, nn.Parameter] = {}
    for module_name, module in modules.items():
        for path, parameter in module.named_parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{module_name}.{path}"] = parameter
    return found


def hidden_names(modules: Mapping[str, nn.Module]) -> set[str]:
    """Names of the matrices inside a numbered (repeated) block, embedding tables excepted."""
    hidden = set()
    for module_name, module in modules.items():
        tables = {f"{path}.weight" for path, part in module.named_modules() if isinstance(part, nn.Embedding)}
        for path, parameter in module.named_parameters():
            in_block = any(part.isdigit() for part in path.split(".")[:-1])
            if in_block and parameter.ndim == 2 and path not in tables:
                hidden.add(f"{module_name}.{path}")
    return hidden


def group(parameters: Mapping[str, nn.Parameter], hidden: set[str], assembly: Assembly | None = None) -> Groups:
    """Sort parameters into groups; `hidden` are the names from `hidden_names`."""
    groups = Groups({}, {}, {}, assembly)
    for name, parameter in parameters.items():
        kind = groups.hidden if name in hidden else groups.matrices if parameter.ndim >= 2 else groups.vectors
        kind[name] = parameter
    return groups
