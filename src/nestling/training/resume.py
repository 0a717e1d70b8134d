"""State to go on from: folder/resume/step-N/{tensors.safetensors, state.json}, whole or absent, the newest few kept.

Where a run's ranks hold one piece of each tensor, every rank writes a file of its own (tensors-2-of-4.safetensors), and
state.json says which rectangle of which tensor lies where: any other number of ranks puts together what it needs.

Tensors lie in safetensors and everything else in JSON. `torch.distributed.checkpoint` also works on a single process,
but its metadata file is a pickle and it loads plain values with `torch.load(weights_only=False)`; nothing here may
execute code from a file. A hash of the tensors stands in the JSON, so a damaged newest state is noticed and the one
before it is used.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nestling.core import ranks
from nestling.core.errors import UserError
from nestling.core.storage import atomic_folder, content_hash, disk_error

TENSORS, STATE = "tensors.safetensors", "state.json"


@dataclass(frozen=True)
class Region:
    """A rectangle of a tensor of `shape`: rows [2, 4) of a 4 x 3 matrix are Region((2, 0), (2, 3), (4, 3))."""

    offset: tuple[int, ...]
    size: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """The rectangle as an index of the whole tensor."""
        return tuple(slice(start, start + length) for start, length in zip(self.offset, self.size, strict=True))


@dataclass(frozen=True)
class Piece:
    """What one rank holds of a tensor of the state; `written` is false where another rank writes the same piece."""

    tensor: Tensor
    region: Region
    written: bool = True


@dataclass(frozen=True)
class Stored:
    """A tensor that lies in files, in one or more rectangles: it is read where it is needed, as far as it is needed."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[Path, tuple[int, ...], tuple[int, ...]], ...]
    """(file, offset, size) of each rectangle."""

    def read(self, region: Region | None = None) -> Tensor:
        """The tensor, or a rectangle of it."""
        wanted = region or Region((0,) * len(self.shape), self.shape, self.shape)
        if len(self.parts) == 1 and region is None:
            return _tensor(self.parts[0][0], self.name)
        out = torch.empty(0)
        for number, (file, offset, size) in enumerate(self.parts):
            both = [_overlap(*sides) for sides in zip(offset, size, wanted.offset, wanted.size, strict=True)]
            with safe_open(file, "pt") as opened:
                view = opened.get_slice(self.name)
                if number == 0:
                    out = torch.empty(wanted.size, dtype=view[:1].dtype)
                if all(low < high for low, high in both):
                    inside = tuple(slice(low - o, high - o) for (low, high), o in zip(both, offset, strict=True))
                    there = tuple(slice(low - o, high - o) for (low, high), o in zip(both, wanted.offset, strict=True))
                    out[there] = view[inside]
        return out


def _overlap(start: int, length: int, other: int, other_length: int) -> tuple[int, int]:
    """The common part [low, high) of two intervals; high ≤ low where they don't meet."""
    return max(start, other), min(start + length, other + other_length)


def _tensor(file: Path, name: str) -> Tensor:
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(name)


def save(folder: Path, step: int, state: Mapping[str, Any], keep: int = 2) -> Path:
    """Write `state` (nested dicts, lists, tuples of tensors and JSON values) as `folder`/step-N, then drop older ones.

    Raises:
        UserError: the disk is full or read-only; the states that were there are untouched.
    """
    tensors: dict[str, Tensor] = {}
    tree = _pack(state, "", tensors, {})
    path = folder / f"step-{step:08d}"
    with atomic_folder(path) as temporary:
        safetensors.torch.save_file(tensors, temporary / TENSORS)
        record = {"step": step, "hash": content_hash(temporary / TENSORS), "state": tree}
        (temporary / STATE).write_text(json.dumps(record), encoding="utf-8")
    _tidy(folder, keep)
    return path


def save_pieces(folder: Path, step: int, state: Mapping[str, Any], keep: int = 2) -> Path:
    """`save` by all ranks at once, each writing its pieces (`Piece`); what is no piece is the main rank's.

    The folder must be one that all ranks see.
    """
    tensors: dict[str, Tensor] = {}
    regions: dict[str, Region] = {}
    tree = _pack(state, "", tensors, regions)
    path = folder / f"step-{step:08d}"
    name = f"tensors-{ranks.rank() + 1}-of-{ranks.world_size()}.safetensors"
    mine = {k: t for k, t in tensors.items() if k in regions or ranks.is_main()}
    with _common_folder(path) as temporary:
        try:
            safetensors.torch.save_file(mine, temporary / name)
        except (OSError, SafetensorError) as error:
            raise disk_error(error, path) from None
        places = {k: [r.offset, r.size, r.shape] for k, r in regions.items() if k in mine}
        written = ranks.gather([name, content_hash(temporary / name), places])
        if ranks.is_main():
            files = {file: found for file, found, _ in written}
            pieces: dict[str, Any] = {}
            for file, _, held in written:
                for key, (offset, size, shape) in held.items():
                    pieces.setdefault(key, {"shape": shape, "parts": []})["parts"].append([file, offset, size])
            record = {"step": step, "hash": files, "pieces": pieces, "state": tree}
            (temporary / STATE).write_text(json.dumps(record), encoding="utf-8")
    if ranks.is_main():
        _tidy(folder, keep)
    return path


@contextmanager
def _common_folder(path: Path) -> Iterator[Path]:
    """`atomic_folder` of the main rank, for all ranks to write into."""
    if ranks.is_main():
        with atomic_folder(path) as temporary:
            ranks.from_main(str(temporary))
            yield temporary
    else:
        yield Path(ranks.from_main(None))


def _tidy(folder: Path, keep: int) -> None:
    for old in saved(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    for stale in folder.glob(".step-*"):  # of a process that was killed while writing
        shutil.rmtree(stale, ignore_errors=True)


def saved(folder: Path) -> list[Path]:
    """The saved states, newest first; they may be damaged."""
    return sorted((path for path in folder.glob("step-*") if path.is_dir()), reverse=True)


def load_newest(folder: Path) -> tuple[int, Any, list[str]] | None:
    """(step, state as of `load`, complaints about newer states that were damaged), or None where nothing was saved.

    The main rank looks which state is whole, and all take that one.

    Raises:
        UserError: states are there, and none of them can be read.
    """
    if not ranks.is_main():
        name = ranks.from_main(None)
        return (*load(folder / name, verify=False), []) if name else None
    complaints: list[str] = []
    for path in saved(folder):
        try:
            step, state = load(path)
        except UserError as error:
            complaints.append(str(error))
        else:
            ranks.from_main(path.name)
            return step, state, complaints
    if complaints:
        raise UserError(complaints[0], fix="every saved state is damaged: delete the folder to start over")
    ranks.from_main(None)
    return None


def load(path: Path, verify: bool = True) -> tuple[int, Any]:
    """The step and the state of one saved folder; its tensors are `Stored`: see `read`.

    Raises:
        UserError: a file is missing, cut off or changed.
    """
    try:
        record = json.loads((path / STATE).read_text(encoding="utf-8"))
        hashes = record["hash"] if isinstance(record["hash"], dict) else {TENSORS: record["hash"]}
        if verify and any(content_hash(path / file) != wanted for file, wanted in hashes.items()):
            raise UserError("saved state is damaged: its tensors don't match their hash", where=path)
        return record["step"], _unpack(record["state"], _contents(path, hashes, record.get("pieces", {})))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"saved state is damaged: {error}", where=path) from None


def _contents(path: Path, files: Mapping[str, str], pieces: Mapping[str, Any]) -> dict[str, Stored]:
    """Every tensor of a saved folder."""
    found = {
        name: Stored(name, tuple(known["shape"]), tuple((path / f, tuple(o), tuple(s)) for f, o, s in known["parts"]))
        for name, known in pieces.items()
    }
    for file in files:
        with safe_open(path / file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - a handle, not a dict
                if name not in found:
                    shape = tuple(opened.get_slice(name).get_shape())
                    found[name] = Stored(name, shape, ((path / file, (0,) * len(shape), shape),))
    return found


def read(tree: Any) -> Any:
    """A loaded state, or a part of it, with its tensors in memory."""
    if isinstance(tree, Stored):
        return tree.read()
    if isinstance(tree, dict):
        return {key: read(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(read(value) for value in tree)
    return tree


def per_parameter(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any], change: Callable[[Tensor, Any], Any]
) -> dict[str, Any]:
    """An optimiser's state dict with each value of each parameter's state replaced by `change(parameter, value)`."""
    parameters = [parameter for part in optimizer.param_groups for parameter in part["params"]]
    changed = {
        index: {key: change(parameters[index], value) for key, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": changed}


def _pack(value: Any, name: str, tensors: dict[str, Tensor], regions: dict[str, Region]) -> Any:
    """`value` as JSON; its tensors move to `tensors` under their place in the tree, places of pieces to `regions`."""
    if isinstance(value, Piece):
        if value.written and value.tensor.numel():
            tensors[name], regions[name] = value.tensor.detach().to("cpu", copy=True).contiguous(), value.region
        return {"$tensor": name}
    if isinstance(value, Tensor):
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"$tensor": name}
    if isinstance(value, Mapping):
        return {"$dict": [[key, _pack(item, f"{name}/{key}", tensors, regions)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_pack(item, f"{name}/{index}", tensors, regions) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"state {name} holds a {type(value).__name__}; use tensors and JSON values")


def _unpack(tree: Any, tensors: Mapping[str, Any]) -> Any:
    if isinstance(tree, list):
        return [_unpack(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "$tensor":
        return tensors[content]
    if kind == "$tuple":
        return tuple(_unpack(item, tensors) for item in content)
    return {key: _unpack(item, tensors) for key, item in content}


@torch.no_grad()
def restore_tensors(
    into: Mapping[str, Tensor],
    stored: Mapping[str, Stored],
    where: Path,
    regions: Mapping[str, Region] | None = None,
) -> None:
    """Copy saved tensors into parameters or buffers of the same names and shapes.

    Args:
        regions: of which rectangle a tensor of `into` is; those not named are whole.

    Raises:
        UserError: the saved state belongs to another model.
    """
    parts = regions or {}
    wanted = {name: parts[name].shape if name in parts else tuple(tensor.shape) for name, tensor in into.items()}
    found = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    if wanted != found:
        name = min(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
        what = f"saved state belongs to another model: {name} is {found.get(name)} there and {wanted.get(name)} here"
        raise UserError(what, where=where, fix="delete the folder, or give this run another one")
    for name, tensor in into.items():
        tensor.copy_(stored[name].read(parts.get(name)))
