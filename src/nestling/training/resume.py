"""State to go on from: folder/resume/step-N/{tensors.safetensors, state.json}, whole or absent, the newest few kept.

Tensors lie in safetensors and everything else in JSON. `torch.distributed.checkpoint` also works on a single process,
but its metadata file is a pickle and it loads plain values with `torch.load(weights_only=False)`; nothing here may
execute code from a file. A hash of the tensors stands in the JSON, so a damaged newest state is noticed and the one
before it is used.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from nestling.core.errors import UserError
from nestling.core.storage import atomic_folder, content_hash

TENSORS, STATE = "tensors.safetensors", "state.json"


def save(folder: Path, step: int, state: Mapping[str, Any], keep: int = 2) -> Path:
    """Write `state` (nested dicts, lists, tuples of tensors and JSON values) as `folder`/step-N, then drop older ones.

    Raises:
        UserError: the disk is full or read-only; the states that were there are untouched.
    """
    tensors: dict[str, Tensor] = {}
    tree = _pack(state, "", tensors)
    path = folder / f"step-{step:08d}"
    with atomic_folder(path) as temporary:
        safetensors.torch.save_file(tensors, temporary / TENSORS)
        record = {"step": step, "hash": content_hash(temporary / TENSORS), "state": tree}
        (temporary / STATE).write_text(json.dumps(record), encoding="utf-8")
    for old in saved(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    for stale in folder.glob(".step-*"):  # of a process that was killed while writing
        shutil.rmtree(stale, ignore_errors=True)
    return path


def saved(folder: Path) -> list[Path]:
    """The saved states, newest first; they may be damaged."""
    return sorted((path for path in folder.glob("step-*") if path.is_dir()), reverse=True)


def load_newest(folder: Path) -> tuple[int, Any, list[str]] | None:
    """(step, state, complaints about newer states that were damaged), or None where nothing was saved.

    Raises:
        UserError: states are there, and none of them can be read.
    """
    complaints: list[str] = []
    for path in saved(folder):
        try:
            step, state = load(path)
        except UserError as error:
            complaints.append(str(error))
        else:
            return step, state, complaints
    if complaints:
        raise UserError(complaints[0], fix="every saved state is damaged: delete the folder to start over")
    return None


def load(path: Path) -> tuple[int, Any]:
    """The step and the state of one saved folder.

    Raises:
        UserError: a file is missing, cut off or changed.
    """
    try:
        record = json.loads((path / STATE).read_text(encoding="utf-8"))
        if content_hash(path / TENSORS) != record["hash"]:
            raise UserError("saved state is damaged: its tensors don't match their hash", where=path)
        tensors = safetensors.torch.load_file(path / TENSORS)
        return record["step"], _unpack(record["state"], tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"saved state is damaged: {error}", where=path) from None


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON; its tensors move to `tensors` under their place in the tree."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"$tensor": name}
    if isinstance(value, Mapping):
        return {"$dict": [[key, _pack(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_pack(item, f"{name}/{index}", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"state {name} holds a {type(value).__name__}; use tensors and JSON values")


def _unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
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
def restore_tensors(into: Mapping[str, Tensor], saved_tensors: Mapping[str, Tensor], where: Path) -> None:
    """Copy saved tensors into parameters or buffers of the same names and shapes.

    Raises:
        UserError: the saved state belongs to another model.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in into.items()}
    found = {name: tuple(tensor.shape) for name, tensor in saved_tensors.items()}
    if wanted != found:
        name = min(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
        what = f"saved state belongs to another model: {name} is {found.get(name)} there and {wanted.get(name)} here"
        raise UserError(what, where=where, fix="delete the folder, or give this run another one")
    for name, tensor in into.items():
        tensor.copy_(saved_tensors[name])
