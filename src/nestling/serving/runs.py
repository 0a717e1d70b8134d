"""Runs of recipes as the page shows them: found in one folder, and read again and again while they go on.

Nothing is written, and no name that a client sends becomes part of a path: it is looked up among the runs that are there.
What a run folder links to outside itself is not read.
"""

from __future__ import annotations

import base64
import hmac
import json
import re
import secrets
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from nestling.core.errors import UserError
from nestling.core.pipeline import DIARY
from nestling.core.storage import finite, is_locked, read_json
from nestling.report.records import number
from nestling.serving.store.records import Missing

RECIPE, RECORD, REPORT = "recipe.json", "stage.json", "report.html"
LOGS = {"rows": "metrics.jsonl", "samples": "samples.jsonl"}
PART = 1 << 20
"""Bytes of a log that are read at once."""
LARGEST = 2**60
"""Bytes that no log has."""
MARK = 64
"""Bytes before a place in a log by which it is known again: a run that goes on after a stop rewrites its logs."""
DEFAULT = Path("runs")
"""Where `nestling run` puts runs unless told otherwise."""
Row = dict[str, Any]
Places = Mapping[str, list[int]]
"""For each log of each stage, "sft/rows": [bytes that were read, checksum of the last of them]."""


class Runs:
    """The runs of a folder.

    Args:
        folder: holds run folders, or is one; it may come into being later.

    >>> Runs(Path("runs")).all()[0]["state"]                              # doctest: +SKIP
    'running'
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._secret = secrets.token_bytes(16)

    @classmethod
    def around(cls, folders: Sequence[Path]) -> Runs:
        """The runs beside the first of these folders that is in a run, or `DEFAULT`."""
        above = (place for folder in folders for place in (folder.absolute(), *folder.absolute().parents))
        return cls(next((place.parent for place in above if _is_file(place / RECIPE)), DEFAULT))

    def all(self) -> list[Row]:
        """What every run is and how far it has come, the latest first."""
        told = [_summary(name, folder) for name, folder in self._found().items()]
        return sorted(told, key=lambda run: (run["state"] == "running", run["updated"]), reverse=True)

    def get(self, name: str) -> Row:
        """A run with the settings and figures of its stages.

        Raises:
            Missing: there is no such run.
        """
        folder = self._run(name)
        run = _summary(name, folder)
        specs = {spec["name"]: spec for spec in _specs(folder)}
        for stage in run["stages"]:
            record, spec = _record(folder, stage["name"]), specs[stage["name"]]
            own = {key: record.get(key) or spec.get(key) or {} for key in ("settings", "reads")}
            figures = {key: number(value) for key, value in (record.get("report") or {}).items()}
            stage |= finite(own) | {"figures": {key: value for key, value in figures.items() if value is not None}}
        report = f"/runs/{name}/{REPORT}?ticket={self._ticket(name)}"
        return run | {"report": report if _inside(folder, REPORT) else None}

    def news(self, name: str, after: str = "") -> Row:
        """What was logged since the answer whose `next` is `after`.

        Gives {"stages": {name: {"rows": […], "samples": […], "fresh": [logs that begin anew]}}, "next", "more"}.

        Raises:
            Missing: there is no such run.
            UserError: `after` is not what an answer had as `next`.
        """
        folder, places = self._run(name), _decoded(after)
        stages: dict[str, Row] = {}
        reached: dict[str, list[int]] = {}
        more = False
        for stage in (spec["name"] for spec in _specs(folder)):
            for log, file in LOGS.items():
                if (path := _inside(folder, stage, file)) is None:
                    continue
                key = f"{stage}/{log}"
                try:
                    part = _tail(path, places.get(key, [0, 0]))
                except OSError:  # a stage that begins anew has just replaced its folder
                    continue
                told = stages.setdefault(stage, {"fresh": []})
                told[log], reached[key] = part.rows, part.place
                told["fresh"] += [log] * part.fresh
                more |= part.more
        return {"stages": stages, "next": _encoded(reached), "more": more}

    def report(self, name: str, ticket: str) -> Path:
        """The report of a run, for who was given the ticket with `get`: a browser's frame can't send a key.

        Raises:
            Missing: no such run, no report yet, or another ticket.
        """
        found = _inside(self._run(name), REPORT)
        if found is None or not hmac.compare_digest(ticket.encode(), self._ticket(name).encode()):
            raise Missing("there is no such report", value=name)
        return found

    def _ticket(self, name: str) -> str:
        return hmac.digest(self._secret, name.encode(), "sha256").hex()[:32]

    def _run(self, name: str) -> Path:
        found = self._found()
        if name not in found:
            raise Missing("there is no such run", value=name)
        return found[name]

    def _found(self) -> dict[str, Path]:
        """The run folders by name."""
        if not self._folder.is_dir():
            return {}
        if _is_file(self._folder / RECIPE):
            return {self._folder.resolve().name: self._folder}
        return {path.name: path for path in self._folder.iterdir() if path.name[0] != "." and _is_file(path / RECIPE)}


def _summary(name: str, folder: Path) -> Row:
    recipe, diary = _json(folder / RECIPE), _json(folder / DIARY)
    stages = [_stage(folder, spec, diary.get("keys")) for spec in _specs(folder)]
    state = _state(folder, diary, stages)
    unfinished = [stage for stage in stages if stage["state"] == "waiting"]
    if unfinished and state != "finished":
        unfinished[0] |= {"state": state, **_progress(folder, unfinished[0]["name"])}
    return {
        "name": name, "title": recipe.get("name", name), "description": recipe.get("description", ""),
        "seed": recipe.get("seed"), "state": state, "error": diary.get("error", "") if state == "failed" else "",
        "begun": diary.get("begun"), "updated": _updated(folder, stages), "stages": stages,
    }  # fmt: skip


def _stage(folder: Path, spec: Mapping[str, Any], keys: Mapping[str, str] | None) -> Row:
    """A stage's state: done, waiting, or unasked where the run was to end before it."""
    name = spec["name"]
    record = _record(folder, name)
    wanted = keys is None or name in keys
    done = bool(record) and (keys is None or not wanted or record.get("key") == keys[name])
    state = "done" if done else "waiting" if wanted else "unasked"
    return {"name": name, "kind": spec.get("stage", name), "state": state,
            "seconds": record.get("seconds") if done else None}  # fmt: skip


def _state(folder: Path, diary: Row, stages: list[Row]) -> str:
    """running, finished, failed or stopped; the last also for a process that was killed and could tell nothing."""
    if is_locked(folder):
        return "running"
    if diary.get("state") in ("finished", "failed", "stopped"):
        return str(diary["state"])
    return "stopped" if any(stage["state"] == "waiting" for stage in stages) else "finished"


def _progress(folder: Path, stage: str) -> Row:
    """How far a stage is that logs its steps: the last step, and the seconds that it took and will take."""
    path = _inside(folder, stage, LOGS["rows"])
    rows = list(_rows(_end(path))) if path else []
    return {key: rows[-1].get(key) for key in ("step", "seconds", "eta")} if rows else {}


def _end(path: Path, size: int = 8192) -> bytes:
    """The last bytes of a file; none where it has just been replaced."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - size))
            return file.read()
    except OSError:
        return b""


def _updated(folder: Path, stages: list[Row]) -> float:
    """Unix seconds of the latest sign of life."""
    files = [folder / RECIPE, folder / DIARY]
    files += [folder / stage["name"] / file for stage in stages for file in (RECORD, *LOGS.values())]
    times = [0.0]
    for path in files:
        with suppress(OSError):  # not there yet, or just replaced
            times.append(path.stat().st_mtime)
    return max(times)


def _specs(folder: Path) -> list[Row]:
    """The stages of the recipe whose names can be folders of the run."""
    specs = _json(folder / RECIPE).get("stages")
    named = [spec for spec in specs if isinstance(spec, dict)] if isinstance(specs, list) else []
    return [spec for spec in named if isinstance(name := spec.get("name"), str) and re.fullmatch(r"\w[\w.-]*", name)]


def _inside(folder: Path, *names: str) -> Path | None:
    """A file of the run; None where there is none, or where it lies elsewhere in truth."""
    path = folder.joinpath(*names)
    return path if _is_file(path) and path.resolve().is_relative_to(folder.resolve()) else None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # in a folder that is not ours to read
        return False


def _record(folder: Path, stage: str) -> Row:
    path = _inside(folder, stage, RECORD)
    return _json(path) if path else {}


def _json(path: Path) -> Row:
    """The object in a file; an empty one where there is none, or something else."""
    try:
        status = path.stat()
    except OSError:
        return {}
    return _parsed(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=512)
def _parsed(path: Path, *version: int) -> Row:
    """Read again when the file has changed; nobody writes into what is given."""
    try:
        found = read_json(path)
    except UserError:
        return {}
    return found if isinstance(found, dict) else {}


# ---- logs ----


class Part(NamedTuple):
    """Rows of a log, the place behind them, whether they are its first ones, whether there are more."""

    rows: list[Row]
    place: list[int]
    fresh: bool
    more: bool


def _tail(path: Path, place: list[int]) -> Part:
    """What stands behind a place, or behind the start where the log is no longer the one that had the place."""
    with path.open("rb") as file:
        start = place[0] if _mark(file, place[0]) == place[1] else 0
        file.seek(start)
        data = file.read(PART)
        whole = data.rfind(b"\n") + 1
        reached = [start + whole, _mark(file, start + whole)]
    return Part(list(_rows(data[:whole])), reached, start == 0, len(data) == PART and whole > 0)


def _mark(file: BinaryIO, place: int) -> int:
    file.seek(max(0, place - MARK))
    return zlib.crc32(file.read(min(place, MARK)))


def _rows(data: bytes) -> Iterator[Row]:
    """The objects of JSON lines; a half line is none."""
    for line in data.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield finite(row)


def _encoded(places: Places) -> str:
    return base64.urlsafe_b64encode(json.dumps(places, separators=(",", ":")).encode()).decode().rstrip("=")


def _decoded(text: str) -> Places:
    try:
        found = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))) if text else {}
        return {str(key): [int(place), int(mark)] for key, (place, mark) in found.items() if 0 <= place < LARGEST}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        raise UserError("not the `next` of an answer", where="after", value=text) from None
