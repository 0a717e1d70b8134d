"""Runs Python code in a process of its own that can reach nothing: no network, no files but its own, no other process.

What keeps it from what on this machine: `isolation()`. Where anything is missing the code is refused, unless the settings
say that it can be trusted. Not covered: state kept from one call to the next (each begins anew), threads and further
processes, plots. The same code gives the same output.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Literal

from pydantic import Field

from nestling.core.config import Config
from nestling.core.errors import UserError
from nestling.tools import _sandbox
from nestling.tools._sandbox import Isolation, Layers, Limits, Outcome

EXAMPLES = [
    ({"code": "print(sum(range(10)))"}, "45"),
    ({"code": "words = 'to be or not to be'.split()\nlen(set(words))"}, "4"),
    ({"code": "x = 1"}, "(no output)"),
    ({"code": "x = 0\n1 / x"}, "error: ZeroDivisionError: division by zero\n  line 2, in <module>: 1 / x"),
]

MB = 1 << 20
SILENT = "(no output)"


class Settings(Config):
    """What code may use up."""

    seconds: float = Field(5.0, gt=0, le=600)
    """Seconds that a call may take, by the clock and of processor time."""
    memory: int = Field(512, ge=64)
    """MB of address space."""
    file: int = Field(16, ge=1)
    """MB that one file may have."""
    folder: int = Field(64, ge=1)
    """MB that all files of a call may have."""
    characters: int = Field(4000, ge=100)
    """Characters of output that are kept, half from the beginning and half from the end."""
    packages: bool = False
    """Whether the packages installed here (numpy, …) can be imported, beyond the standard library."""
    wrapper: Literal["auto", "bubblewrap", "namespaces", "none"] = "auto"
    """What stands around the process; auto takes the first that works."""
    trusted: bool = False
    """Whether to run code even where this machine can't isolate it fully."""


def call(code: str, settings: Settings = Settings()) -> str:
    """Run Python code and see what it prints and the value of a last line that is an expression.

    Args:
        code: a program; it starts with an empty folder, and without network, threads or further processes.

    Raises:
        UserError: something can't be isolated here and the settings do not trust the code.
    """
    layers = _layers(settings)
    limits = Limits(
        settings.seconds, settings.memory * MB, settings.file * MB, settings.folder * MB, settings.characters
    )
    return _told(_sandbox.execute(code, limits, layers, settings.packages))


def isolation(settings: Settings = Settings()) -> list[Isolation]:
    """What code is kept from on this machine and by which means; `how` is None where nothing does.

    The means were tried on a process that was thrown away. With Landlock instead of a file tree of its own, code can still
    ask whether a path exists and how large it is, one path at a time; not read or list it.
    """
    return _sandbox.isolation(_sandbox.probe(settings.wrapper))


def _layers(settings: Settings) -> Layers:
    """The layers to use.

    Raises:
        UserError: not all of what code must be kept from can be kept from it.
    """
    missing = [kept.what for kept in isolation(settings) if kept.how is None]
    layers = _sandbox.probe(settings.wrapper)
    if missing and not settings.trusted:
        raise UserError(
            f"code can't be isolated on this machine from: {', '.join(missing)}", where="tools.python",
            fix="install bubblewrap or libseccomp, or set trusted to run code unprotected",
        )  # fmt: skip
    return layers or Layers("none", 0, False)


def _told(outcome: Outcome) -> str:
    """The output, after a first line that begins with "error: " where something went wrong."""
    text = outcome.text.strip("\n")
    if outcome.stopped:
        return f"error: {outcome.stopped}\n{text}".rstrip("\n")
    if outcome.status == 0:
        return text or SILENT
    if outcome.status == _sandbox.NOT_CONFINED:
        return f"error: the sandbox could not be closed, nothing was run: {text}"
    name = _signal(outcome.status)
    if name:
        return f"error: ended by {name}\n{text}".rstrip("\n")
    before, _, last = text.rpartition("\n")
    return f"error: {last or f'exit status {outcome.status}'}\n{before.rstrip()}".rstrip("\n")


def _signal(status: int) -> str | None:
    """What ended a process that did not end by itself; a wrapper gives 128 + the signal's number."""
    number = -status if status < 0 else status - 128
    if number in (signal.SIGKILL, signal.SIGXCPU):
        return "the limit of processor time"
    return signal.Signals(number).name if number in set(signal.Signals) else None


def toy(folder: Path) -> Settings:
    """Settings for the contract test: enough time for small things."""
    return Settings(seconds=2)
