"""Batches of rankings: a prompt with all its responses is one batch element (InstructGPT, section 3.5)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from nestling.core.errors import UserError
from nestling.core.types import Message, Ranking
from nestling.loading.batches import padded
from nestling.loading.chats import TooLong
from nestling.loading.order import EpochOrder
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.conversation import render, reply_ids


@dataclass(frozen=True)
class RankingBatch:
    """Several prompts with all their responses. Letters: R responses, P pairs, N prompts, T slots.

    Two prompts with 3 and 2 responses, the last two of the first prompt tied: groups [0 0 0 1 1],
    pairs [[0 1] [0 2] [3 4]], pair_weights [1/3 1/3 1].
    """

    ids: Tensor
    """[R, T] long, right-padded: prompt and response, ending with <|im_end|>."""
    lengths: Tensor
    """[R] long: tokens of each row; the reward is read at slot lengths − 1."""
    values: Tensor
    """[R] float32: what responses are ordered by (score, or minus rank)."""
    groups: Tensor
    """[R] long: which prompt of this batch a row answers; rows of one prompt are neighbours."""
    pairs: Tensor
    """[P, 2] long: rows (better, worse) of the same prompt; ties make no pair."""
    pair_weights: Tensor
    """[P] float32: 1 / C(K, 2) with K the prompt's responses, so every prompt weighs at most 1."""
    numbers: Tensor
    """[N] long: which ranking of the data each prompt is."""

    def to(self, device: torch.device | str) -> RankingBatch:
        """The batch on another device."""
        return RankingBatch(**{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})

    def __len__(self) -> int:
        return len(self.numbers)

    def rows(self, start: int, stop: int) -> RankingBatch:
        """Prompts [start, stop) with all their responses: a microbatch, or one rank's share."""
        mine = (self.groups >= start) & (self.groups < stop)
        first = int(mine.nonzero()[0]) if mine.any() else 0
        pair = mine[self.pairs[:, 0]]
        taken = {name: getattr(self, name)[mine] for name in ("ids", "lengths", "values")}
        return replace(
            self,
            **taken,
            groups=self.groups[mine] - start,
            pairs=self.pairs[pair] - first,
            pair_weights=self.pair_weights[pair],
            numbers=self.numbers[start:stop],
        )

    @property
    def mask(self) -> Tensor:
        """[R, T] bool: true on tokens, false on padding."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]


@dataclass(frozen=True)
class _Group:
    """One ranking, rendered: K rows of ids."""

    number: int
    rows: list[list[int]]
    values: list[float]


class RankingLoader:
    """Batches of `batch_prompts` rankings; `batch(step)` depends on the seed and the step alone.

    Args:
        context: most tokens of a prompt with one response.
        too_long: "error", "drop" (the response is left out, and the ranking when fewer than 2 are left), or "cut" (the
            response loses its end but keeps <|im_end|>; a prompt that fills the context is dropped).
            `.dropped` and `.cut` count responses.

    Raises:
        UserError: a response longer than the context under "error"; or no ranking left.
    """

    def __init__(
        self, rankings: Iterable[Ranking], tokenizer: Tokenizer, context: int, batch_prompts: int, seed: int,
        *, too_long: TooLong = "error",
    ) -> None:  # fmt: skip
        self.context, self.batch_prompts, self.too_long = context, batch_prompts, too_long
        self.dropped = self.cut = 0
        self._tokenizer, self._pad = tokenizer, tokenizer.filler
        groups = [self._group(number, ranking) for number, ranking in enumerate(rankings)]
        self.groups = [group for group in groups if group is not None]
        if not self.groups:
            raise UserError("no ranking to learn from", where="rankings", fix="give rankings that fit the context")
        self.row_count = len(self.groups)
        self.order = EpochOrder(self.row_count, seed, "rankings")

    def _group(self, number: int, ranking: Ranking) -> _Group | None:
        tools = ranking.tools
        prompt = render(self._tokenizer, ranking.prompt, tools, prompt=True).ids
        kept: list[tuple[list[int], float]] = []
        for response in ranking.responses:
            ids = reply_ids(self._tokenizer, Message(role="assistant", content=response.content))
            row = self._fitted(number, prompt, ids)
            kept += [(row, response.value)] if row else []
        if len(kept) < 2:
            return None
        return _Group(number, [row for row, _ in kept], [value for _, value in kept])

    def _fitted(self, number: int, prompt: list[int], response: list[int]) -> list[int]:
        """Prompt and response within the context, or an empty list where the response is left out."""
        room = self.context - len(prompt)
        if len(response) <= room:
            return prompt + response
        if self.too_long == "error":
            raise UserError(
                f"ranking {number} has a response of {len(prompt) + len(response)} tokens with its prompt, "
                f"the context holds {self.context}",
                fix="raise the context, or set too_long to drop or cut",
            )
        if self.too_long == "drop" or room < 2:
            self.dropped += 1
            return []
        self.cut += 1
        return prompt + response[: room - 1] + response[-1:]

    def batch(self, step: int) -> RankingBatch:
        """The batch of one step."""
        _, rows = self.order.take(step * self.batch_prompts, self.batch_prompts)
        return self._batch([self.groups[row] for row in rows])

    def validation(self) -> Iterator[RankingBatch]:
        """Every ranking once, in fixed order."""
        for first in range(0, self.row_count, self.batch_prompts):
            yield self._batch(self.groups[first : first + self.batch_prompts])

    def _batch(self, groups: list[_Group]) -> RankingBatch:
        rows = [row for group in groups for row in group.rows]
        ids, lengths = padded(rows, self._pad, self.context)
        pairs, weights = _pairs(groups)
        sizes = [len(group.rows) for group in groups]
        return RankingBatch(
            ids=ids,
            lengths=lengths,
            values=torch.tensor([value for group in groups for value in group.values], dtype=torch.float32),
            groups=torch.tensor(np.repeat(np.arange(len(groups)), sizes)),
            pairs=torch.tensor(pairs, dtype=torch.long).reshape(-1, 2),
            pair_weights=torch.tensor(weights, dtype=torch.float32),
            numbers=torch.tensor([group.number for group in groups]),
        )


def _pairs(groups: list[_Group]) -> tuple[list[tuple[int, int]], list[float]]:
    """All (better, worse) rows within each group, each weighing 1 / C(K, 2)."""
    pairs: list[tuple[int, int]] = []
    weights: list[float] = []
    first = 0
    for group in groups:
        for a, b in combinations(range(len(group.values)), 2):
            if group.values[a] != group.values[b]:
                better, worse = (a, b) if group.values[a] > group.values[b] else (b, a)
                pairs.append((first + better, first + worse))
                weights.append(1 / math.comb(len(group.values), 2))
        first += len(group.values)
    return pairs, weights
