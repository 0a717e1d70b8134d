"""What one process among several needs: its part of a batch, where all of them know what the whole batch is."""

from __future__ import annotations

from nestling.core.errors import UserError
from nestling.core.ranks import reader, readers


def own_share(count: int, what: str) -> tuple[int, int]:
    """[start, stop) of this process's items out of ``count``; the whole range on a single process.

    Raises:
        UserError: the processes can't have equally many. ``what`` names the setting.
    """
    if count % readers():
        fix = f"use a multiple of {readers()}"
        raise UserError("the processes can't share this equally", where=what, value=count, fix=fix)
    size = count // readers()
    return reader() * size, (reader() + 1) * size


def fair_share(count: int, what: str | None = None) -> tuple[int, int]:
    """[start, stop) of this process's items out of ``count``, some getting one more than others; for uneven callers.

    Raises:
        UserError: somebody would get none. ``what`` names the setting; without a name that is allowed.
    """
    if what and count < readers():
        fix = f"use at least {readers()}"
        raise UserError("fewer than there are processes", where=what, value=count, fix=fix)
    return reader() * count // readers(), (reader() + 1) * count // readers()
