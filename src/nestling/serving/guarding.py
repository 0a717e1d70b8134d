"""The moderation model before and after the chat model: what is asked is judged, what is answered is judged on its way.

All that a client sends for a model to read is judged, whoever is said to have said it: nobody knows who wrote the turns
of an assistant or a tool in a history. A text that is cut into several messages is judged as one, too. What was judged
lately is not judged again.

A reply is told in parts, each after it has been judged together with what came before, as far as the moderation model
reads at once; so a stream is late by one part, and of a reply that is cut off nothing flagged was seen.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from copy import copy
from itertools import groupby
from typing import Any, Generic, Literal, TypeVar

from nestling.core.types import Message
from nestling.generation.sequence import Piece
from nestling.serving.errors import ApiError
from nestling.serving.moderation import Growing, Moderator
from nestling.serving.moderation import Verdict as Judged
from nestling.serving.protocol.deltas import Delta
from nestling.serving.store.records import Verdict
from nestling.serving.store.store import Store

Keep = Callable[[str, Verdict], None]
Told = TypeVar("Told", Delta, Piece)
NAME = "nestling-moderation"
"""Of the moderation model, told with its verdicts."""
PART = 160
"""Characters of a reply that are judged, and told, at once."""
AGAIN = 8
"""No character is read more often than about so many times: where the moderation model reads far back, parts are longer."""
KNOWN = 4096
"""Verdicts on texts of requests that are remembered, by the texts' hashes."""


class Guard:
    """Judges with a moderation model; what it flags is kept with its text, for people to look at.

    Args:
        moderator: the model.
        keep: takes the key's name and a verdict; called in a thread.
        clean: keep verdicts that do not flag, too: those on replies, and of a request's texts on the last one.
    """

    def __init__(self, moderator: Moderator, keep: Keep | None = None, *, clean: bool = False) -> None:
        self.moderator, self._keep, self._clean = moderator, keep, clean
        self._known: dict[bytes, Judged] = {}  # verdicts on texts of requests, the latest last

    def keeping(self, keep: Keep) -> Guard:
        """The same guard with another place for its verdicts, all of them: they are on messages, which are kept anyway."""
        other = copy(self)
        other._keep, other._clean = keep, True
        return other

    async def admit(self, texts: Sequence[str], key: str, param: str = "messages") -> None:
        """Judge the texts of a request.

        Raises:
            ApiError: one of them is flagged.
        """
        verdicts = await self._on(texts)
        flagged = [text for text, verdict in verdicts.items() if verdict.flagged]
        for text, verdict in verdicts.items():  # of a text and what it is joined to only the text itself
            if (verdict.flagged or text == texts[-1]) and not any(one in text for one in flagged if one != text):
                await self._note(text, verdict, "input", key)
        if flagged:
            what = f"the request was not answered: a text in it is judged to be {_over(verdicts.values())}"
            raise ApiError(what, code="content_policy_violation", param=param)

    async def flags(self, reply: Growing, new: str, key: str) -> str:
        """The categories that a reply is flagged for when `new` has been added, joined; empty for none."""
        verdict = await asyncio.to_thread(reply.add, new)
        await self._note(reply.text, verdict, "output", key)
        return _over([verdict])

    async def _on(self, texts: Iterable[str]) -> dict[str, Judged]:
        """The verdict on each text, those that are not known from one batch."""
        marks = {text: hashlib.blake2b(text.encode(errors="surrogatepass")).digest() for text in texts if text}
        found = {text: self._known.pop(mark) for text, mark in marks.items() if mark in self._known}
        new = [text for text in marks if text not in found]
        found |= zip(new, await asyncio.to_thread(self.moderator.judge, new) if new else (), strict=True)
        self._known |= {marks[text]: verdict for text, verdict in found.items()}
        while len(self._known) > KNOWN:
            del self._known[next(iter(self._known))]
        return {text: found[text] for text in marks}

    async def _note(self, text: str, verdict: Judged, direction: Literal["input", "output"], key: str) -> None:
        if self._keep is not None and (verdict.flagged or self._clean):
            row = Verdict(direction=direction, moderator=NAME, flagged=verdict.flagged, text=text,
                          categories=verdict.categories, scores=verdict.scores)  # fmt: skip
            await asyncio.to_thread(self._keep, key, row)


def joined(messages: Iterable[Message]) -> list[str]:
    """What an author says without a break, and that with what the same author said the last time before.

    >>> joined(Message(role=role, content=text) for role, text in (("user", "a"), ("user", "b"), ("tool", "-"), ("user", "c")))
    ['a b', '-', 'c', 'a b c']
    """
    texts: list[str] = []
    before: dict[str, str] = {}
    for role, run in groupby((one for one in messages if one.content.strip()), key=lambda one: one.role):
        said = " ".join(one.content for one in run)
        texts += [said, f"{before[role]} {said}"] if role in before else [said]
        before[role] = said
    return texts


def _over(verdicts: Iterable[Judged]) -> str:
    """The categories in which texts are flagged, joined."""
    return ", ".join(dict.fromkeys(name for one in verdicts for name, over in one.categories.items() if over))


class Watched(Generic[Told]):
    """What a reply is told in, held back until it is judged; ends early, with `flagged` set, where it is flagged.

    Args:
        guard: None lets everything pass.
        batches: closed at the end.
        key: who asks.
    """

    def __init__(self, guard: Guard | None, batches: AsyncGenerator[list[Told], None], key: str) -> None:
        self.flagged = ""
        """The categories."""
        self._guard, self._key = guard, key
        self._batches: AsyncGenerator[list[Told], None] = batches
        self._reply = guard and Growing(guard.moderator)
        self._new = ""
        self._held: list[Told] = []

    async def told(self) -> AsyncGenerator[list[Told], None]:
        """What may be told."""
        async with aclosing(self._batches) as batches:
            async for batch in batches:
                self._held += batch
                self._new += "".join(one.text for one in batch)
                part = max(PART, len(self._reply.window) // AGAIN) if self._reply else 0
                if len(self._new) >= part and (told := await self._release()):
                    yield told
                if self.flagged:
                    return
            if told := await self._release():
                yield told

    async def _release(self) -> list[Told]:
        """What was held back, if all of the text may be told."""
        if self._guard and self._reply and self._new:
            self.flagged = await self._guard.flags(self._reply, self._new, self._key)
        told, self._held, self._new = self._held, [], ""
        return [] if self.flagged else told


def guard_of(state: Any) -> Guard | None:
    """The guard of an app, where it has a moderation model and is asked to use it."""
    if state.moderator is None or not state.settings.moderation:
        return None
    store: Store | None = state.store
    return Guard(
        state.moderator, None if store is None else lambda key, verdict: store.of(key).moderation.add([verdict])
    )
