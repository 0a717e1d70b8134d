"""Several tokens for one step: cheap guesses that the model checks all at once (Leviathan et al. 2023).

Somebody proposes tokens, drawn from distributions q; the model reads them in one call. A proposal x is taken with
probability min(1, p(x) / q(x)), where p is what the request would be sampled from there; else the token is drawn from
max(p − q, 0) and what follows is thrown away. Whatever q is, the text is distributed as without proposals; at temperature 0
it is the same text. A look-up in the text has a q that is certain, so x is taken with probability p(x).

Who proposes: a smaller model with the same tokens (`Draft`), else what followed the last tokens earlier in the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.core.errors import UserError
from nestling.generation import filters
from nestling.generation.sequence import Running
from nestling.generation.strategy import Parameters, View
from nestling.model.cache import KVCache
from nestling.model.decoder import Decoder

STRATEGIES = ("sample", "greedy")
"""Those that draw from `View.shaped`, or take its likeliest."""
ENDINGS = (3, 2)
"""Tokens that must have occurred before in the same order; longer endings are tried first."""


@dataclass(frozen=True)
class Proposal:
    """Tokens that may come next in a row."""

    tokens: list[int]
    drawn_from: Tensor | None = None
    """[k, V] q of each token, float64; None: they were not drawn, q is certain."""


class LookUp:
    """What followed the last tokens of a text when they stood there before (prompt look-up)."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}
        self._read = 0

    def propose(self, text: Sequence[int], count: int) -> list[int]:
        """At most `count` tokens; `text` is the one of the last call, grown.

        >>> LookUp().propose([5, 6, 7, 8, 9, 5, 6], 2)
        [7, 8]
        """
        for place in range(self._read, len(text)):
            for size in ENDINGS:
                if place >= size:
                    self._after[tuple(text[place - size : place])] = place
        self._read = len(text)
        for size in ENDINGS:
            found = self._after.get(tuple(text[-size:]))
            if found is not None:
                return list(text[found : found + count])
        return []


class Draft:
    """A small model that writes ahead. It has a cache of its own, in which a request keeps its row.

    Args:
        model: reads and writes the same token ids as the model that it writes for.
        rows: requests at once.
        capacity: tokens of a row.
        most: tokens that it reads in one step; a longer prompt is read in parts before anything is proposed.
    """

    def __init__(self, model: Decoder, rows: int, capacity: int, most: int) -> None:
        self._model, self._most = model, most
        weight = model.output_weight
        self._cache = KVCache(model.config, rows, min(capacity, model.config.context), weight.device, weight.dtype)
        self._free = list(range(rows))
        self._rows: dict[Running, int] = {}
        self._held: dict[Running, list[int]] = {}  # what each row has read

    def release(self, running: Running) -> None:
        """Give up the row of a request."""
        if running in self._rows:
            self._free.append(self._rows.pop(running))
            del self._held[running]

    def propose(self, asked: Sequence[tuple[Running, int]], banned: Tensor | None) -> dict[Running, Proposal]:
        """At most so many tokens for each request, which has one row. `banned` ids are never written."""
        texts = {running: [*running.prompt, *running.rows[0].ids] for running, _ in asked}
        wanted = {
            running: count
            for running, count in asked
            if len(texts[running]) + count <= self._cache.capacity and self._catch_up(running, texts[running])
        }
        found: dict[Running, list[tuple[int, Tensor]]] = {running: [] for running in wanted}
        for place in range(max(wanted.values(), default=0)):
            going = [running for running, count in wanted.items() if place < count]
            for running, token, q in self._write(going, texts, banned):
                texts[running].append(token)
                found[running].append((token, q))
        for running in wanted:
            self._held[running] = texts[running][: int(self._cache.lengths[self._rows[running]])]
        return {
            running: Proposal([token for token, _ in drawn], torch.stack([q for _, q in drawn]))
            for running, drawn in found.items()
        }

    def _catch_up(self, running: Running, text: list[int]) -> bool:
        """Forget what was not taken, and read a part of what is new where it is too much for one step.

        Returns whether the row is ready to write.
        """
        if running not in self._rows:
            self._rows[running], self._held[running] = self._free.pop(), []
        row, held = self._rows[running], self._held[running]
        have = next((i for i, (a, b) in enumerate(zip(held, text, strict=False)) if a != b), len(held))
        have = min(have, len(text) - 1)
        self._cache.lengths[row] = have
        if len(text) - have <= self._most:
            return True
        part = text[have : have + self._most]
        ids = torch.tensor([part], device=self._cache.device)
        self._model.hidden(ids, cache=self._cache, rows=torch.tensor([row]))
        self._held[running] = text[: have + self._most]
        return False

    def _write(
        self, going: list[Running], texts: dict[Running, list[int]], banned: Tensor | None
    ) -> list[tuple[Running, int, Tensor]]:
        """One token for each of these requests, with the distribution that it was drawn from."""
        rows = torch.tensor([self._rows[running] for running in going])
        fresh = [texts[running][int(self._cache.lengths[row]) :] for running, row in zip(going, rows, strict=True)]
        counts = torch.tensor([len(tokens) for tokens in fresh])
        ids = torch.tensor([tokens + [0] * (int(counts.max()) - len(tokens)) for tokens in fresh])
        hidden = self._model.hidden(ids.to(self._cache.device), cache=self._cache, rows=rows, counts=counts)
        last = hidden[torch.arange(len(going)), counts - 1].unsqueeze(1)  # [G, 1, D]
        logits = self._model.unembed(last).float()
        if banned is not None:
            logits = logits.index_fill(2, banned, -torch.inf)
        view = View(Parameters(going, logits.device), logits, lambda: last)
        q = distribution(view)
        tokens = filters.draw(q.log(), view.uniforms()).tolist()
        return list(zip(going, tokens, q, strict=True))


def distribution(view: View) -> Tensor:
    """[G, V] float64: what the next token of each request with one row is drawn from; certain where it is greedy."""
    greedy = [r.sampling.greedy or r.sampling.strategy == "greedy" for r in view.requests]
    shaped = view.shaped[:, 0].double().softmax(1)
    if not any(greedy):
        return shaped
    certain = F.one_hot(view.penalised[:, 0].argmax(1), shaped.shape[1]).double()
    return torch.where(torch.tensor(greedy, device=shaped.device).unsqueeze(1), certain, shaped)


def settle(p: Tensor, proposed: Tensor, q: Tensor, uniforms: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Take a proposal or draw another token, so that the token is distributed as p.

    Args:
        p: [G, V] the distribution wanted.
        proposed: [G] tokens drawn from q.
        q: [G, V].
        uniforms: two independent numbers of [0, 1) for each, [G]: whether to take it, and what else.

    Returns:
        (tokens [G], whether each is the proposal [G]).
    """
    chance, other = (uniform.to(p.device) for uniform in uniforms)
    place = proposed.unsqueeze(1)
    taken = chance * q.gather(1, place)[:, 0] < p.gather(1, place)[:, 0]
    rest = (p - q).clamp_min(0)
    rest = torch.where(rest.sum(1, keepdim=True) > 0, rest, p)  # p = q, of which rounding may leave nothing
    return torch.where(taken, proposed, filters.draw(rest.log(), other)), taken


class Speculation:
    """Proposals for all requests of an engine that want some.

    Args:
        draft: who proposes; None: look-up in each request's own text.
    """

    def __init__(self, draft: Draft | None = None) -> None:
        self._draft = draft
        self._lookups: dict[Running, LookUp] = {}

    def propose(self, running: Sequence[Running], banned: Tensor | None) -> dict[Running, Proposal]:
        """Proposals for those of these requests that are ready to decode and have room for some."""
        rooms = [(r, min(r.request.speculate, r.rows[0].left - 1)) for r in running]  # the last one is the model's own
        asked = [(r, count) for r, count in rooms if count > 0]
        if not asked:
            return {}
        if self._draft is not None:
            found = self._draft.propose(asked, banned)
        else:
            found = {r: Proposal(tokens) for r, count in asked if (tokens := self._look_up(r, count))}
        for r, proposal in found.items():
            r.proposed += len(proposal.tokens)
        return found

    def release(self, running: Running) -> None:
        """A request is done."""
        self._lookups.pop(running, None)
        if self._draft is not None:
            self._draft.release(running)

    def decide(self, view: View, proposals: Sequence[Proposal], place: int) -> tuple[Tensor, Tensor]:
        """The next token of each request of `view`, whose `place`-th proposals are looked at: (tokens [G], taken [G])."""
        p = distribution(view)
        proposed = torch.tensor([proposal.tokens[place] for proposal in proposals], device=p.device)
        q = [
            F.one_hot(token, p.shape[1]).double()
            if proposal.drawn_from is None
            else proposal.drawn_from[place].to(p.device)
            for token, proposal in zip(proposed, proposals, strict=True)
        ]
        return settle(p, proposed, torch.stack(q), (view.uniforms(), view.uniforms()))

    def _look_up(self, running: Running, count: int) -> list[int]:
        lookup = self._lookups.setdefault(running, LookUp())
        return lookup.propose([*running.prompt, *running.rows[0].ids], count)


def check_draft(draft: Decoder, vocabulary: int) -> None:
    """See that a model can write ahead for one with so many tokens.

    Raises:
        UserError: it has another vocabulary.
    """
    if draft.config.vocab_size != vocabulary:
        raise UserError(
            "the draft model has another vocabulary", where="draft", value=draft.config.vocab_size,
            fix=f"use a model with the same tokenizer, {vocabulary} tokens",
        )  # fmt: skip
