"""Who am I among the processes of this run. On one process every function is the identity."""

from __future__ import annotations

import torch
import torch.distributed as dist


def is_distributed() -> bool:
    """True when torchrun started several processes and the group is up."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, 0 on a single process."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """How many processes share the run."""
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """Only the main process writes artifacts and speaks."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process is here."""
    if is_distributed():
        dist.barrier()


def sum_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """Each value summed over all processes (float64, so token counts stay exact)."""
    if not is_distributed():
        return values
    keys = sorted(values)
    total = torch.tensor([values[key] for key in keys], dtype=torch.float64)
    dist.all_reduce(total)
    return dict(zip(keys, total.tolist(), strict=True))
