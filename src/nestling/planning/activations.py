"""What a forward pass keeps for the backward pass: found by rehearsing two layers on tensors without data.

The rehearsal runs the model's own code on fake tensors, which have shape, dtype and device but no memory, and counts what
is alive; layers of one kind keep the same, so two tell about a hundred. What a compiled block saves on top of that
(a half, as measured; see `benchmarks/memory.py`) is left out: a run begins uncompiled.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nestling.model import experts
from nestling.model.adapters import Adaptation, AdapterSettings, adapt
from nestling.model.config import DecoderConfig
from nestling.model.decoder import Decoder


@dataclass(frozen=True)
class Microbatch:
    """What goes through the model at once: `Microbatch(rows=32, width=256, dtype=torch.bfloat16)`.

    `packed` rows hold several documents that don't see each other, which takes a mask of their own. Under fp16 the
    weights stay in float32 and are rounded on the way (autocast).
    """

    rows: int
    width: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    packed: bool = False

    @property
    def tokens(self) -> int:
        """Slots, padding included."""
        return self.rows * self.width


@dataclass(frozen=True)
class Activations:
    """Bytes of one forward and backward pass through a decoder's blocks.

    `kept` is what lies there when the backward pass begins, `passing` what comes on top of it for a while.
    """

    kept: int
    passing: int


def activations(
    config: DecoderConfig, batch: Microbatch, recompute: bool = False, adapters: AdapterSettings | None = None
) -> Activations:
    """What the blocks keep of a microbatch, or, where they are computed again in the backward pass, only their inputs.

    Args:
        adapters: that learn in the place of the weights.
    """
    kinds = Counter(_alone(config, index) for index in range(config.n_layers))
    kept = passing = 0
    shared: list[int] = []
    stream = batch.tokens * config.d_model * (4 if batch.dtype == torch.float32 else 2)
    for layer, number in kinds.items():
        seen = _rehearse(layer, batch, adapters)
        shared.append(max(0, seen.shared) if recompute else seen.shared)
        kept += number * (stream if recompute else seen.each)
        passing = max(passing, seen.passing + (seen.each if recompute else 0))
    return Activations(max(shared) + kept, passing)


def _alone(config: DecoderConfig, index: int) -> DecoderConfig:
    """A decoder of two layers that are both like one layer of `config`; of a vocabulary it needs none."""
    layer = config.of_layer(index).with_(n_layers=2, vocab_size=1)
    if layer.experts is None:
        return layer
    return layer.with_(experts=layer.experts.model_copy(update={"dense_layers": ()}))


class _Rehearsal(NamedTuple):
    """Bytes kept beside the layers (less what a first layer spares whose input is frozen), by each of them, and on top of
    it all for a while."""

    shared: int
    each: int
    passing: int


@functools.lru_cache(maxsize=64)
def _rehearse(config: DecoderConfig, batch: Microbatch, adapters: AdapterSettings | None) -> _Rehearsal:
    """Forward and backward of `Decoder.hidden` with nothing computed."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # a second to import: only where something will train

    # Of experts whose products are no kernel's the device is of no matter.
    grouped = config.experts is None or batch.dtype == torch.bfloat16
    device = torch.device(batch.device if grouped else "cpu")
    with FakeTensorMode(), device, _all_grouped():
        model = Decoder(config).train()
        if adapters:
            adapt(model, Adaptation(adapters, Path()))
        if batch.dtype == torch.bfloat16:
            for parameter in model.parameters():
                parameter.data = parameter.data.to(batch.dtype)
        ids = torch.zeros(batch.rows, batch.width, dtype=torch.long)
        places = ids if batch.packed else None
        marks: list[int] = []
        with _Living() as living, torch.autocast(device.type, torch.float16, enabled=batch.dtype == torch.float16):
            for block in model.blocks:
                block.register_forward_hook(lambda *_: marks.append(living.now))
            hidden = model.hidden(ids, positions=places, segments=places)
            kept, each = living.now, marks[1] - marks[0]
            hidden.sum().backward()
        return _Rehearsal(kept - 2 * each, each, living.most - kept)


@contextmanager
def _all_grouped() -> Iterator[None]:
    """Every product of groups as the kernel's, whatever its sizes: expert by expert, shapes follow from data."""
    real = experts._has_grouped_kernel
    experts._has_grouped_kernel = lambda x, weight: True
    try:
        yield
    finally:
        experts._has_grouped_kernel = real


class _Living(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, for as long as anybody holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        grouped = operation is torch.ops.aten._grouped_mm.default
        made = _grouped(*args, **(kwargs or {})) if grouped else operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return made

    def _add(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)


def _grouped(left: Tensor, right: Tensor, offs: Tensor, *_: Any, **__: Any) -> Tensor:
    """The shape of a product of groups, which torch's own shape function gives for bf16 alone."""
    if right.ndim == 3:  # rows of each group [N, in] with the group's matrix [E, in, out]
        return left.new_empty(left.shape[0], right.shape[-1])
    return left.new_empty(len(offs), left.shape[0], right.shape[1])  # the matrices' gradients
