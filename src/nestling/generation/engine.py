"""The one generation engine: many requests at once, each with its own parameters, seed, stops and interjections.

A step is: admit waiting requests, compute a bounded number of prompt and forced tokens (`Slots.fill`), one token of every
row that is ready through the model, one vectorised call of each strategy in use, then bookkeeping per request. Requests
enter and leave between steps, and a long prompt is spread over several.

The engine holds the live module: what a trainer changes is what the next step uses. A server, whose weights stay, says
`frozen`: then a packed copy computes (`generation/packed.py`), and beginnings are remembered from request to request.

It computes in the dtype of the weights unless told otherwise. On a CPU that should be float32: with bfloat16, rounding
depends on the size of the batch, and a reply could depend on who shares it.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from nestling.core import registry
from nestling.core.errors import UserError
from nestling.generation.constraints import Grammars
from nestling.generation.groups import Group, alternatives, chosen, measure
from nestling.generation.packed import pack
from nestling.generation.sampling import Sampling, check_tokens
from nestling.generation.sequence import Alternatives, Completion, Piece, Request, Row, Running
from nestling.generation.slots import PREFILL_TOKENS, Limits, Slots
from nestling.generation.speculation import STRATEGIES as SPECULATING
from nestling.generation.speculation import Draft, Proposal, Speculation, check_draft
from nestling.generation.strategy import DROP, KEEP, Decoding, View
from nestling.model.decoder import Decoder
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.special import PAD, TURN_START

PROBED = 997
"""One weight in so many is looked at to see whether training went on."""
Table = list[list[int]]
"""[G, R] numbers on the host."""


class Engine:
    """Batched generation with continuous admission.

    Args:
        model: the live decoder; train/eval mode is restored after each step.
        tokenizer: gives the stop tokens and the text.
        rows: requests (or beams) that run at once; others wait.
        capacity: longest prompt + continuation in tokens; the model's context when not given.
        dtype: compute in this dtype, by autocast or, when frozen, with weights stored in it (int8 too); None: the
            dtype of the weights.
        frozen: the weights will not change, or only while no request is there: faster, and takes their memory again.
        limits: prompt tokens per step and memory for shared beginnings.

    Raises:
        UserError: the tokenizer has more tokens than the model, or a dtype that can't be used.

    >>> engine = Engine(model, tokenizer)                                            # doctest: +SKIP
    >>> engine.generate([Request(tokenizer.encode("Once"), Sampling(max_tokens=20))])[0].text   # doctest: +SKIP
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        rows: int = 32,
        capacity: int | None = None,
        dtype: torch.dtype | None = None,
        frozen: bool = False,
        limits: Limits = Limits(),
    ) -> None:
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model only {model.config.vocab_size}",
                fix="use the tokenizer that was saved with the model",
            )
        self.model, self.tokenizer, self.dtype, self.frozen = model, tokenizer, dtype, frozen
        self.capacity = min(capacity or model.config.context, model.config.context)
        self.stop_ids = tokenizer.stop_ids
        self._slots = Slots(model, rows, self.capacity, _cache_dtype(model, dtype, frozen), limits)
        self._speculation = Speculation()
        self._packed_at: tuple[object, ...] | None = None  # the state of the weights that were packed
        self._waiting: deque[tuple[Running, bool]] = deque()
        self._strategies: dict[str, Decoding] = {}
        self._groups: list[Group] | None = None
        self._some_cancelled = False
        self._grammars = Grammars(tokenizer)
        self._banned = _banned_tokens(model, tokenizer)

    def draft_with(self, model: Decoder) -> None:
        """Let a smaller model propose tokens to the requests that `speculate`, instead of a look-up in their own text.

        Raises:
            UserError: it has another vocabulary.
        """
        check_draft(model, self.model.config.vocab_size)
        draft = pack(model) if self.frozen else model.eval()
        self._speculation = Speculation(Draft(draft, self._slots.rows, self.capacity, self._slots.limits.prefill))

    # ---- whole texts ----

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Complete all requests, in their order; more than `rows` of them take turns.

        Raises:
            UserError: as `submit`; then nothing of this call is left behind.
        """
        running: list[Running] = []
        try:
            for request in requests:
                running.append(self.submit(request))
            with self._computing():
                while any(r.completion is None for r in running):
                    self._step()
        finally:
            for r in running:
                self.cancel(r)
        return [r.completion for r in running if r.completion is not None]

    def stream(self, request: Request) -> Iterator[str]:
        """The text of one request as it becomes readable, without control tokens; closing the iterator cancels it."""
        for piece in self.pieces(self.submit(request, stream=True)):
            if piece.sampled and not piece.control:
                yield piece.text

    def pieces(self, running: Running) -> Iterator[Piece]:
        """What a request submitted with `stream` shows, as it becomes readable; closing the iterator cancels it."""
        try:
            while running.completion is None:
                self.step()
                yield from running.take_pieces()
        finally:
            self.cancel(running)

    # ---- one step ----

    def submit(self, request: Request, *, stream: bool = False) -> Running:
        """Queue a request; `step` until its `completion` is there.

        Raises:
            UserError: an empty prompt or one that leaves no room, an unknown strategy or option, too many rows,
                a constraint that can't be enforced.
        """
        self._check(request.ids)
        strategy = self._strategy(request.sampling)
        strategy.check(request.sampling, self.model.config.vocab_size)
        check_tokens(request.sampling, self.model.config.vocab_size)
        if strategy.rows > self._slots.rows:
            raise UserError(
                f"the strategy takes {strategy.rows} rows, the engine has {self._slots.rows}",
                where=f"sampling.strategy {request.sampling.strategy}", fix="raise the engine's rows",
            )  # fmt: skip
        if strategy.rows > 1 and request.interject is not None:
            raise UserError(
                "tools need a strategy with one row", where="sampling.strategy", value=request.sampling.strategy,
                fix="use sample or greedy",
            )  # fmt: skip
        if request.speculate and request.sampling.strategy not in SPECULATING:
            raise UserError(
                "speculation needs sample or greedy", where="sampling.strategy", value=request.sampling.strategy,
                fix="set speculate to 0",
            )  # fmt: skip
        if not self.busy:
            self._begin_work()
        stops = self.stop_ids if request.stop_ids is None else request.stop_ids
        running = Running(request, self.tokenizer, stop_ids=stops, width=strategy.rows, capacity=self.capacity)
        running.reads_prompt = strategy.READS_PROMPT
        if request.sampling.constraint is not None:
            running.guide = self._grammars.open(request.sampling.constraint, stops)
        self._waiting.append((running, stream))
        return running

    def cancel(self, running: Running) -> None:
        """Give a request up: its rows are free before the next step computes anything. A done one stays as it is."""
        running.cancelled = running.completion is None
        self._some_cancelled |= running.cancelled

    @property
    def busy(self) -> bool:
        """Whether a step would do something."""
        return bool(self._slots.table or self._waiting)

    def step(self) -> list[Running]:
        """One token for every running request; returns those that are now done (cancelled ones included)."""
        with self._computing():
            return self._step()

    # ---- parts of a step ----

    def _step(self) -> list[Running]:
        done = self._remove_cancelled()
        self._admit()
        if self._grouped():
            self._decode()
            done += self._remove_finished()
        return done

    def _begin_work(self) -> None:
        """Nobody is being served, so the weights may be others than before."""
        if not self.frozen:
            self._slots.forget()
        elif (state := _state(self.model)) != self._packed_at:
            self._slots.model = pack(self.model, self.dtype)
            self._slots.forget()
            self._packed_at = state

    def _remove_cancelled(self) -> list[Running]:
        if not self._some_cancelled:
            return []
        self._some_cancelled = False
        live = {id(running): running for running, _ in self._slots.table}
        gone = [running for running in live.values() if running.cancelled]
        self._free(gone)
        gone += [running for running, _ in self._waiting if running.cancelled]
        self._waiting = deque(entry for entry in self._waiting if not entry[0].cancelled)
        for running in gone:
            running.complete(running.rows[:1] or [Row(-1, None)], finish="cancelled")
        return gone

    def _admit(self) -> None:
        """First come, first served, as long as rows are free; then bring rows nearer to one pending token.

        Those who wait for their prompts to be computed take rows, so nobody enters while there are too many of them.
        """
        tokens = sum(len(running.prompt) for running in self._slots.filling)
        while self._waiting and self._waiting[0][0].width <= self._slots.free and tokens < PREFILL_TOKENS:
            running, stream = self._waiting.popleft()
            running.start(stream)
            for row in running.rows:
                self._slots.take(running, row)
            tokens += len(running.prompt)
            self._groups = None
        before = self._slots.filling
        self._slots.fill()
        if before != self._slots.filling:
            self._groups = None

    def _begin(self, running: Running, strategy: Decoding) -> None:
        none = self.model.output_weight.new_zeros(0, self.model.config.d_model)
        running.memory = strategy.begin(torch.cat(running.outputs) if running.outputs else none)
        running.begun, running.outputs = True, []

    def _decode(self) -> None:
        """A token for every row that is ready, and more where proposals are taken."""
        groups = self._grouped()
        wanting = [running for group in groups for running in group.running if running.request.speculate]
        proposals = self._speculation.propose(wanting, self._banned)
        hidden = self._slots.decode({r.rows[0].slot: proposal.tokens for r, proposal in proposals.items()})  # [N, T, D]
        raw = self._slots.model.unembed(hidden).float()  # [N, T, V]
        for place in range(hidden.shape[1]):
            going: list[Running] = []
            for group in self._split(groups, proposals, place) if proposals else groups:
                going += self._advance(group, raw, hidden, place)
            groups = self._group(going) if going else []

    def _advance(self, group: Group, raw: Tensor, hidden: Tensor, place: int) -> list[Running]:
        """raw [N, T, V] and hidden [N, T, D] of all rows -> a token for every row of the group; who goes on at once."""
        logits = group.pick(raw, place)
        measured = measure(logits, group.parameters)
        if self._banned is not None:
            logits.index_fill_(2, self._banned, -torch.inf)  # in place: everybody has rows of his own
        view = View(group.parameters, logits, lambda: group.pick(hidden, place))
        taken: list[bool] = []
        if group.proposals:
            decided, accepted = self._speculation.decide(view, group.proposals, place)
            tokens, taken = decided.unsqueeze(1), accepted.tolist()
            parents = view.own
        else:
            parents, tokens = group.strategy.advance(view)
        logprobs = chosen(measured, parents, tokens)
        tops = alternatives(measured, group.parameters, parents)
        self._accept(group, parents, tokens.tolist(), logprobs.tolist(), tops)
        return [r for r, is_taken in zip(group.running, taken, strict=False) if is_taken and _goes_on(r)]

    def _split(self, groups: list[Group], proposals: dict[Running, Proposal], place: int) -> list[Group]:
        """Those with a proposal at this place apart from the others."""
        parts: list[Group] = []
        for group in groups:
            some = [r for r in group.running if r in proposals and place < len(proposals[r].tokens)]
            parts += self._group(some, [proposals[r] for r in some])
            proposed = set(some)
            parts += self._group([r for r in group.running if r not in proposed])
        return parts

    def _accept(
        self, group: Group, parents: Tensor, tokens: Table, logprobs: list[list[float]], tops: list[list[Alternatives]]
    ) -> None:
        """Carry out what a strategy decided for its requests."""
        if group.strategy.rows == 1:
            for running, (token,), (logprob,), (top,) in zip(group.running, tokens, logprobs, tops, strict=True):
                running.append(running.rows[0], token, logprob, top)
            return
        moves: list[tuple[int, Running, Row]] = []
        for running, origin in zip(group.running, parents.tolist(), strict=True):
            slots = [row.slot for row in running.rows]
            rows = [running.rows[parent].fork(slot) for parent, slot in zip(origin, slots, strict=True)]
            moves += [(slots[parent], running, row) for parent, row in zip(origin, rows, strict=True)]
            running.rows = rows
        self._slots.follow(moves)
        for running, *decided in zip(group.running, tokens, logprobs, tops, strict=True):
            for row, (token, logprob, top) in zip(running.rows, zip(*decided, strict=True), strict=True):
                _extend(running, row, token, logprob, top)

    def _remove_finished(self) -> list[Running]:
        live = [running for group in self._grouped() for running in group.running]
        done = [running for running in live if None not in [row.finish for row in running.rows]]
        if self.frozen:
            for running in done:
                self._slots.keep(running)
        self._free(done)
        for running in done:
            order = self._strategy(running.sampling).order(running.rows)
            running.complete([running.rows[place] for place in order])
        return done

    def _free(self, gone: list[Running]) -> None:
        for running in gone:
            self._speculation.release(running)
        if gone:
            self._slots.release({row.slot for running in gone for row in running.rows})
            self._groups = None

    def _grouped(self) -> list[Group]:
        """The live requests by strategy, made anew when somebody came or went."""
        if self._groups is None:
            live = dict.fromkeys(running for running, _ in self._slots.table)
            groups = self._group([running for running in live if running not in self._slots.filling])
            for group in groups:
                for running in group.running:
                    if not running.begun:
                        self._begin(running, group.strategy)
            self._groups = groups
        return self._groups

    def _group(self, live: Sequence[Running], proposals: Sequence[Proposal] = ()) -> list[Group]:
        parts: dict[Decoding, list[Running]] = {}
        for running in live:
            parts.setdefault(self._strategy(running.sampling), []).append(running)
        device = self.model.output_weight.device
        return [Group(strategy, part, device, proposals) for strategy, part in parts.items()]

    def _strategy(self, sampling: Sampling) -> Decoding:
        key = sampling.strategy + (json.dumps(sampling.options, sort_keys=True) if sampling.options else "")
        if key not in self._strategies:
            module = registry.find("generation.strategies", sampling.strategy)
            self._strategies[key] = module.Strategy(sampling.options)
        return self._strategies[key]

    def _check(self, ids: Sequence[int]) -> None:
        if not ids:
            raise UserError("the prompt is empty", where="prompt", fix="give at least one token, such as <|endoftext|>")
        if len(ids) >= self.capacity:
            raise UserError(
                "the prompt is longer than the context", where="prompt", value=len(ids),
                fix=f"use at most {self.capacity - 1} tokens, which leaves room for one more",
            )  # fmt: skip
        if not 0 <= min(ids) <= max(ids) < self.model.config.vocab_size:
            raise UserError(
                "the prompt has a token that the model does not know", where="prompt",
                value=min(ids) if min(ids) < 0 else max(ids), fix=f"use 0 to {self.model.config.vocab_size - 1}",
            )  # fmt: skip

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """No gradients, no dropout, the engine's own precision; the modules' modes are put back as they were."""
        training = [module for module in self.model.modules() if module.training] if self.model.training else []
        rounded = self.dtype is not None and not self.frozen
        autocast = torch.autocast(self.model.output_weight.device.type, self.dtype) if rounded else nullcontext()
        with torch.inference_mode(), autocast:
            if training:
                self.model.eval()
            try:
                yield
            finally:
                for module in training:
                    module.training = True


def _goes_on(running: Running) -> bool:
    """After a proposal was taken: the row holds it already, and nothing but the next token is missing."""
    row = running.rows[0]
    row.cached += 1
    running.accepted += 1
    return row.finish is None and running.length(row) == row.cached


def _extend(running: Running, row: Row, token: int, logprob: float, top: Alternatives) -> None:
    """Carry out one decision of a strategy on a row that is already a copy of its parent."""
    if token == DROP:
        running.drop(row)
    elif token == KEEP:
        assert row.finish is not None, "a strategy may only keep rows that have ended"
    else:
        assert row.finish is None, "a strategy may not extend a row that has ended"
        running.append(row, token, logprob, top)


def _banned_tokens(model: Decoder, tokenizer: Tokenizer) -> Tensor | None:
    """Ids that may never be written: those without a token, and in our form padding and a turn's beginning."""
    banned = torch.arange(model.config.vocab_size) >= tokenizer.vocab_size
    for name in (PAD, TURN_START):
        if name in tokenizer.special and tokenizer.has_own_form:
            banned[tokenizer.special[name]] = True
    return banned.nonzero()[:, 0].to(model.output_weight.device) if bool(banned.any()) else None


def _cache_dtype(model: Decoder, dtype: torch.dtype | None, frozen: bool) -> torch.dtype | None:
    """Of keys and values: that of the weights; with 8 bits for weights, 16 for these."""
    return torch.bfloat16 if frozen and dtype == torch.int8 else dtype


def _state(model: Decoder) -> tuple[object, ...]:
    """Changes when a training step was made, or weights were loaded, replaced or moved.

    Optimisers may write past torch's version counters, so a thousandth of all values is looked at.
    """
    weights = list(model.parameters())
    sums = torch.stack([weight.detach().flatten()[::PROBED].double().sum() for weight in weights])
    return (*sums.tolist(), *((id(weight), weight.device) for weight in weights))
