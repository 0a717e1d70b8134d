"""Running a model once over many sequences of different lengths: sorted by length, trimmed, a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from nestling.core.ranks import reader, readers, sum_tensor
from nestling.loading.batches import padded


def pad_ids(sequences: Sequence[Sequence[int]], filler: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids ``[N, T]`` and their lengths ``[N]``."""
    return padded(sequences, filler, max(map(len, sequences)))


def length_groups(lengths: Tensor, budget: int) -> Iterator[Tensor]:
    """Indices of rows of similar length, in groups of at most ``budget`` padded tokens (at least one row each).

    >>> [group.tolist() for group in length_groups(torch.tensor([5, 1, 6, 2]), budget=12)]
    [[1, 3], [0, 2]]
    """
    group: list[int] = []
    for row in torch.argsort(lengths, stable=True).tolist():
        if group and (len(group) + 1) * int(lengths[row]) > budget:
            yield torch.tensor(group)
            group = []
        group.append(row)
    if group:
        yield torch.tensor(group)


@torch.no_grad()
def by_length(score: Callable[..., Tensor], lengths: Tensor, budget: int, *inputs: Tensor) -> Tensor:
    """``score(*inputs)`` of every row, computed once each: inputs ``[N, T]`` -> float32 ``[N, T]``.

    ``score`` gives a number per position and must be causal, so that trimming the padding changes nothing; positions
    beyond a group's longest row stay zero.
    """
    result = torch.zeros(inputs[0].shape, dtype=torch.float32, device=inputs[0].device)
    for group in length_groups(lengths.cpu(), budget):
        width = int(lengths[group].max())
        result[group, :width] = score(*(x[group, :width] for x in inputs)).float()
    return result


def read_together(score: Callable[..., Tensor], lengths: Tensor, budget: int, *inputs: Tensor) -> Tensor:
    """`by_length`, where every process gives the same rows, reads its share of them, and gets the numbers of all."""
    if readers() == 1:
        return by_length(score, lengths, budget, *inputs)
    result = torch.zeros(inputs[0].shape, dtype=torch.float32, device=inputs[0].device)
    mine = torch.argsort(lengths, stable=True)[reader() :: readers()]
    if len(mine):
        result[mine] = by_length(score, lengths[mine], budget, *(x[mine] for x in inputs))
    return sum_tensor(result)
