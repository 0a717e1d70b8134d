"""The one generation engine: many requests at once, each with its own parameters, seed, stops and interjections.

A step is: admit waiting requests, compute prompts and forced tokens (`Slots.fill`), one token of every row through the
model, one vectorised call of each strategy in use, then bookkeeping per request. Requests enter and leave between steps.

The engine holds the live module, not a copy: what a trainer changes is what the next step uses. It computes in the dtype
of the weights unless told otherwise. On a CPU that should be float32: with bfloat16, rounding depends on the size of the
batch, and a reply could depend on who shares it.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from nestling.core import registry
from nestling.core.errors import UserError
from nestling.generation.sampling import Sampling
from nestling.generation.sequence import Completion, Piece, Request, Row, Running
from nestling.generation.slots import Slots
from nestling.generation.strategy import DROP, KEEP, Decoding, View
from nestling.model.decoder import Decoder
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.special import END_OF_TEXT, PAD, TURN_END, TURN_START

Table = list[list[int]]
"""[G, R] numbers on the host."""
ADMIT_TOKENS = 8192
"""Prompt tokens admitted per step, so that those who are decoding never wait long."""


class Engine:
    """Batched generation with continuous admission.

    Args:
        model: the live decoder; train/eval mode is restored after each step.
        tokenizer: gives the stop tokens and the text.
        rows: requests (or beams) that run at once; others wait.
        capacity: longest prompt + continuation in tokens; the model's context when not given.
        dtype: compute in this dtype by autocast; None: the dtype of the weights.

    Raises:
        UserError: the tokenizer has more tokens than the model.

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
    ) -> None:
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model only {model.config.vocab_size}",
                fix="use the tokenizer that was saved with the model",
            )
        self.model, self.tokenizer, self.dtype = model, tokenizer, dtype
        self.capacity = min(capacity or model.config.context, model.config.context)
        self.stop_ids = frozenset(tokenizer.special[n] for n in (TURN_END, END_OF_TEXT) if n in tokenizer.special)
        self._slots = Slots(model, rows, self.capacity, dtype)
        self._waiting: deque[tuple[Running, bool]] = deque()
        self._strategies: dict[str, Decoding] = {}
        self._groups: list[_Group] | None = None
        self._banned = _banned_tokens(model, tokenizer)

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
                    self.step()
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
            UserError: an empty prompt or one that leaves no room, an unknown strategy or option, too many rows.
        """
        self._check(request.ids)
        strategy = self._strategy(request.sampling)
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
        stops = self.stop_ids if request.stop_ids is None else request.stop_ids
        running = Running(request, self.tokenizer, stop_ids=stops, width=strategy.rows, capacity=self.capacity)
        self._waiting.append((running, stream))
        return running

    def cancel(self, running: Running) -> None:
        """Give a request up: its rows are free before the next step computes anything. A done one stays as it is."""
        running.cancelled = running.completion is None

    @property
    def busy(self) -> bool:
        """Whether a step would do something."""
        return bool(self._slots.table or self._waiting)

    def step(self) -> list[Running]:
        """One token for every running request; returns those that are now done (cancelled ones included)."""
        with self._computing():
            done = self._remove_cancelled()
            self._admit()
            if self._slots.table:
                self._advance(self._slots.decode())
                done += self._remove_finished()
        return done

    # ---- parts of a step ----

    def _remove_cancelled(self) -> list[Running]:
        live = {id(running): running for running, _ in self._slots.table}
        gone = [running for running in live.values() if running.cancelled]
        self._free(gone)
        gone += [running for running, _ in self._waiting if running.cancelled]
        self._waiting = deque(entry for entry in self._waiting if not entry[0].cancelled)
        for running in gone:
            running.complete(running.rows[0] if running.rows else Row(-1, None), finish="cancelled")
        return gone

    def _admit(self) -> None:
        """First come, first served, as long as rows are free; then bring all rows to one pending token."""
        tokens = 0
        fresh: list[Running] = []
        while self._waiting and self._waiting[0][0].width <= self._slots.free and tokens < ADMIT_TOKENS:
            running, stream = self._waiting.popleft()
            running.start(stream)
            for row in running.rows:
                self._slots.take(running, row)
            tokens += len(running.prompt)
            fresh.append(running)
        outputs = {id(running): hidden for running, hidden in self._slots.fill()}
        none = self.model.output_weight.new_zeros(0, self.model.config.d_model)
        for running in fresh:
            self._groups = None
            running.memory = self._strategy(running.sampling).begin(outputs.get(id(running), none))

    def _advance(self, hidden: Tensor) -> None:
        """hidden [N, D] of all rows -> a token for every row."""
        raw = self.model.unembed(hidden).float()  # [N, V]
        logits = raw if self._banned is None else raw.masked_fill(self._banned, -torch.inf)
        for group in self._grouped():
            view = View(group.running, group.pick(logits), group.pick(hidden), group.columns)
            parents, tokens = group.strategy.advance(view)
            logprobs = _log_probabilities(group.pick(raw), view, parents, tokens)
            self._accept(group, parents.tolist(), tokens.tolist(), logprobs.tolist())

    def _accept(self, group: _Group, parents: Table, tokens: Table, logprobs: list[list[float]]) -> None:
        """Carry out what a strategy decided for its requests."""
        if group.strategy.rows == 1:
            for running, (token,), (logprob,) in zip(group.running, tokens, logprobs, strict=True):
                running.append(running.rows[0], token, logprob)
            return
        moves: list[tuple[int, Running, Row]] = []
        for running, origin in zip(group.running, parents, strict=True):
            slots = [row.slot for row in running.rows]
            rows = [running.rows[parent].fork(slot) for parent, slot in zip(origin, slots, strict=True)]
            moves += [(slots[parent], running, row) for parent, row in zip(origin, rows, strict=True)]
            running.rows = rows
        self._slots.follow(moves)
        for running, chosen, scored in zip(group.running, tokens, logprobs, strict=True):
            for row, token, logprob in zip(running.rows, chosen, scored, strict=True):
                _extend(running, row, token, logprob)

    def _remove_finished(self) -> list[Running]:
        done: list[Running] = []
        for group in self._grouped():
            for running in group.running:
                if all(row.finish is not None for row in running.rows):
                    done.append(running)
        self._free(done)
        for running in done:
            running.complete(running.rows[self._strategy(running.sampling).best(running.rows)])
        return done

    def _free(self, gone: list[Running]) -> None:
        if gone:
            self._slots.release({row.slot for running in gone for row in running.rows})
            self._groups = None

    def _grouped(self) -> list[_Group]:
        """The live requests by strategy, made anew when somebody came or went."""
        if self._groups is None:
            groups: dict[int, _Group] = {}
            for running in dict.fromkeys(running for running, _ in self._slots.table):
                strategy = self._strategy(running.sampling)
                groups.setdefault(id(strategy), _Group(strategy)).running.append(running)
            self._groups = list(groups.values())
            for group in self._groups:
                group.locate(self.model.output_weight.device)
        return self._groups

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
        device = self.model.output_weight.device.type
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(torch.autocast(device, dtype=self.dtype, enabled=self.dtype is not None))
            if training:
                stack.callback(_set_training, training)
                self.model.eval()
            yield


class _Group:
    """Requests that share a strategy, where their rows are, and their parameters as tensors."""

    def __init__(self, strategy: Decoding) -> None:
        self.strategy = strategy
        self.running: list[Running] = []
        self.columns: dict[str, Tensor] = {}
        self._slots: Tensor | None = None

    def locate(self, device: torch.device) -> None:
        slots = [row.slot for running in self.running for row in running.rows]
        self._slots = torch.tensor(slots, device=device)

    def pick(self, values: Tensor) -> Tensor:
        """[N, ·] of all rows -> [G, R, ·] of this group's."""
        assert self._slots is not None
        return values[self._slots].unflatten(0, (len(self.running), self.strategy.rows))


def _extend(running: Running, row: Row, token: int, logprob: float) -> None:
    """Carry out one decision of a strategy on a row that is already a copy of its parent."""
    if token == DROP:
        running.drop(row)
    elif token == KEEP:
        assert row.finish is not None, "a strategy may only keep rows that have ended"
    else:
        assert row.finish is None, "a strategy may not extend a row that has ended"
        running.append(row, token, logprob)


def _log_probabilities(raw: Tensor, view: View, parents: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(raw / temperature) at the chosen tokens, [G, R]: before penalties, filters and banned tokens."""
    scaled = raw / view.column("scoring_temperature").view(-1, 1, 1)
    chosen = scaled.flatten(1).gather(1, parents * raw.shape[2] + tokens.clamp_min(0))
    return chosen - scaled.logsumexp(2).gather(1, parents)


def _banned_tokens(model: Decoder, tokenizer: Tokenizer) -> Tensor | None:
    """[V] true where a token may never be written: ids without a token, padding, and the beginning of a turn."""
    banned = torch.arange(model.config.vocab_size) >= tokenizer.vocab_size
    for name in (PAD, TURN_START):
        if name in tokenizer.special:
            banned[tokenizer.special[name]] = True
    return banned.to(model.output_weight.device) if bool(banned.any()) else None


def _set_training(modules: list[nn.Module]) -> None:
    for module in modules:
        module.training = True
