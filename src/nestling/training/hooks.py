"""What happens now and then while training: validate, log, save, sample. The loop only calls hooks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nestling.core import ranks
from nestling.core.metrics import MetricsLog
from nestling.core.runtime import Runtime
from nestling.training.contract import Objective
from nestling.training.settings import TrainSettings


@dataclass
class Run:
    """A training run as its hooks see it. `row` holds the current step's numbers; a hook may add to it.

    A hook that runs before logging puts its figures into the same row: {"step": 40, "loss": 3.1, "val_bpb": 1.2, …}.
    """

    objective: Objective
    settings: TrainSettings
    folder: Path
    runtime: Runtime
    precision: Callable[[], AbstractContextManager[None]]
    save: Callable[[], None]
    whole: Callable[[], AbstractContextManager[None]] = nullcontext
    """While it lasts, the modules can be called by one process alone."""
    gradients: Callable[[], dict[str, float]] = dict
    """Of the last update: the norm of each parameter's gradient, by name, before clipping."""
    clock: float = 0.0
    """Seconds since this process began to train; the main process's, so that all of them act alike."""
    step: int = 0
    tokens: float = 0.0
    seconds: float = 0.0
    stopped: str | None = None
    row: dict[str, Any] = field(default_factory=dict)

    @property
    def last(self) -> bool:
        """True in the last step, whether planned or because the objective has finished."""
        return self.step >= self.settings.steps or self.stopped is not None

    def every(self, steps: int) -> bool:
        """True every so many steps and in the last one."""
        return self.last or (steps > 0 and self.step % steps == 0)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The objective's held-out figures with dropout off."""
        modules = self.objective.trainable().values()
        modes = [module.training for module in modules]
        for module in modules:
            module.eval()
        try:
            with self.precision():
                return self.objective.validate()
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.train(mode)


class Hook:
    """Something periodic; override what is needed. `on_step` follows every step, `on_end` the last one."""

    def on_start(self, run: Run) -> None:
        """Before the first step, after a resumed state is in place."""

    def on_step(self, run: Run) -> None:
        """After each step."""

    def on_end(self, run: Run) -> None:
        """After the last step; not when training is interrupted or fails."""


class Validating(Hook):
    """Held-out figures into the row, every `validate_every` steps and at the end."""

    def on_step(self, run: Run) -> None:
        """Validate where it is due."""
        if run.every(run.settings.validate_every):
            run.row.update(run.validate())
            run.stopped = run.stopped or run.objective.finished()


class Logging(Hook):
    """Rows of metrics.jsonl: every `log_every` steps, the first, the last, and those that were validated.

    Where a step since the last row had a larger gradient than the row's own, its norm is noted beside: `grad_norm_max`.
    """

    _largest = 0.0

    def on_start(self, run: Run) -> None:
        """Open the file; rows of steps that will be run again are dropped."""
        self._log = MetricsLog(run.folder / "metrics.jsonl", run.step) if ranks.is_main() else None

    def on_step(self, run: Run) -> None:
        """Write the row where it is due."""
        self._largest = max(self._largest, run.row.get("grad_norm", 0.0))
        if self._log and (
            run.step == 1
            or run.every(run.settings.log_every)
            or (run.settings.validate_every and run.every(run.settings.validate_every))
        ):
            if self._largest > run.row.get("grad_norm", 0.0):
                run.row["grad_norm_max"] = self._largest
            self._log.write(run.row)
            self._largest = 0.0

    def on_end(self, run: Run) -> None:
        """Close the file."""
        if self._log:
            self._log.close()


class Saving(Hook):
    """The state to resume from, every `save_every` seconds and at the end."""

    def on_start(self, run: Run) -> None:
        """Start the clock."""
        self._saved = run.clock

    def on_step(self, run: Run) -> None:
        """Save where it is due."""
        if run.last or run.clock - self._saved >= run.settings.save_every:
            run.save()
            self._saved = run.clock


class Sampling(Hook):
    """Calls `sample(step)` every so many steps, on the main process; what it writes is its own affair."""

    def __init__(self, every: int, sample: Callable[[int], None]) -> None:
        self._every, self._sample = every, sample

    def on_step(self, run: Run) -> None:
        """Sample where it is due."""
        if not run.every(self._every):
            return
        with run.whole():
            if ranks.is_main():
                with torch.no_grad(), run.precision():
                    self._sample(run.step)
