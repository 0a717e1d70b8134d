"""Low-rank adapters (LoRA): frozen weights W are read as W + s·B A, of which only A [r, in] and B [out, r] learn.

    y = x Wᵀ + s · (x Aᵀ) Bᵀ,   s = α / r, or α / √r under rsLoRA   (Hu et al., 2021, arXiv 2106.09685, section 4.1)

They are applied from outside: a layer is exchanged for one that holds the same weight tensor beside its A and B. What is
frozen asks for no gradient, so it has no optimiser state and no fp32 master, may be bf16, and is shared by copies that
differ in their adapters (a policy and its reference). Tokens that were added for the training have new rows in the
embedding; those rows learn too. Experts have an A and a B each; their router stays as it is. The file format is in
`peft.py`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.core.config import Config
from nestling.core.errors import UserError
from nestling.model.decoder import Decoder
from nestling.model.experts import StackedLinear, grouped_linear

M = TypeVar("M", bound=nn.Module)
Target = Literal["query", "key", "value", "output", "gate", "up", "down"]


class AdapterSettings(Config):
    """How a model is adapted."""

    rank: int = Field(16, ge=1, description="Rank r of what is added to each weight.")
    alpha: float = Field(32.0, gt=0, description="What is added is multiplied by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of the adapters.")
    targets: tuple[Target, ...] = Field(
        (), description="Layers of each block that are adapted; all when none is named."
    )
    use_rslora: bool = Field(False, description="Multiply by alpha / sqrt(rank), which suits high ranks.")

    def scale(self, rank: int | None = None, alpha: float | None = None) -> float:
        """The factor s, of other ranks and alphas too where a file has them."""
        rank = rank or self.rank
        return (alpha or self.alpha) / (math.sqrt(rank) if self.use_rslora else rank)


@dataclass(frozen=True)
class Adaptation:
    """What every adapted layer of a model remembers: the settings, and the folder of the model without adapters."""

    settings: AdapterSettings
    base: Path


class Adapted(nn.Linear):
    """A linear layer with an adapter; `weight` and `bias` are the plain layer's own tensors."""

    def __init__(self, plain: nn.Linear, lora_a: Tensor, lora_b: Tensor, scale: float, origin: Adaptation) -> None:
        super(nn.Linear, self).__init__()  # not nn.Linear's own, which would draw a weight
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight, self.bias = plain.weight, plain.bias
        device = plain.weight.device
        self.lora_a = nn.Parameter(lora_a.to(device, torch.float32))  # [r, in]
        self.lora_b = nn.Parameter(lora_b.to(device, torch.float32))  # [out, r]
        dropout = origin.settings.dropout
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.scale, self.origin = scale, origin

    def forward(self, x: Tensor) -> Tensor:
        """[.., in] -> [.., out]"""
        inner = F.linear(self.dropout(x), self.lora_a.to(x.dtype))
        return F.linear(x, self.weight, self.bias) + self.scale * F.linear(inner, self.lora_b.to(x.dtype))

    def merged(self) -> nn.Linear:
        """A plain layer that computes the same without dropout."""
        added = self.lora_b.detach().float() @ self.lora_a.detach().float()
        return _linear((self.weight.detach().float() + self.scale * added).to(self.weight.dtype), self.bias)


class AdaptedStack(StackedLinear):
    """The layers of all experts with an adapter each; `weight` is the plain stack's own tensor."""

    def __init__(self, plain: StackedLinear, lora_a: Tensor, lora_b: Tensor, scale: float, origin: Adaptation) -> None:
        super(StackedLinear, self).__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight, device = plain.weight, plain.weight.device
        self.lora_a = nn.Parameter(lora_a.to(device, torch.float32))  # [E, r, in]
        self.lora_b = nn.Parameter(lora_b.to(device, torch.float32))  # [E, out, r]
        self.scale, self.origin = scale, origin

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x [N, in] sorted by expert, of which counts [E] belong to each -> [N, out]."""
        inner = grouped_linear(x, self.lora_a.to(x.dtype), counts)
        return super().forward(x, counts) + self.scale * grouped_linear(inner, self.lora_b.to(x.dtype), counts)

    def merged(self) -> StackedLinear:
        """A plain stack that computes the same."""
        plain = StackedLinear(0, self.in_features, self.out_features)
        added = self.lora_b.detach().float() @ self.lora_a.detach().float()
        plain.weight = nn.Parameter((self.weight.detach().float() + self.scale * added).to(self.weight.dtype))
        return plain


class TrainedRows(nn.Module):
    """A table of which some rows learn: in the place of an embedding, or of an output layer that is not tied to it."""

    numbers: Tensor

    def __init__(self, table: nn.Parameter, numbers: Sequence[int], rows: Tensor | None = None) -> None:
        super().__init__()
        self.table = table  # [V, D], frozen
        self.register_buffer("numbers", torch.tensor(numbers, device=table.device), persistent=False)
        fresh = table.detach()[self.numbers] if rows is None else rows
        self.rows = nn.Parameter(fresh.to(table.device, torch.float32, copy=True))  # [n, D]

    @property
    def weight(self) -> Tensor:
        """The whole table [V, D]."""
        return self.table.index_copy(0, self.numbers, self.rows.to(self.table.dtype))

    def forward(self, ids: Tensor) -> Tensor:
        """[..] -> [.., D]"""
        return F.embedding(ids, self.weight)


def adapt(
    model: Decoder, origin: Adaptation, generator: torch.Generator | None = None, tokens: Sequence[int] = ()
) -> None:
    """Freeze a model and give its layers adapters, in place. A is drawn as a linear layer's weight, B is zero.

    Args:
        tokens: ids whose rows in the embedding (and in an output layer of its own) learn too.

    Raises:
        UserError: a target that the model doesn't have, or dropout where experts are adapted.
    """
    settings, layers = origin.settings, dict(adaptable(model))
    found = {path.rsplit(".", 1)[-1] for path in layers}
    if absent := [name for name in settings.targets if name not in found]:
        fix = f"it has {', '.join(sorted(found)) or 'none'}"
        raise UserError("this model has no such layers to adapt", where="adapters.targets", value=absent[0], fix=fix)
    model.requires_grad_(False)
    for path, plain in layers.items():
        if not settings.targets or path.rsplit(".", 1)[-1] in settings.targets:
            bound, experts = plain.in_features**-0.5, plain.weight.shape[:-2]
            lora_a = torch.empty(*experts, settings.rank, plain.in_features).uniform_(-bound, bound, generator=generator)
            zero = torch.zeros(*experts, plain.out_features, settings.rank)
            put(model, path, with_adapter(plain, lora_a, zero, settings.scale(), origin))
    if tokens:
        for path in ("embedding",) if model.head is None else ("embedding", "head"):
            put(model, path, TrainedRows(model.get_submodule(path).weight, tokens))  # type: ignore[arg-type]


def with_adapter(
    plain: nn.Linear | StackedLinear, lora_a: Tensor, lora_b: Tensor, scale: float, origin: Adaptation
) -> Adapted | AdaptedStack:
    """The layer that takes the place of a plain one.

    Raises:
        UserError: experts and dropout, which PEFT refuses: it adds B A to their weights before there is an input to drop.
    """
    if isinstance(plain, nn.Linear):
        return Adapted(plain, lora_a, lora_b, scale, origin)
    _without_dropout(origin.settings)
    return AdaptedStack(plain, lora_a, lora_b, scale, origin)


def _without_dropout(settings: AdapterSettings) -> None:
    if settings.dropout:
        fix = "use 0, or name targets without gate, up and down"
        raise UserError("experts are adapted without dropout", where="adapters.dropout", value=settings.dropout, fix=fix)


def adaptable(model: Decoder) -> Iterable[tuple[str, nn.Linear | StackedLinear]]:
    """(path, layer) of every plain linear layer in the blocks, and every stack of experts; routers aside."""
    for path, module in model.blocks.named_modules(prefix="blocks"):
        if type(module) in (nn.Linear, StackedLinear) and not path.endswith(".router"):
            yield path, module  # type: ignore[misc]


def put(model: nn.Module, path: str, part: nn.Module) -> None:
    """Exchange the module at a dotted path."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, part)


def adapted_layers(model: nn.Module) -> dict[str, Adapted | AdaptedStack]:
    """The layers with adapters, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Adapted | AdaptedStack)}


def adaptation(model: nn.Module) -> Adaptation | None:
    """How a model is adapted; None where it isn't."""
    return next((layer.origin for layer in adapted_layers(model).values()), None)


def resume(model: Decoder, settings: AdapterSettings) -> None:
    """Train the adapters that a model has further: with the dropout of these settings."""
    for layer in adapted_layers(model).values():
        layer.origin = replace(layer.origin, settings=settings)
        if isinstance(layer, AdaptedStack):
            _without_dropout(settings)
        else:
            layer.dropout = nn.Dropout(settings.dropout) if settings.dropout else nn.Identity()


def copied(model: M) -> M:
    """A copy that shares the frozen tensors with the model and has its own of what learns."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that learn, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def merge(model: Decoder) -> Decoder:
    """Add the adapters to the weights, in place: a plain model that computes the same.

    Weights that had an adapter are new tensors, so copies that shared them stay as they are.
    """
    for path, module in list(model.named_modules()):
        if isinstance(module, Adapted | AdaptedStack):
            put(model, path, module.merged())
        elif isinstance(module, TrainedRows):
            weight = module.weight.detach()
            put(model, path, nn.Embedding.from_pretrained(weight) if path == "embedding" else _linear(weight))
    return model


def merged(model: Decoder) -> Decoder:
    """`merge` of a copy that shares all other tensors; the model itself where nothing is adapted."""
    if adaptation(model) is None:
        return model
    return merge(copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}))


def _linear(weight: Tensor, bias: nn.Parameter | None = None) -> nn.Linear:
    """A linear layer of these tensors, which draws nothing."""
    plain = nn.Linear(1, 1, bias=False, device="meta")
    plain.out_features, plain.in_features = weight.shape
    plain.weight = nn.Parameter(weight)
    plain.register_parameter("bias", bias)
    return plain
