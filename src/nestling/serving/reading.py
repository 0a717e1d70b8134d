"""What a model makes of given texts without writing: embeddings and the log-probabilities of a prompt's tokens.

Done in the engine's thread between two steps, in parts small enough that those who are being written hardly wait.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.generation.engine import Engine
from nestling.generation.sequence import Alternatives, TokenLog
from nestling.model.likelihood import logits_logprobs
from nestling.serving.driver import Driver

PART_TOKENS = 2048
"""Padded tokens of one forward pass."""


async def embeddings(driver: Driver, texts: Sequence[Sequence[int]]) -> list[list[float]]:
    """A unit vector [D] for each text: the mean of the last layer's outputs at its tokens, normalised.

    Texts of similar hidden states lie close. A language model is not trained for this: for retrieval, a model trained
    on pairs does better.
    """
    found: dict[int, list[float]] = {}
    for part in _parts(texts):
        vectors = await driver.call(partial(_embed, texts=[texts[n] for n in part]))
        found |= dict(zip(part, vectors, strict=True))
    return [found[n] for n in range(len(texts))]


async def prompt_logprobs(driver: Driver, ids: Sequence[int], count: int) -> list[TokenLog]:
    """log p(ids[t] | ids[..t-1]) for t ≥ 1 at temperature 1, each with the `count` likeliest tokens of its place."""
    return await driver.call(lambda engine: _score(engine, ids, count))


def _parts(texts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Texts by length, as many at once as `PART_TOKENS` holds when padded to the longest."""
    part: list[int] = []
    for place in sorted(range(len(texts)), key=lambda n: len(texts[n])):
        if part and (len(part) + 1) * len(texts[place]) > PART_TOKENS:
            yield part
            part = []
        part.append(place)
    if part:
        yield part


@torch.inference_mode()
def _embed(engine: Engine, texts: Sequence[Sequence[int]]) -> list[list[float]]:
    model = engine.model
    counts = torch.tensor([len(ids) for ids in texts])
    ids = torch.zeros(len(texts), int(counts.max()), dtype=torch.long)  # [B, T], padding is behind what is read
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
    valid = (torch.arange(ids.shape[1]) < counts[:, None]).to(model.embedding.weight.device)  # [B, T]
    hidden = model.hidden(ids.to(valid.device)).float()  # [B, T, D]
    mean = (hidden * valid[:, :, None]).sum(1) / valid.sum(1, keepdim=True)
    vectors: Tensor = F.normalize(mean, dim=1)
    return vectors.tolist()


@torch.inference_mode()
def _score(engine: Engine, ids: Sequence[int], count: int) -> list[TokenLog]:
    model = engine.model
    row = torch.tensor([list(ids)], device=model.embedding.weight.device)
    logits = model.unembed(model.hidden(row[:, :-1]))[0].float()  # [T-1, V]
    scores = logits_logprobs(logits, row[0, 1:]).tolist()
    tops = _pairs(logits.log_softmax(-1).topk(count)) if count else [()] * len(scores)
    return [TokenLog(*log) for log in zip(ids[1:], scores, tops, strict=True)]


def _pairs(best: Any) -> list[Alternatives]:
    """The result of topk, [T, K] values and indices, as (token, log-probability) by place."""
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [tuple(zip(tokens, values, strict=True)) for tokens, values in rows]
