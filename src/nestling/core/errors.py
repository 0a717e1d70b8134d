"""Errors meant for the person at the keyboard: one line that says what, where, which value, and the way out."""

from __future__ import annotations

from pathlib import Path

_UNSET = object()


class UserError(ValueError):
    """Bad input. The command line prints the message and exits with code 2, without a traceback.

    >>> str(UserError("learning rate is negative", where="sft.learning_rate", value=-1, fix="use a positive number"))
    'sft.learning_rate: learning rate is negative (got -1); use a positive number'
    """

    def __init__(
        self, what: str, *, where: str | Path | None = None, value: object = _UNSET, fix: str | None = None
    ) -> None:
        self.what, self.where, self.value, self.fix = what, where, value, fix
        super().__init__(_one_line(what, where, value, fix))

    def at(self, place: str) -> UserError:
        """The same error seen from outside: `place` comes before where it says it is.

        >>> str(UserError("is odd", where="head_size", value=3).at("pretrain.model"))
        'pretrain.model.head_size: is odd (got 3)'
        """
        where = place if self.where is None else f"{place}.{self.where}"
        return UserError(self.what, where=where, value=self.value, fix=self.fix)


class Interrupted(RuntimeError):
    """The user pressed Ctrl-C: the step was finished and saved; the message says how to go on. Exit code 130."""


def _one_line(what: str, where: str | Path | None, value: object, fix: str | None) -> str:
    text = what if where is None else f"{where}: {what}"
    if value is not _UNSET:
        shown = repr(value)
        text += f" (got {shown if len(shown) <= 80 else shown[:77] + '…'})"
    if fix:
        text += f"; {fix}"
    return " ".join(text.split())
