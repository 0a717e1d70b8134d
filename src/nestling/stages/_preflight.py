"""Whether a run will fit, said before it begins: the memory, disk and time of its stages against what the machine has."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from nestling.core import ranks
from nestling.core.errors import UserError
from nestling.core.machine import PeakMemory, Room, free_memory, held_memory
from nestling.core.metrics import say
from nestling.core.pipeline import Plan, finished
from nestling.core.registry import find
from nestling.core.runtime import Runtime, give_back_freed_memory, launched, measured_peak
from nestling.core.storage import read_json
from nestling.model.config import DecoderConfig
from nestling.model.hub import from_hub
from nestling.model.locate import MODEL
from nestling.planning.memory import ADAMW, Memory, Weights
from nestling.planning.time import TYPICAL_UTILISATION, Speed
from nestling.planning.work import Known, Way, Work
from nestling.training.contract import Objective
from nestling.training.hooks import Hook, Run
from nestling.training.parameters import hidden_names, named_parameters
from nestling.training.precision import training_dtype
from nestling.training.settings import TrainSettings

GB = 1e9
SPARE = 1.3  # how much more than predicted has to be free before memory is wasted on speed
LOOKED_AT = 4  # batches whose lengths are looked at before the first step


class Loader(Protocol):
    """Gives batches of texts of different `lengths` [N]."""

    def batch(self, step: int) -> Any:
        """The batch of a step, from 0."""


@dataclass(frozen=True)
class Planned:
    """A stage of a recipe and, where it trains something, what that takes."""

    stage: Plan
    work: Work | None


def planned(stages: Sequence[Plan], out: Path) -> list[Planned]:
    """What each stage will do, from settings alone; models come from earlier stages or from folders that are there."""
    known: dict[Path, DecoderConfig | int] = {}
    found = []
    for stage in stages:
        inputs = {role: known.get(path) or model_in(path) for role, path in stage.reads.items()}
        work = _work(stage, {role: value for role, value in inputs.items() if value is not None})
        if work is not None:
            known[out / stage.spec.name] = work.models[0]
        elif "vocab_size" in type(stage.settings).model_fields:
            known[out / stage.spec.name] = stage.settings.vocab_size  # type: ignore[attr-defined]
        found.append(Planned(stage, work))
    return found


def _work(stage: Plan, inputs: Known) -> Work | None:
    """None for a stage that trains no decoder, or whose models can't be known yet."""
    return stage.module.work(stage.settings, inputs) if hasattr(stage.module, "work") else None


def model_in(folder: Path) -> DecoderConfig | None:
    """The configuration of the model in a folder from outside the run."""
    for path in (folder / MODEL / "config.json", folder / "config.json"):
        if path.exists():
            return from_hub(read_json(path), str(path))[0]
    return None


def way(settings: TrainSettings, runtime: Runtime) -> Way:
    """How a stage with these settings is done here."""
    optimiser = getattr(find("training.optimizers", settings.optimizer), "MEMORY", ADAMW)
    dtype, device = training_dtype(settings.precision, runtime), str(runtime.device)
    return Way(dtype, device, optimiser, settings.recompute == "blocks", ranks.readers())


# --- before the first stage ------------------------------------------------------------------------------------------


def announce(stages: Sequence[Plan], out: Path, runtime: Runtime) -> None:
    """One or two lines about a run that is about to start: where it computes, what it takes, what will hurt."""
    ahead = planned(stages, out)
    left = [one for one in ahead if one.work and not finished(out / one.stage.spec.name, one.stage.key)]
    words = [f"[machine] {runtime.name}"]
    room = free_memory(runtime.device)
    if left:
        sizes = [(memory_of(one, runtime).peak, one) for one in left]
        peak, heaviest = max(sizes, key=lambda pair: pair[0])
        name, about = heaviest.stage.spec.name, "about" if heaviest.work and heaviest.work.exact else "at most"
        beside = f" of {room.free / GB:.1f} GB free" if room else ""
        words.append(f"{name} takes the most memory, {about} {peak / GB:.2f} GB{beside}")
        if room and peak > room.free:
            words.append(f"{name} {'will not' if about == 'about' else 'may not'} fit")
    needed, free = sum(disk_of(one, runtime) for one in left), shutil.disk_usage(_existing(out)).free
    words.append(f"checkpoints {needed / GB:.2f} GB of {free / GB:.0f} GB of disk free")
    if needed > free:
        words.append("the disk will be full before the run ends")
    if left:
        words.append(_expected(ahead, left, out, runtime))
    say(" · ".join(words))


def memory_of(one: Planned, runtime: Runtime) -> Memory:
    """What a training stage takes at its worst moment."""
    assert one.work is not None
    return one.work.memory(way(_training(one.stage), runtime))


def disk_of(one: Planned, runtime: Runtime) -> int:
    """Bytes of a training stage's checkpoint and of the states it can be resumed from, in full precision."""
    assert one.work is not None
    memory, counts = memory_of(one, runtime), [Weights.of(model, one.work.adapters) for model in one.work.models]
    state = 4 * sum(count.learnt for count in counts) + memory.states
    return 4 * counts[0].all + (_training(one.stage).keep + 1) * state  # a new state is written before the oldest goes


def _training(stage: Plan) -> TrainSettings:
    settings: TrainSettings = stage.settings.training  # type: ignore[attr-defined]
    return settings


def _expected(ahead: Sequence[Planned], left: Sequence[Planned], out: Path, runtime: Runtime) -> str:
    """How long the training that is left takes, and how fast the longest stage goes: as fast as stages of this run that are
    done, or before the first at a usual share of what matrix products reach here."""
    seen = [rate for one in ahead if (rate := seen_rate(one, out))]
    rate = max(seen) if seen else Speed(measured_peak(runtime)).flops * ranks.world_size()
    works = {one.stage.spec.name: one.work for one in left if one.work}
    seconds = sum(work.flops() for work in works.values()) / rate
    name, longest = max(works.items(), key=lambda pair: pair[1].flops())
    shown = f"{seconds / 60:.0f} min" if seconds >= 100 else f"{seconds:.0f} s"
    speed = f"{name} {longest.tokens * rate / longest.flops():,.0f} tokens/s"
    guess = "" if seen else f" at {TYPICAL_UTILISATION:.0%} of the peak measured, which very small models don't reach"
    return f"about {shown} of training, {speed}{guess}"


def seen_rate(one: Planned, out: Path) -> float | None:
    """FLOP/s that a finished training stage reached."""
    record = finished(out / one.stage.spec.name, one.stage.key)
    seconds = record["report"].get("training_seconds") if record and one.work else None
    return one.work.flops() / seconds if one.work and seconds else None


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


# --- before the first step of a stage --------------------------------------------------------------------------------


def measured(work: Work | None, loader: Loader) -> Work | None:
    """The work with the longest of a few batches in the place of a guess."""
    if work is None:
        return None
    lengths = max((loader.batch(step).lengths for step in range(LOOKED_AT)), key=lambda found: int(found.sum()))
    return replace(work, sequences=len(lengths), width=-(-int(lengths.sum()) // len(lengths)), exact=True)


class MemoryWatch(Hook):
    """Refuses to begin what will not fit, and puts the predicted and the measured peak (bytes) into every row.

    Where a step fits only without what a C library's heap wastes, freed memory goes back to the system while it trains.

    Args:
        work: what the stage does, as exact as it is known now.

    Raises:
        UserError: too little memory is free, with the settings under which it would do.
    """

    def __init__(self, work: Work, objective: Objective, settings: TrainSettings, runtime: Runtime, name: str) -> None:
        self._runtime, modules = runtime, objective.trainable()
        self._counts = _counted(modules)
        frozen = sum(runtime.dtype.itemsize * Weights.of(model).all for model in work.frozen)
        self._there = frozen + sum(p.nbytes for p in named_parameters(modules).values())
        launch, how = launched(), way(settings, runtime)
        more = self._more(work, how)  # first: what it imports and the threads it starts take memory too
        room = free_memory(runtime.device, launch.local_world if launch and runtime.device.type == "cpu" else 1)
        self._lean = room is not None and SPARE * more > room.free
        if self._lean:
            how = replace(how, heap=False)
            more = self._more(work, how)
        self._predicted = held_memory(runtime.device) + more
        if room and more > room.free and not settings.ignore_memory:
            raise _too_large(name, work.memory(how, self._counts), more, room, self._remedies(work, how, room))
        if self._lean and runtime.device.type == "cpu":
            say(f"{name}: memory is short, freed memory goes back at once; steps take about a tenth longer")

    def _more(self, work: Work, how: Way) -> int:
        """Bytes beyond the weights that are there already."""
        return work.memory(how, self._counts).peak - self._there

    def _remedies(self, work: Work, how: Way, room: Room) -> list[str]:
        """Settings under which the step fits: in more pieces, with recomputation, or both."""
        whole = work.sequences if work.packed else 64  # packed rows have to divide, others needn't
        recomputed, again = replace(how, recompute=True), "training.recompute=blocks"
        pieces = [n for n in (2, 4, 8, 16, 32, 64) if n > work.microbatches and whole % n == 0]
        divided = [(f"{work.pieces_setting}={n}", work.divided(n)) for n in pieces]
        plain = [(label, other, how) for label, other in divided]
        mixed = [(again, work, recomputed), *((f"{again} with {label}", other, recomputed) for label, other in divided)]
        found = []
        for choices in (plain, mixed):
            sizes = ((label, self._more(other, this_way)) for label, other, this_way in choices)
            if fitting := next(((label, size) for label, size in sizes if size <= room.free), None):
                found.append(f"{fitting[0]} ({fitting[1] / GB:.2f} GB)")
        return found

    def on_start(self, run: Run) -> None:
        """Begin to watch."""
        if self._lean:
            give_back_freed_memory()
        self._peak = PeakMemory(self._runtime.device)

    def on_step(self, run: Run) -> None:
        """Note both."""
        run.row |= {"peak_memory": self._peak.read(), "predicted_memory": self._predicted}


def _counted(modules: dict[str, nn.Module]) -> Weights:
    """The weights that are really there: heads, adapters and frozen ones included."""
    parameters = named_parameters(modules)
    learnt = {name: p.numel() for name, p in parameters.items() if p.requires_grad}
    hidden = hidden_names(modules)
    matrices = sum(size for name, size in learnt.items() if name in hidden)
    output = any(name.endswith(("embedding.weight", "head.weight", ".rows")) for name in learnt)
    return Weights(sum(p.numel() for p in parameters.values()), sum(learnt.values()), matrices, output)


def _too_large(name: str, memory: Memory, more: int, room: Room, remedies: Sequence[str]) -> UserError:
    parts = {"weights": memory.weights, "optimiser": memory.states, "gradients": memory.gradients}
    parts |= {"activations": memory.activations + memory.passing, "loss": memory.loss}
    listed = ", ".join(f"{part} {size / GB:.2f}" for part, size in parts.items() if size)
    what = f"a step takes about {more / GB:.2f} GB more memory ({listed}), and {room.free / GB:.2f} GB {room.source} is free"
    ways = " or ".join(remedies) or "a smaller batch, a shorter context or a smaller model"
    fix = f"set {ways}; training.ignore_memory=true starts all the same"
    return UserError(what, where=name, fix=fix)


def memory_figures(row: dict[str, Any]) -> dict[str, float]:
    """Both peaks for the report, in GB, from the last row of a stage's metrics."""
    names = {"peak_memory": "peak_memory_gb", "predicted_memory": "predicted_memory_gb"}
    return {title: round(row[name] / GB, 3) for name, title in names.items() if name in row}
