"""What one process among several needs: its part of a batch, and figures of all of them."""

from __future__ import annotations

from nestling.core.errors import UserError
from nestling.core.ranks import reader, readers, sum_over_ranks


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


def mean_over_ranks(figures: dict[str, float]) -> dict[str, float]:
    """Each figure averaged over the ranks, which hold equally many items: all of them then decide alike."""
    total = sum_over_ranks(figures | {"ranks": 1.0})
    return {name: total[name] / total["ranks"] for name in figures}
