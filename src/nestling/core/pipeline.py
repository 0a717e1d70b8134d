"""Run a recipe: each stage reads folders, writes one folder, and is marked complete atomically.

A stage's key is a hash of its resolved settings, its inputs' keys (for files of the user's, size and time), the seed and
the stage's own version number. A stage
whose folder already carries that key is skipped; one that was interrupted under the same key resumes; a folder of
another key steps aside into `.previous/` and comes back if its settings do.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from nestling import __version__
from nestling.core import ranks
from nestling.core.config import Config, nearest, parse
from nestling.core.errors import Interrupted, UserError
from nestling.core.metrics import say
from nestling.core.recipe import Recipe, StageSpec
from nestling.core.registry import find
from nestling.core.runtime import Runtime
from nestling.core.storage import FolderLock, content_hash, disk_error, finite, read_json, sweep, write_json

DIARY = ".run.json"
"""File of a run folder that tells those who look on what the run does: see `Diary`. Hidden, as it is no result."""
KEPT_ASIDE = 3  # earlier results of one stage that stay in .previous


@dataclass(frozen=True)
class StageContext:
    """What a running stage knows about its surroundings.

    >>> context.reads["tokenizer"]                                           # doctest: +SKIP
    PosixPath('runs/demo/tokenizer')
    """

    name: str
    folder: Path
    reads: Mapping[str, Path]
    seed: int
    runtime: Runtime
    quiet: bool = False

    def report_of(self, role: str) -> dict[str, Any]:
        """What the stage behind an input reported, empty for a folder that no stage wrote."""
        record = self.reads[role] / "stage.json"
        return read_json(record)["report"] if record.exists() else {}


@dataclass(frozen=True)
class Plan:
    """A stage with everything resolved, ready to run."""

    spec: StageSpec
    module: ModuleType
    settings: Config
    reads: Mapping[str, Path]
    key: str


def plan(recipe: Recipe, out: Path, until: str | None = None) -> list[Plan]:
    """Resolve every stage before the first one runs, so that a mistake in the last is found at once.

    Raises:
        UserError: unknown stage, setting or input.
    """
    names = [spec.name for spec in recipe.stages]
    if until is not None and until not in names:
        raise UserError("the recipe has no such stage", where="--until", value=until, fix=nearest(until, names))
    plans: dict[str, Plan] = {}
    for spec in recipe.stages:
        plans[spec.name] = _plan_stage(spec, recipe.seed, out, plans)
        if spec.name == until:
            break
    return list(plans.values())


def _plan_stage(spec: StageSpec, seed: int, out: Path, earlier: Mapping[str, Plan]) -> Plan:
    module = find("stages", spec.stage, f"{spec.name}.stage")
    settings = parse(module.Settings, spec.settings, spec.name)
    folders: dict[str, Path] = {}
    keys: dict[str, str] = {}
    for role, source in _sources(spec, module, earlier).items():
        folders[role] = out / source if source in earlier else Path(source)
        keys[role] = earlier[source].key if source in earlier else content_hash(Path(source))
    files = getattr(module, "files", None)  # only stages that read files from outside the run have one
    keys |= {str(path): _stamp(path) for path in files(settings, seed)} if files else {}
    body = [spec.stage, module.VERSION, settings.model_dump(mode="json"), keys, seed]
    key = hashlib.blake2b(json.dumps(body, sort_keys=True).encode(), digest_size=12).hexdigest()
    return Plan(spec, module, settings, folders, key)


def _stamp(path: Path) -> str:
    """Tells a changed file at once, however large it is: its size and the time it was last written."""
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _sources(spec: StageSpec, module: ModuleType, earlier: Mapping[str, Plan]) -> dict[str, str]:
    """For each input role the stage or path it comes from; a role whose name ends in "?" may stay empty."""
    roles = {role.rstrip("?"): (role.endswith("?"), default) for role, default in module.READS.items()}
    for role in spec.reads:
        if role not in roles:
            raise UserError("this stage has no such input", where=f"{spec.name}.reads.{role}", fix=nearest(role, roles))
    sources = {}
    for role, (optional, default) in roles.items():
        source = spec.reads.get(role, default)
        if source in earlier or (role in spec.reads and Path(source).exists()):
            sources[role] = source
        elif role in spec.reads or not optional:
            fix = f"earlier stages: {', '.join(earlier) or 'none'}; or give a path that exists"
            raise UserError("input not found", where=f"{spec.name}.reads.{role}", value=source, fix=fix)
    return sources


def run(
    recipe: Recipe,
    out: Path,
    runtime: Runtime,
    until: str | None = None,
    quiet: bool = False,
    before: Callable[[Sequence[Plan], Path, Runtime], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Run a recipe into the folder `out`; returns each stage's report by name.

    Of several processes (torchrun) all work on stages that train; the main one does the others while the rest waits. They
    must see one file system.

    Args:
        before: called once with all that is about to run, unless quiet.

    Raises:
        UserError: bad input, a locked or read-only folder, a full disk. Finished stages stay finished.
        Interrupted: Ctrl-C; the stage will resume.
    """
    plans = plan(recipe, out, until)
    reports = {}
    with ranks.group(runtime.device), ExitStack() as opened:
        _check(plans, out, runtime)
        if ranks.is_main():
            opened.enter_context(FolderLock(out))
            opened.enter_context(Diary(out, plans))
        try:
            if ranks.is_main():
                write_json(out / "recipe.json", recipe.model_dump(mode="json"))
                if before and not quiet:
                    before(plans, out, runtime)
            for number, stage in enumerate(plans, 1):
                title = f"[{number}/{len(plans)}] {stage.spec.name}"
                work = _run_stage if ranks.is_main() else _help_stage
                reports[stage.spec.name] = work(stage, recipe.seed, out, runtime, quiet, title)
            ranks.barrier()  # the main process may hold the store in which the others still look for what is done
        except OSError as error:
            raise disk_error(error, Path(error.filename or out)) from error
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted in {stage.spec.name}; run the same command again to go on") from None
    return reports


def _check(plans: Sequence[Plan], out: Path, runtime: Runtime) -> None:
    """Let each stage that is not done say what it can't be done with here, before the first one computes anything.

    Raises:
        UserError: what a stage's settings' own `check` finds.
    """
    for stage in plans:
        done = finished(out / stage.spec.name, stage.key) or finished(_shelved(out / stage.spec.name, stage.key))
        if not done and hasattr(stage.settings, "check"):  # only those of stages that train have one
            try:
                stage.settings.check(runtime)
            except UserError as error:
                raise error.at(stage.spec.name) from None


class Diary:
    """`.run.json`: {"keys": {stage: key}, "begun": time, "state": "running" | "finished" | "stopped" | "failed", "error"}.

    A process that was killed leaves "running" behind, but no lock.
    """

    def __init__(self, out: Path, plans: Sequence[Plan]) -> None:
        self._path = out / DIARY
        self._told: dict[str, Any] = {"keys": {stage.spec.name: stage.key for stage in plans}}

    def __enter__(self) -> None:
        self._told["begun"] = _now()
        write_json(self._path, self._told | {"state": "running"})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        told = {**self._told, "ended": _now(), "state": "stopped" if stopped else "failed" if error else "finished"}
        if told["state"] == "failed":
            told["error"] = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        with suppress(UserError):  # a full disk must not hide what went wrong
            write_json(self._path, told)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _run_stage(stage: Plan, seed: int, out: Path, runtime: Runtime, quiet: bool, title: str) -> dict[str, Any]:
    folder = out / stage.spec.name
    if (record := finished(folder, stage.key)) or (record := _bring_back(folder, stage.key)):
        say(f"{title}: unchanged, skipped ({record['seconds']:.0f} s saved)")
        ranks.tell(f"{stage.spec.name} done", "skipped")
        return record["report"]
    resuming = _prepare(folder, stage.key)
    say(f"{title}: {'resuming' if resuming else 'starting'}")
    context = StageContext(stage.spec.name, folder, stage.reads, seed, runtime, quiet)
    started = time.perf_counter()
    ranks.tell(f"{stage.spec.name} begins", "now")
    report = finite(stage.module.run(stage.settings, context))
    seconds = time.perf_counter() - started
    _complete(stage, folder, seed, report, seconds)
    say(f"{title}: done in {seconds:.0f} s")
    ranks.tell(f"{stage.spec.name} done", "now")
    return report


def _help_stage(stage: Plan, seed: int, out: Path, runtime: Runtime, quiet: bool, title: str) -> dict[str, Any]:
    """What the other processes do in a stage: train with the main one, wait for what it does alone."""
    folder = out / stage.spec.name
    begins, done = f"{stage.spec.name} begins", f"{stage.spec.name} done"
    if "training" in type(stage.settings).model_fields and ranks.first_told(begins, done) == begins:
        stage.module.run(stage.settings, StageContext(stage.spec.name, folder, stage.reads, seed, runtime, quiet=True))
    ranks.first_told(done)
    return read_json(folder / "stage.json")["report"]


def finished(folder: Path, key: str | None = None) -> dict[str, Any] | None:
    """The record of a completed stage folder, if it is complete (and carries `key`, when given)."""
    path = folder / "stage.json"
    if not path.exists():
        return None
    record = read_json(path)
    return record if key in (None, record["key"]) else None


def _prepare(folder: Path, key: str) -> bool:
    """Make the stage's folder ready; True when an interrupted attempt under the same key is there to resume."""
    started = folder / "started.json"
    if started.exists() and not (folder / "stage.json").exists() and read_json(started)["key"] == key:
        sweep(folder)
        return True
    if folder.exists():
        _step_aside(folder)
    write_json(started, {"key": key})
    return False


def _step_aside(folder: Path) -> None:
    """Keep a completed result of other settings in .previous; an unfinished one is of no use and goes.

    Raises:
        UserError: the folder was not made by a run, and may be dear to somebody.
    """
    record = finished(folder)
    if record is None:
        sweep(folder)
        if not (folder / "started.json").exists() and (not folder.is_dir() or any(folder.iterdir())):
            fix = "choose another folder with --out, or move it away"
            raise UserError("in the way of a stage, and not made by a run", where=folder, fix=fix)
        shutil.rmtree(folder)
        return
    target = _shelved(folder, record["key"])
    target.parent.mkdir(exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    folder.rename(target)
    kept = sorted(target.parent.glob(f"{folder.name}-*"), key=lambda path: path.stat().st_mtime)
    for old in kept[:-KEPT_ASIDE]:
        shutil.rmtree(old)


def _shelved(folder: Path, key: str) -> Path:
    """Where an earlier result of a stage lies."""
    return folder.parent / ".previous" / f"{folder.name}-{key}"


def _bring_back(folder: Path, key: str) -> dict[str, Any] | None:
    """An earlier result under this very key, taken from .previous."""
    shelved = _shelved(folder, key)
    if not finished(shelved, key):
        return None
    if folder.exists():
        _step_aside(folder)
    shelved.rename(folder)
    return finished(folder, key)


def _complete(stage: Plan, folder: Path, seed: int, report: dict[str, Any], seconds: float) -> None:
    record = {
        "key": stage.key,
        "name": stage.spec.name,
        "stage": stage.spec.stage,
        "version": stage.module.VERSION,
        "settings": stage.settings.model_dump(mode="json"),
        "reads": {role: str(path) for role, path in stage.reads.items()},
        "seed": seed,
        "report": report,
        "seconds": round(seconds, 2),
        "finished": _now(),
        "nestling": __version__,
    }
    write_json(folder / "stage.json", record)
