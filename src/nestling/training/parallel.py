"""How the processes of a run share its weights: the one place outside core that knows of collectives.

    data        every process holds everything and reads its share of each batch; gradients are summed (`Replicated`)
    shard       each process holds a piece of weights, gradients and optimiser state; FSDP2 brings a block together while
                it computes. "hybrid": a few processes make one whole, and several such wholes read different data
    tensor      neighbours share the heads and features of every layer and read the same data

A `Layout` names each process by (replicate, shard, tensor). Every parameter is cut into rectangles (`Region`), rows over
`shard` inside what `tensor` leaves of it; saving, norms and Muon need to know nothing else. The optimisers see plain
tensors, this process's pieces. While the modules are cut up they are changed inside; `_Form` remembers what they were.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from nestling.core import ranks
from nestling.core.errors import UserError
from nestling.core.runtime import launched
from nestling.training.compiling import repeated_blocks
from nestling.training.parameters import named_parameters
from nestling.training.precision import Weights
from nestling.training.resume import Piece, Region, Stored, read
from nestling.training.settings import ParallelSettings

BUCKET = 32 * 2**20  # bytes of gradients that are summed in one message
CALLED = ("hidden",)  # methods by which objectives call a model, beside forward
BY_FEATURE = ("attention.query", "attention.key", "attention.value", "feed_forward.gate", "feed_forward.up")
BY_INPUT = ("attention.output", "feed_forward.down")
OF_HEADS = ("query_norm.", "key_norm.")  # parameters that every process holds but uses on its own heads only


@dataclass(frozen=True)
class Layout:
    """The processes as a block of `replicate` x `shard` x `tensor`, numbered in that order."""

    mesh: DeviceMesh
    device: torch.device
    replicate: int
    shard: int
    tensor: int

    @property
    def member(self) -> int:
        """This process among those that hold one copy together."""
        return ranks.rank() % self.members

    @property
    def members(self) -> int:
        """How many processes hold one copy together."""
        return self.shard * self.tensor

    @cached_property
    def copy_group(self) -> Any:
        """The processes that hold one copy together."""
        firsts = range(0, ranks.world_size(), self.members)
        return _own_group([list(range(first, first + self.members)) for first in firsts])

    @cached_property
    def data_group(self) -> Any:
        """One process of each reader of data."""
        return _own_group([list(range(t, ranks.world_size(), self.tensor)) for t in range(self.tensor)])


def _own_group(groups: list[list[int]]) -> Any:
    """Make all the groups, as everybody must, and return the one with this process in it."""
    made = [dist.new_group(members, timeout=ranks.ANSWER) for members in groups]
    return next(made[number] for number, members in enumerate(groups) if ranks.rank() in members)


def layout_sizes(settings: ParallelSettings, regular: bool, dtype: torch.dtype) -> tuple[int, int, int]:
    """How many processes `replicate`, `shard` and `tensor` are of those there are.

    Args:
        regular: every process calls the modules equally often, so that blocks can be brought together call by call.

    Raises:
        UserError: the settings don't fit the processes, the objective or the precision.
    """
    world, where = ranks.world_size(), "training.parallel"
    if world % settings.tensor:
        raise UserError(f"must divide the {world} processes", where=f"{where}.tensor", value=settings.tensor)
    data = world // settings.tensor
    if settings.data not in ("auto", data):
        fix = f"use {data} or auto"
        raise UserError(f"data x tensor is not {world} processes", where=f"{where}.data", value=settings.data, fix=fix)
    shard = {"none": 1, "full": data, "hybrid": settings.shard_size or _neighbours() // settings.tensor}[settings.shard]
    if shard < 1 or data % shard:
        raise UserError(f"must divide the {data} shares of the data", where=f"{where}.shard_size", value=shard)
    if shard * settings.tensor > 1 and not regular:
        fix = "use shard: none and tensor: 1, where every process holds all weights"
        raise UserError("this objective calls its models unevenly", where=where, fix=fix)
    if shard * settings.tensor > 1 and dtype == torch.float16:
        raise UserError("fp16 can't be sharded", where="training.precision", fix="use bf16 or fp32")
    return data // shard, shard, settings.tensor


def _neighbours() -> int:
    launch = launched()
    return launch.local_world if launch else ranks.world_size()


@contextmanager
def arranged(
    modules: Mapping[str, nn.Module], dtype: torch.dtype, settings: ParallelSettings, device: torch.device, regular: bool
) -> Iterator[Weights]:
    """The weights of a run as its several processes share them; `regular` as in `layout_sizes`.

    Raises:
        UserError: as there, or the settings don't fit the model.
    """
    sizes = layout_sizes(settings, regular, dtype)
    if sizes[1:] == (1, 1):
        yield Replicated(modules, dtype)
        return
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("replicate", "shard", "tensor"))
    layout = Layout(mesh, device, *sizes)
    readers = layout.replicate * layout.shard
    with ranks.reading_as(ranks.rank() // layout.tensor, readers, layout.data_group):
        yield Sharded(modules, dtype, layout)


class Replicated(Weights):
    """Everything on every process; gradients are summed, so that all take the same step."""

    @torch.no_grad()
    def reduce(self) -> None:
        """Sum the masters' gradients over the processes; one that no process has stays None."""
        underway = []
        for bucket in _buckets(list(self.masters.values())):
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            had = torch.tensor([float(p.grad is not None) for p in bucket], device=grads[0].device)
            flat = torch.cat([*(grad.reshape(-1) for grad in grads), had])
            underway.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        for bucket, flat, work in underway:
            work.wait()
            *sums, had = flat.split([*(p.numel() for p in bucket), len(bucket)])
            for parameter, found, holders in zip(bucket, sums, had.tolist(), strict=True):
                parameter.grad = found.view_as(parameter) if holders else None


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Neighbours of together about `BUCKET` bytes."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        bucket.append(parameter)
        if sum(p.nbytes for p in bucket) >= BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


@dataclass(frozen=True)
class Frame:
    """A parameter's whole shape, and the dimension that `tensor` divides, where it does."""

    shape: tuple[int, ...]
    divided: int | None = None

    def region(self, layout: Layout, member: int) -> Region:
        """What a member of a copy holds: its part of the divided dimension, and of that its rows."""
        s, t = divmod(member, layout.tensor)
        offset, size = [0] * len(self.shape), list(self.shape)
        if self.divided is not None:
            size[self.divided] //= layout.tensor
            offset[self.divided] = t * size[self.divided]
        rows = -(-size[0] // layout.shard)
        first, stop = min(rows * s, size[0]), min(rows * (s + 1), size[0])
        offset[0], size[0] = offset[0] + first, stop - first
        return Region(tuple(offset), tuple(size), self.shape)


class Sharded(Weights):
    """A piece of every parameter on each process. `masters` are the pieces, in fp32; FSDP2 computes in `dtype`."""

    sharded = True

    def __init__(self, modules: Mapping[str, nn.Module], dtype: torch.dtype, layout: Layout) -> None:
        self._modules, self._layout = list(modules.values()), layout
        self.assembly = self
        self._plain = _Form(self._modules)
        self._originals = named_parameters(modules)
        divided = _divide(modules, layout) if layout.tensor > 1 else {}
        self._frames = {name: Frame(tuple(p.shape), divided.get(name)) for name, p in self._originals.items()}
        _shard(self._modules, dtype, layout)
        super().__init__(modules, torch.float32)
        self.dtype = dtype
        self._held = named_parameters(modules)
        for original in self._originals.values():
            original.data = torch.empty(0, device=original.device)
        self.masters = {name: nn.Parameter(_local(self._held[name]).detach()) for name in self.masters}
        self.regions = {name: self.region(name, layout.member) for name in self.masters}
        self._names = {id(master): name for name, master in self.masters.items()}

    def region(self, name: str, member: int) -> Region:
        """What a member of a copy holds of a parameter."""
        return self._frames[name].region(self._layout, member)

    def holders(self, name: str) -> list[int]:
        """For each member, the first one that holds the same rectangle."""
        regions = [self.region(name, member) for member in range(self._layout.members)]
        return [regions.index(region) for region in regions]

    def piece(self, master: Tensor, value: Any) -> Any:
        """Values of a master's own shape are pieces, saved by the first process that holds them."""
        if not isinstance(value, Tensor) or value.ndim == 0 or value.shape != master.shape:
            return value
        name = self._names[id(master)]
        first = ranks.rank() == self.holders(name)[self._layout.member]
        return Piece(value, self.regions[name], written=first)

    def part(self, master: Tensor, saved: Any) -> Any:
        """Of values of the whole parameter's shape, this process's piece."""
        name = self._names[id(master)]
        if isinstance(saved, Stored) and saved.shape and saved.shape == self._frames[name].shape:
            return saved.read(self.regions[name])
        return read(saved)

    def numel(self) -> int:
        """How many weights are trained, in all pieces together."""
        return sum(math.prod(self._frames[name].shape) for name in self.masters)

    def collect(self) -> None:
        """Point the masters' gradients at what FSDP2 has summed, in fp32, for this process's pieces."""
        for name, master in self.masters.items():
            grad = self._held[name].grad
            master.grad = None if grad is None else _local(grad)

    def reduce(self) -> None:
        """FSDP2 has summed over the readers; what works on a process's own heads is summed over those that share them."""
        for name, master in self.masters.items():
            if self._layout.tensor > 1 and master.grad is not None and any(part in name for part in OF_HEADS):
                dist.all_reduce(master.grad, group=self._layout.mesh["tensor"].get_group())

    @torch.no_grad()
    def publish(self) -> None:
        """Clear the gradients; the pieces are the modules' own."""
        for name, master in self.masters.items():
            master.grad = self._held[name].grad = None

    def clip(self, largest: float) -> Tensor:
        """As `Weights.clip`: each rectangle counts once in the norm, however many processes hold it."""
        squares = torch.zeros(len(self.masters), device=self._layout.device, dtype=torch.float32)
        for number, (name, master) in enumerate(self.masters.items()):
            if master.grad is not None:
                holders = self.holders(name)
                squares[number] = master.grad.square().sum() / holders.count(holders[self._layout.member])
        dist.all_reduce(squares)
        norms = (squares / self._layout.replicate).sqrt()
        self.norms, norm = dict(zip(self.masters, norms, strict=True)), torch.linalg.vector_norm(norms)
        if largest > 0:
            torch.nn.utils.clip_grads_with_norm_(self.masters.values(), largest, norm)
        return norm

    # --- whole tensors -------------------------------------------------------------------------------------------

    def shape(self, piece: nn.Parameter) -> tuple[int, ...]:
        """Of the parameter that a master is a piece of."""
        return self._frames[self._names[id(piece)]].shape

    def through(
        self,
        parameters: Sequence[nn.Parameter],
        pieces: Sequence[Tensor],
        compute: Callable[[list[Tensor]], list[Tensor]],
    ) -> list[Tensor]:
        """See `parameters.Assembly`: the matrices are dealt to the members of the copy in turn."""
        me, members = self._layout.member, range(self._layout.members)
        names = [self._names[id(parameter)] for parameter in parameters]
        mine = names[me :: len(members)]
        sent: list[list[Tensor]] = [[] for _ in members]
        for number, (name, piece) in enumerate(zip(names, pieces, strict=True)):
            if self.holders(name)[me] == me:
                sent[number % len(members)].append(piece)
        arrived = self._exchange(sent, [[self.region(n, m) for n in mine if self.holders(n)[m] == m] for m in members])
        wholes = {n: pieces[0].new_empty(self._frames[n].shape) for n in mine}
        for member in members:
            senders = [name for name in mine if self.holders(name)[member] == member]
            for name, piece in zip(senders, arrived[member], strict=True):
                wholes[name][self.region(name, member).slices] = piece
        found = dict(zip(mine, compute(list(wholes.values())) if mine else [], strict=True))
        back = [[found[name][self.region(name, member).slices] for name in mine] for member in members]
        returned = self._exchange(back, [[self.region(n, me) for n in names[m :: len(members)]] for m in members])
        return [returned[number % len(members)][number // len(members)] for number in range(len(names))]

    def _exchange(self, sent: list[list[Tensor]], expected: list[list[Region]]) -> list[list[Tensor]]:
        """Send each member of the copy its tensors, and receive from each those of the expected sizes."""
        first = next(iter(self.masters.values()))
        flat = [torch.cat([first.new_empty(0), *(tensor.reshape(-1) for tensor in part)]) for part in sent]
        sizes = [[math.prod(region.size) for region in part] for part in expected]
        outgoing = torch.cat(flat)
        incoming = outgoing.new_empty(sum(map(sum, sizes)))
        group, lengths = self._layout.copy_group, [len(part) for part in flat]
        dist.all_to_all_single(incoming, outgoing, [sum(part) for part in sizes], lengths, group=group)
        found = []
        for regions, numbers, part in zip(expected, sizes, incoming.split([sum(s) for s in sizes]), strict=True):
            found.append([x.view(region.size) for x, region in zip(part.split(numbers), regions, strict=True)])
        return found

    @torch.no_grad()
    def _gathered(self, name: str) -> Tensor:
        """A whole parameter, on every process."""
        regions = [self.region(name, member) for member in range(self._layout.members)]
        longest = max(math.prod(region.size) for region in regions)
        local = _local(self._held[name]).reshape(-1)
        padded = torch.nn.functional.pad(local, (0, longest - local.numel()))
        parts = [torch.empty_like(padded) for _ in regions]
        dist.all_gather(parts, padded, group=self._layout.copy_group)
        whole = local.new_empty(self._frames[name].shape)
        for region, part in zip(regions, parts, strict=True):
            whole[region.slices] = part[: math.prod(region.size)].view(region.size)
        return whole

    @contextmanager
    def whole(self) -> Iterator[None]:
        """While this lasts, the modules are what they were before, with the present weights in the training dtype."""
        cut = _Form(self._modules)
        wholes = {name: self._gathered(name).to(self.dtype) for name in self._held}
        self._plain.restore()
        for name, original in self._originals.items():
            original.data = wholes[name]
        try:
            yield
        finally:
            for original in self._originals.values():
                original.data = original.data.new_empty(0, dtype=torch.float32)
            cut.restore()

    def close(self, failed: bool = False) -> None:
        """Give the modules their full-precision weights, whole; after a failure the others may not answer any more."""
        wholes = {} if failed else {name: self._gathered(name) for name in self._held}
        self._plain.restore()
        for name, original in self._originals.items():
            original.grad = None
            if name in wholes:
                original.data = wholes[name]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class _Form:
    """What modules are inside at one time: classes, hooks, parameters, attributes."""

    def __init__(self, modules: list[nn.Module]) -> None:
        parts = {id(part): part for module in modules for part in module.modules()}
        self._parts = [(part, part.__class__, _copied(part.__dict__)) for part in parts.values()]

    def restore(self) -> None:
        """Make the modules what they were."""
        for part, kind, inside in self._parts:
            part.__class__ = kind
            part.__dict__.clear()
            part.__dict__.update(_copied(inside))


def _copied(inside: dict[str, Any]) -> dict[str, Any]:
    return {name: copy.copy(value) if isinstance(value, dict | set) else value for name, value in inside.items()}


def _shard(modules: list[nn.Module], dtype: torch.dtype, layout: Layout) -> None:
    """FSDP2 on every repeated block and on the rest; gradients are summed, never averaged, in fp32."""
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if dtype == torch.bfloat16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    mesh = layout.mesh["shard"] if layout.replicate == 1 else layout.mesh["replicate", "shard"]
    for module in modules:
        for block in repeated_blocks({"": module}):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(module, mesh=mesh, mp_policy=policy)
        for name in CALLED:
            if hasattr(module, name):
                register_fsdp_forward_method(module, name)
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)  # Gloo knows no scaled sum
                part.unshard()  # the first time pads uneven pieces; from here on they stay where they are
                part.reshard()


def _divide(modules: Mapping[str, nn.Module], layout: Layout) -> dict[str, int]:
    """Divide the heads and features of every block among neighbours; gives each divided parameter's dimension.

    Raises:
        UserError: a model whose layers can't be divided this way.
    """
    where = "training.parallel.tensor"
    divided: dict[str, int] = {}
    for module_name, module in modules.items():
        names = {id(part): path for path, part in module.named_modules()}
        for block in repeated_blocks({"": module}):
            linear = {path: part for path, part in block.named_modules() if type(part) is nn.Linear}
            if not {*BY_INPUT, *BY_FEATURE} - {"feed_forward.gate"} <= linear.keys():
                adapted = any(isinstance(part, nn.Linear) and type(part) is not nn.Linear for part in block.modules())
                what = "adapters" if adapted else "the layers of this model"
                raise UserError(f"{what} can't be divided", where=where, fix="use tensor: 1")
            plan: dict[str, Any] = {}
            for path in filter(linear.__contains__, (*BY_FEATURE, *BY_INPUT)):  # in one order in all processes
                by_feature = path in BY_FEATURE
                plan[path] = ColwiseParallel() if by_feature else RowwiseParallel()
                prefix = f"{module_name}.{names[id(block)]}.{path}"
                divided |= {f"{prefix}.weight": 0, f"{prefix}.bias": 0} if by_feature else {f"{prefix}.weight": 1}
                size = linear[path].out_features if by_feature else linear[path].in_features
                _check_divides(size, layout.tensor, path)
            _share_heads(block, layout.tensor)
            parallelize_module(block, layout.mesh["tensor"], plan)
        if any(hasattr(part, "slopes") for part in module.modules()):
            raise UserError("heads with penalties of their own can't be divided", where=where, fix="use tensor: 1")
    return divided


def _share_heads(block: nn.Module, parts: int) -> None:
    """Tell attention how many heads are here."""
    for part in block.modules():
        for name in ("heads", "kv_heads"):
            if isinstance(count := getattr(part, name, None), int):
                _check_divides(count, parts, name)
                setattr(part, name, count // parts)


def _check_divides(size: int, parts: int, what: str) -> None:
    if size % parts:
        raise UserError(f"can't divide {size} ({what})", where="training.parallel.tensor", value=parts)
