"""Which part of a batch belongs to this process."""

from __future__ import annotations

from nestling.core.errors import UserError
from nestling.core.ranks import rank, world_size


def own_share(count: int, what: str) -> tuple[int, int]:
    """[start, stop) of this rank's items out of ``count``; the whole range on a single process.

    Raises:
        UserError: the ranks can't have equally many. ``what`` names the setting.
    """
    if count % world_size():
        fix = f"use a multiple of {world_size()}"
        raise UserError("the processes can't share this equally", where=what, value=count, fix=fix)
    size = count // world_size()
    return rank() * size, (rank() + 1) * size
