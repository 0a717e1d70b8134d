"""A GPU that isn't there: tensors that say they are on "cuda" and are computed on the CPU, under CUDA's rules.

Under `pretended_gpu()` what is asked for with device="cuda", moved there or computed from such tensors is on it: its storage
is marked. Operations on tensors of both devices, NumPy's look at a marked tensor, and indices or random generators on the
wrong device fail as they do with CUDA. What is not shown: kernels, their precision and speed, compilation, several GPUs.

Both modes count for one thread alone; a test that computes in another one enters `rules()` there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
MOVES = {"copy_", "_to_copy", "_foreach_copy_"}
INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
TAKES_SCALARS = {
    "where",
    "masked_fill",
    "masked_fill_",
    "index_fill",
    "index_fill_",
    "fill_",
}  # beside what is pointwise


def is_marked(tensor: Tensor) -> bool:
    """Whether a tensor is on the pretended GPU."""
    try:
        return bool(getattr(tensor.untyped_storage(), "pretended", False))
    except NotImplementedError:  # some subclasses have no storage
        return False


def _mark(value: Any, where: str = "cuda") -> Any:
    if isinstance(value, Tensor):
        value.untyped_storage().pretended = where == "cuda"  # type: ignore[attr-defined]
    return value


class _Operations(TorchDispatchMode):
    """The rules for every operation, however it was called."""

    last = False
    """Whether the operation before was on the GPU: so is what a backward pass makes of nothing, to put a gradient into."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name.split("::")[1]
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        fresh = not tensors and torch._C._current_graph_task_id() >= 0 and self.last
        self.last = any(map(is_marked, tensors)) or fresh
        if not self.last or name in MOVES:
            made = func(*args, **kwargs)
            return tree_map(_mark, made) if name == "_to_copy" and self.last else made
        if not _allowed(func, name, tensors, args) or kwargs.get("generator") is not None:
            places = [(str(_device(tensor)), tuple(tensor.shape)) for tensor in tensors]
            raise RuntimeError(f"{func}: expected everything on one device, got {places}")
        return tree_map(_mark, func(*args, **kwargs))


def _allowed(func: Any, name: str, tensors: list[Tensor], args: Any) -> bool:
    """CUDA takes numbers from the CPU in most operations, and indices of its own tensors."""
    if name in INDEXING:
        values = [value for value in args[2:] if isinstance(value, Tensor) and value.dim()]
        return is_marked(args[0]) and all(map(is_marked, values))
    scalars = torch.Tag.pointwise in func.tags or name in TAKES_SCALARS
    return all(is_marked(tensor) or (scalars and not tensor.dim()) for tensor in tensors)


class _Calls(TorchFunctionMode):
    """What names a device is told another one, which exists, and its results are marked."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name in ("to", "cpu", "cuda") and isinstance(args[0], Tensor):
            return _moved(name, *args, **kwargs)
        if name in ("numpy", "__array__") and is_marked(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if name == "pin_memory":
            return args[0].clone()
        if name == "_parse_to" or "cuda" not in str(kwargs.get("device")):
            return func(*args, **kwargs)
        if kwargs.get("generator") is not None:
            raise RuntimeError("expected a generator on cuda")
        made = func(*args, **{**kwargs, "device": CPU})
        return tree_map(lambda value: _mark(value.clone() if isinstance(value, Tensor) else value), made)


def _moved(name: str, tensor: Tensor, *given: Any, **named: Any) -> Tensor:
    """`Tensor.to` and its short forms."""
    here, there = str(_device(tensor)), {"to": "", "cpu": "cpu", "cuda": "cuda"}[name]
    values = [*given, *named.values()]
    for value in values:
        if isinstance(value, str | torch.device):
            there = str(value)
        elif isinstance(value, Tensor):
            there = str(_device(value))
    if "meta" in (there, here):
        return torch.Tensor.to(tensor, *given, **named)
    plain = [CPU if isinstance(value, str | torch.device) else value for value in given]
    named = {key: CPU if key == "device" else value for key, value in named.items()}
    found = torch.Tensor.to(tensor, *plain, **named) if values else tensor
    there = there.split(":")[0] or here.split(":")[0]
    return found if there == here.split(":")[0] else _mark(found.clone(), there)


def _device(tensor: Tensor) -> torch.device:
    return GPU if is_marked(tensor) else torch._C.TensorBase.device.__get__(tensor)  # type: ignore[attr-defined]


@contextmanager
def rules() -> Iterator[None]:
    """The rules of devices, in this thread."""
    with _Operations(), _Calls():
        yield


@contextmanager
def pretended_gpu(capability: tuple[int, int] = (9, 0), memory: int = 80 << 30) -> Iterator[None]:
    """One GPU of this capability and so many bytes, for as long as this lasts."""
    card = SimpleNamespace(name="Pretended", total_memory=memory, major=capability[0], minor=capability[1])
    answers: dict[str, Any] = {
        "is_available": True, "device_count": 1, "get_device_capability": capability, "get_device_properties": card,
        "mem_get_info": (memory, memory), "memory_allocated": 0, "memory_reserved": 0, "max_memory_allocated": 0,
        "reset_peak_memory_stats": None, "synchronize": None, "manual_seed_all": None, "is_current_stream_capturing": False,
    }  # fmt: skip
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, answer=answer: answer))
        for place, name, value in _replaced():
            stack.enter_context(mock.patch.object(place, name, value, create=True))
        stack.enter_context(rules())
        yield


def _replaced() -> Iterator[tuple[Any, str, Any]]:
    """What asks for a device below the two modes."""
    yield torch.Tensor, "device", property(_device)
    yield torch.Tensor, "is_cuda", property(is_marked)
    yield torch.Tensor, "is_cpu", property(lambda tensor: not is_marked(tensor))
    yield torch.autocast, "__init__", _on_cpu(torch.autocast.__init__, place=1)
    yield torch, "get_autocast_dtype", _on_cpu(torch.get_autocast_dtype)
    yield torch, "is_autocast_enabled", _on_cpu(torch.is_autocast_enabled)
    for name in ("torch.optim.optimizer", "torch.nn.utils.clip_grad"):
        yield sys.modules[name], "_group_tensors_by_device_and_dtype", _by_device


def _by_device(lists: Any, with_indices: bool = False) -> dict[Any, Any]:
    groups = _group_tensors_by_device_and_dtype(lists, with_indices)
    return {(found[0][0][0].device, dtype): found for (_, dtype), found in groups.items()}


def _on_cpu(call: Callable[..., Any], place: int = 0) -> Callable[..., Any]:
    """The same with "cpu" for "cuda" as the argument at a place."""

    def changed(*args: Any, **kwargs: Any) -> Any:
        return call(*("cpu" if n == place and value == "cuda" else value for n, value in enumerate(args)), **kwargs)

    return changed
