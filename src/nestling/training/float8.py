"""Matrix products in 8-bit floating point (Micikevicius et al. 2022), by torchao, on GPUs that have units for it.

While training lasts, the linear layers of the repeated blocks round their inputs, weights and gradients to 8 bits with one
scale per tensor, anew in every product. Their weights are the same parameters as before: masters, optimisers and
checkpoints know nothing of it. Embedding, output layer, norms and attention stay in bf16. Rounding pays once it is
compiled into the products; uncompiled it costs more than it saves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from nestling.core import ranks
from nestling.core.errors import UserError
from nestling.training.compiling import repeated_blocks
from nestling.training.settings import ParallelSettings

MULTIPLE = 16
"""The units take sizes in multiples of this."""
CAPABILITY = (8, 9)
"""The first GPUs that have them: Ada, Hopper, Blackwell."""
EXACT = ("router",)
"""Layers that choose: a rounded score picks another expert."""


def round_linears(
    modules: Mapping[str, nn.Module], device: torch.device, parallel: ParallelSettings = ParallelSettings()
) -> Callable[[], None]:
    """Let the linear layers of the modules' repeated blocks compute in 8 bits; returns what takes it back.

    Raises:
        UserError: as `checked`, or no layer has a size that fits.
    """
    settings = checked(device, parallel)
    plain: list[tuple[nn.Module, str, nn.Module]] = []
    from torchao.float8 import convert_to_float8_training  # seconds to import

    for block in repeated_blocks(modules):
        plain += [(block, path, part) for path, part in block.named_modules() if _fits(part, path)]
        convert_to_float8_training(block, config=settings, module_filter_fn=_fits)
    if not plain:
        raise _unable(f"no linear layer of a repeated block, adapted ones aside, has sizes in multiples of {MULTIPLE}")

    def undo() -> None:
        for block, path, part in plain:
            block.set_submodule(path, part)

    return undo


def checked(device: torch.device, parallel: ParallelSettings) -> Any:
    """`configuration`, where the processes of this run don't share layers.

    Raises:
        UserError: they do, or as there.
    """
    if parallel.tensor > 1 and ranks.is_distributed():
        what = f"fp8 layers can't be divided among processes, and training.parallel.tensor is {parallel.tensor}"
        raise _unable(what, "use training.parallel.tensor=1, or bf16")
    return configuration(device)


def configuration(device: torch.device) -> Any:
    """torchao's settings on a device that has the units.

    Raises:
        UserError: it has none, or torchao isn't there.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        raise _unable("fp8 needs a GPU of compute capability 8.9 or more")
    try:
        from torchao.float8 import Float8LinearConfig
    except ImportError:
        raise _unable("fp8 needs torchao", "pip install 'nestling[fp8]', or use bf16") from None
    return Float8LinearConfig(pad_inner_dim=True)  # batches of any number of tokens


def _fits(part: nn.Module, path: str) -> bool:
    sized = type(part) is nn.Linear and not (part.in_features % MULTIPLE or part.out_features % MULTIPLE)
    return sized and path.rsplit(".", 1)[-1] not in EXACT


def _unable(what: str, fix: str = "use bf16") -> UserError:
    return UserError(what, where="training.precision", value="fp8", fix=fix)
