"""Numbers on their way to a file and to the person watching. Core owns the console; nothing else writes to it."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from nestling.core.storage import finite


@functools.cache
def console() -> Console:
    """The one console, on standard error, so that piped output stays clean."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """One line for the person watching."""
    console().print(text, markup=False, emoji=False)


class MetricsLog:
    """An append-only `metrics.jsonl`. After a resume, rows of steps that will be run again are dropped first.

    >>> MetricsLog(Path("runs/demo/pretrain/metrics.jsonl")).write({"step": 1, "loss": 7.6})   # doctest: +SKIP
    """

    def __init__(self, path: Path, from_step: int = 0) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(path) if row.get("step", 0) <= from_step] if path.exists() else []
        path.write_text("".join(_line(row) for row in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row at once, so that a watcher sees it."""
        self._file.write(_line(row))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _line(row: Mapping[str, Any]) -> str:
    """JSON of a row; a number that is not finite becomes null, since JSON has no word for it."""
    return json.dumps(finite(row), ensure_ascii=False) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line cut off by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class Progress:
    """How far a long piece of work is: a bar on a terminal, a line now and then elsewhere, nothing when quiet.

    >>> with Progress("pretrain", total=100, unit="steps", quiet=True) as progress:
    ...     progress.advance(10, loss=3.2)
    """

    FIRST_LINE, LINE_EVERY = 2.0, 15.0  # seconds to the first line and between lines when not on a terminal

    def __init__(self, title: str, total: int | None, unit: str = "", quiet: bool = False, done: int = 0) -> None:
        self.title, self.total, self.unit, self.quiet, self.done = title, total, unit, quiet, done
        self._started = time.monotonic()
        self._next_line = self._started + self.FIRST_LINE
        self._first = done
        self._bar: Bar | None = None
        self._note = ""

    def __enter__(self) -> Progress:
        if not self.quiet and console().is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
            times = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
            self._bar = Bar(*columns, *times, console=console())
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.done, note="")
        return self

    def advance(self, count: int = 1, **fields: float | str) -> None:
        """Record `count` more units; `fields` are shown beside them."""
        self.done += count
        note = "  ".join(f"{name} {_short(value)}" for name, value in fields.items())
        if self._bar:
            self._note = note or self._note
            self._bar.update(self._task, completed=self.done, note=self._note)
        elif not self.quiet and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + self.LINE_EVERY
            say(f"{self.title}: {self.done}{f'/{self.total}' if self.total else ''} {self.unit}  {note}{self._left()}")

    def _left(self) -> str:
        if not self.total or self.done <= self._first:
            return ""
        spent = time.monotonic() - self._started
        return f"  {spent * (self.total - self.done) / (self.done - self._first):.0f} s left"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()


def _short(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
