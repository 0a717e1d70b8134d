"""The training loop: steps of updates of microbatches, the same for pre-training, fine-tuning and reinforcement.

Randomness: the global torch stream is set anew from (seed, step) before every step, so dropout neither depends on what
ran before nor needs saving; a resumed run gives bitwise the same losses on CPU.

Several processes run the same steps on their shares of the data (`parallel.py`). What decides anything (the clock, a wish
to stop) is agreed on in each step, so that all of them save, validate and stop together.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from nestling.core import ranks
from nestling.core.errors import Interrupted, UserError
from nestling.core.metrics import Progress, read_metrics, say
from nestling.core.registry import find
from nestling.core.runtime import Runtime, keep_freed_memory, measured_peak, stream_seed
from nestling.training import resume
from nestling.training.compiling import Compiler
from nestling.training.contract import MICROBATCH, Objective, Update
from nestling.training.float8 import round_linears
from nestling.training.hooks import Hook, Logging, Run, Saving, Validating
from nestling.training.parameters import group, hidden_names
from nestling.training.precision import Weights, training_dtype
from nestling.training.recompute import recompute_blocks
from nestling.training.settings import TrainSettings

SHOWN = ("loss", "tokens_per_second", "utilisation")  # beside the progress bar


@dataclass(frozen=True)
class TrainResult:
    """What a finished run amounted to; `history` are the rows of metrics.jsonl, `stopped` why it ended early."""

    steps: int
    tokens: float
    seconds: float
    tokens_per_second: float
    utilisation: float
    history: list[dict[str, Any]]
    stopped: str | None = None


def train(
    objective: Objective,
    settings: TrainSettings,
    *,
    folder: Path,
    runtime: Runtime,
    seed: int,
    hooks: Sequence[Hook] = (),
    quiet: bool = False,
) -> TrainResult:
    """Train the objective's modules in place; afterwards they hold full-precision weights.

    The state in `folder`/resume, where there is one, is gone on from. Of several processes each calls this; `folder` is one
    that all of them see, and the main one writes there.

    Args:
        folder: gets metrics.jsonl and resume/.
        hooks: called after validation and before logging, so they may add to the row.
        quiet: no progress and no lines.

    Raises:
        UserError: the loss is not finite any more, or the disk is full; saved states are kept.
        Interrupted: Ctrl-C or SIGTERM; the step was finished and saved.
    """
    loop = _Loop(objective, settings, folder, runtime, seed, quiet or not ranks.is_main())
    done = False
    try:
        loop.restore()
        loop.run_steps([Validating(), *hooks, Logging(), Saving()])
        done = True
    finally:
        loop.close(failed=not done)
    return loop.result()


@dataclass
class _Tally:
    """Sums over the updates of one step, kept as tensors until somebody reads them."""

    updates: int = 0
    tokens: float = 0.0
    norm: Tensor | float = 0.0
    terms: dict[str, Tensor] = field(default_factory=dict)
    loss: Tensor | float = 0.0

    def read(self, device: torch.device) -> dict[str, float]:
        """Means over the step's updates: loss, each term per its unit, grad_norm. Waits for the device, once."""
        values = {"loss": self.loss, **self.terms, "grad_norm": self.norm}
        numbers = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) for value in values.values()])
        return {name: value / max(1, self.updates) for name, value in zip(values, numbers.tolist(), strict=True)}


class _Loop:
    """The moving parts of one call of `train`."""

    def __init__(
        self, objective: Objective, settings: TrainSettings, folder: Path, runtime: Runtime, seed: int, quiet: bool
    ) -> None:
        self.objective, self.settings, self.folder, self.runtime = objective, settings, folder, runtime
        self.seed, self.quiet = seed, quiet
        if runtime.device.type == "cpu":
            keep_freed_memory()
        self.modules = objective.trainable()
        for module in self.modules.values():
            module.train()
        self.stack, hidden = ExitStack(), hidden_names(self.modules)
        if settings.recompute == "blocks":
            self.stack.callback(recompute_blocks(self.modules))
        if settings.precision == "fp8":
            self.stack.callback(round_linears(self.modules, runtime.device, settings.parallel))
        dtype, regular = training_dtype(settings.precision, runtime), objective.fixed_shapes
        self.weights = Weights(self.modules, dtype) if not ranks.is_distributed() else self.shared(dtype, regular)
        groups = group(self.weights.masters, hidden, self.weights.assembly)
        self.optimizers = find("training.optimizers", settings.optimizer).build(groups, settings, runtime)
        self.peaks = [[part["lr"] for part in optimizer.param_groups] for optimizer in self.optimizers]
        self.schedule = find("training.schedules", settings.schedule).multiplier
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=self.weights.dtype == torch.float16)
        plain = settings.compile != "auto" or (objective.fixed_shapes and not self.weights.sharded)
        choice = settings.compile if plain else "off"
        self.compiler = Compiler(choice, self.modules, folder / "resume" / "compile.json", self.say)
        self.run = Run(
            objective, settings, folder, runtime, lambda: self.weights.context(runtime.device), self.save, self.weights.whole,
            self.weights.gradients,
        )  # fmt: skip
        self.asked: list[str] = []  # signals that this process got
        self.stopping = False  # whether any process got one
        self.utilisation = 0.0
        self._begun = time.monotonic()
        self._peak = 0.0  # FLOP/s
        self._learning = 0.0  # seconds in steps, without hooks

    def shared(self, dtype: torch.dtype, regular: bool) -> Weights:
        """The weights as several processes hold them."""
        from nestling.training.parallel import arranged  # seconds to import, of no use to a single process

        arrangement = arranged(self.modules, dtype, self.settings.parallel, self.runtime.device, regular)
        return self.stack.enter_context(arrangement)

    def say(self, text: str) -> None:
        if not self.quiet:
            say(text)

    # --- steps ---------------------------------------------------------------------------------------------------

    def run_steps(self, hooks: list[Hook]) -> None:
        """Every step that is left, with its hooks; ends early when the objective or the user asks for it."""
        run = self.run
        shown = Progress(self.folder.name, self.settings.steps, "steps", quiet=self.quiet, done=run.step)
        with _signals(self.asked), shown as progress:
            for hook in hooks:
                hook.on_start(run)
            while not run.last:
                begun = time.perf_counter()
                self.one_step(run.step + 1)
                for hook in hooks:
                    hook.on_step(run)
                run.seconds += time.perf_counter() - begun
                progress.advance(1, **{name: run.row[name] for name in SHOWN})
                if self.stopping or (self.asked and not ranks.is_distributed()):
                    if not run.last:  # the last step has been saved already
                        self.save()
                    raise Interrupted(
                        f"stopped by {next(iter(self.asked), 'a signal')} after step {run.step} of {self.settings.steps}, saved; "
                        "run the same command again to go on"
                    )
        for hook in hooks:
            hook.on_end(run)

    def one_step(self, step: int) -> None:
        """The updates of one step, and the row of its numbers."""
        begun = time.perf_counter()
        self.compiler.before(step)
        torch.manual_seed(stream_seed(self.seed, "training", step, *([ranks.reader()] if ranks.reader() else [])))
        self.set_rates(step)
        tally = _Tally()
        for update in self.updates(step):
            self.learn(update, tally)
        numbers, seconds = self.agreed(tally.read(self.runtime.device), begun)
        self.check(step, numbers)
        self.compiler.after(step, self.settings.steps, seconds)
        self.finish(step, tally.tokens, seconds, numbers)

    def agreed(self, numbers: dict[str, float], begun: float) -> tuple[dict[str, float], float]:
        """The step's numbers over all data, and how long it took: the same on every process. Sets clock and `stopping`."""
        main = {"seconds": time.perf_counter() - begun, "clock": time.monotonic() - self._begun}
        if ranks.is_distributed():
            copies = ranks.world_size() / ranks.readers()  # each reader's share counts once
            shares = {name: value / copies for name, value in numbers.items() if name != "grad_norm"}
            mains = {f"main {name}": value * ranks.is_main() for name, value in main.items()}
            total = ranks.sum_over_all({**shares, **mains, "asked": float(bool(self.asked))})
            numbers = {name: total.get(name, value) for name, value in numbers.items()}
            main = {name: total[f"main {name}"] for name in main}
            self.stopping = total["asked"] > 0
        self.run.clock = main["clock"]
        return numbers, main["seconds"]

    def updates(self, step: int) -> Iterator[Update]:
        """The objective's updates, each made inside the precision context."""
        with self.run.precision():
            iterator = iter(self.objective.updates(step))
        while True:
            with self.run.precision():
                update = next(iterator, None)
            if update is None:
                return
            yield update

    def learn(self, update: Update, tally: _Tally) -> None:
        """One optimiser step: loss = sum of weight x sum / counts[per] over all microbatches."""
        counts = {MICROBATCH: len(update.microbatches) * ranks.readers(), **update.counts}
        for microbatch in update.microbatches:
            loss: Tensor | float = 0.0
            with self.run.precision():
                for term in self.objective.terms(microbatch):
                    mean = term.sum.float() / counts[term.per]
                    loss = loss + term.weight * mean
                    tally.terms[term.name] = tally.terms.get(term.name, 0.0) + mean.detach()
            if isinstance(loss, Tensor):
                self.scaler.scale(loss).backward()
                self.weights.collect()
                tally.loss = tally.loss + loss.detach()
        self.weights.reduce()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        tally.norm = tally.norm + self.weights.clip(self.settings.clip)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        self.weights.publish()
        tally.updates += 1
        tally.tokens += counts.get("tokens", 0)

    def set_rates(self, step: int) -> None:
        """Learning rates of the step: the schedule's share of each group's peak."""
        share = self.schedule(step, self.settings)
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for part, peak in zip(optimizer.param_groups, peaks, strict=True):
                part["lr"] = peak * share

    def check(self, step: int, numbers: dict[str, float]) -> None:
        """Stop at a loss or gradient that is no number, before a hook could save what it led to."""
        healthy = math.isfinite(numbers["loss"]) and (math.isfinite(numbers["grad_norm"]) or self.scaler.is_enabled())
        if not healthy:
            kept = resume.saved(self.folder / "resume")
            good = f"the state in {kept[0]} is still good" if kept else "nothing was saved yet"
            raise UserError(
                f"the loss is not finite any more in step {step}",
                where=f"{self.folder.name}.learning_rate",
                value=self.settings.learning_rate,
                fix=f"use a lower learning rate, such as {self.settings.learning_rate / 3:.2g}; {good}",
            )

    def finish(self, step: int, tokens: float, seconds: float, numbers: dict[str, float]) -> None:
        """Record a finished step in the run and in its row."""
        run = self.run
        run.step, run.tokens = step, run.tokens + tokens
        run.stopped = self.objective.finished()
        self._learning += seconds
        self.utilisation = self.share_of_peak(tokens / seconds)
        run.row = {
            "step": step,
            **numbers,
            **self.objective.metrics(),
            "lr": self.optimizers[0].param_groups[0]["lr"],
            "tokens": run.tokens,
            "tokens_per_second": tokens / seconds,
            "utilisation": self.utilisation,
            "seconds": run.seconds + seconds,
            "eta": (run.seconds + seconds) / step * (self.settings.steps - step),
        }

    def flops_per_token(self) -> float:
        """The objective's figure, or 6 per trainable parameter."""
        return self.objective.flops_per_token() or 6.0 * self.weights.numel()

    def share_of_peak(self, tokens_per_second: float) -> float:
        """FLOP/s of each process beside the most that it was seen to do in the training dtype; at most 1.

        Measured at the first call, and again whenever training is faster: other work had slowed the measurement down.
        """
        reached = tokens_per_second * self.flops_per_token() / ranks.world_size()
        if not self._peak or reached > self._peak:
            dtype = torch.float8_e4m3fn if self.settings.precision == "fp8" else self.weights.dtype
            again = measured_peak(Runtime(self.runtime.device, dtype, self.runtime.threads))
            self._peak = max(self._peak, again, reached)
        return reached / self._peak

    # --- state ---------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Everything needed to go on bitwise, in full precision."""
        run, where = self.run, self.folder / "resume"
        state = {
            "weights": {name: self.weights.piece(p, p) for name, p in self.weights.masters.items()},
            "buffers": self.buffers(),
            "optimizers": [
                resume.per_parameter(optimizer, optimizer.state_dict(), self.weights.piece) for optimizer in self.optimizers
            ],
            "scaler": self.scaler.state_dict(),
            "objective": self.objective.state_dict(),
            "run": {"tokens": run.tokens, "seconds": run.seconds, "learning": self._learning, "stopped": run.stopped},
        }
        if self.weights.sharded:
            resume.save_pieces(where, run.step, state, self.settings.keep)
        elif ranks.is_main():
            resume.save(where, run.step, state, self.settings.keep)

    def restore(self) -> None:
        """Take up the newest good state, if there is one."""
        where = self.folder / "resume"
        found = resume.load_newest(where)
        if found is None:
            return
        step, state, complaints = found
        for complaint in complaints:
            self.say(f"{complaint}; going on from the one before")
        resume.restore_tensors(self.weights.masters, state["weights"], where, self.weights.regions)
        resume.restore_tensors(self.buffers(), state["buffers"], where)
        for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(resume.per_parameter(optimizer, stored, self.weights.part))
        self.scaler.load_state_dict(resume.read(state["scaler"]))
        self.objective.load_state_dict(resume.read(state["objective"]))
        self.weights.publish()
        run, past = self.run, state["run"]
        run.step, run.tokens, run.seconds, run.stopped = step, past["tokens"], past["seconds"], past["stopped"]
        self._learning = past["learning"]
        self.say(f"{self.folder.name}: going on after step {step} of {self.settings.steps}")

    def buffers(self) -> dict[str, Tensor]:
        """Persistent buffers of the trained modules, by name."""
        found = {}
        for name, module in self.modules.items():
            parameters = {path for path, _ in module.named_parameters(remove_duplicate=False)}
            found.update({f"{name}.{k}": v for k, v in module.state_dict().items() if k not in parameters})
        return found

    def close(self, failed: bool) -> None:
        """Full-precision weights and plain calls for whoever uses the modules next."""
        self.compiler.close()
        self.weights.close(failed)
        self.stack.close()

    def result(self) -> TrainResult:
        """The run in figures."""
        run, log = self.run, self.folder / "metrics.jsonl"
        ranks.barrier()  # until the main process has written the last row
        rate = run.tokens / self._learning if self._learning else 0.0
        history = read_metrics(log) if log.exists() else []
        return TrainResult(run.step, run.tokens, run.seconds, rate, self.share_of_peak(rate), history, run.stopped)


@contextmanager
def _signals(asked: list[str]) -> Iterator[None]:
    """Ctrl-C and SIGTERM fill the list; the second Ctrl-C interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append("Ctrl-C" if number == signal.SIGINT else "SIGTERM")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
