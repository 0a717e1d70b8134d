"""The moderation model before and after the chat model: what is asked is judged, what is answered is judged on its way.

A reply is told in parts, each after it has been judged together with all that came before; so a stream is late by one
part, and of a reply that is cut off nothing flagged was seen.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any, Literal

from nestling.core.types import Message
from nestling.serving.errors import ApiError
from nestling.serving.moderation import Moderator
from nestling.serving.protocol.deltas import Delta
from nestling.serving.store.records import Verdict
from nestling.serving.store.store import Store

Keep = Callable[[str, Verdict], None]
PART = 160
"""Characters of a reply that are judged, and told, at once."""
READABLE = ("text", "thought", "arguments")


class Guard:
    """Judges with a moderation model; what it flags is kept with its text, for people to look at.

    Args:
        moderator: the model.
        keep: takes the key's name and a verdict; called in a thread.
        name: of the moderation model, told with its verdicts.
        clean: keep verdicts that do not flag, too.
    """

    def __init__(
        self, moderator: Moderator, keep: Keep | None = None, *, name: str = "moderation", clean: bool = False
    ) -> None:
        self._moderator, self._keep, self._name, self._clean = moderator, keep, name, clean

    def keeping(self, keep: Keep) -> Guard:
        """The same guard with another place for its verdicts, all of them: they are on messages, which are kept anyway."""
        return Guard(self._moderator, keep, name=self._name, clean=True)

    async def admit(self, messages: Sequence[Message], key: str) -> None:
        """Judge the last thing that a user said.

        Raises:
            ApiError: it is flagged.
        """
        asked = [message.content for message in messages if message.role == "user"][-1:]
        if asked and (flagged := await self.flags(asked[0], "input", key)):
            what = f"the message was not answered: it is judged to be {flagged}"
            raise ApiError(what, code="content_policy_violation", param="messages")

    async def flags(self, text: str, direction: Literal["input", "output"], key: str) -> str:
        """The categories that a text is flagged for, joined; empty for none."""
        [verdict] = await asyncio.to_thread(self._moderator.judge, [text])
        if self._keep is not None and (verdict.flagged or self._clean):
            row = Verdict(direction=direction, moderator=self._name, flagged=verdict.flagged, text=text,
                          categories=verdict.categories, scores=verdict.scores)  # fmt: skip
            await asyncio.to_thread(self._keep, key, row)
        return ", ".join(name for name, over in verdict.categories.items() if over)


class Watched:
    """The deltas of a reply, held back until they are judged; ends early, with `flagged` set, where they are flagged."""

    def __init__(self, guard: Guard, batches: AsyncGenerator[list[Delta], None], key: str) -> None:
        self.flagged = ""
        """The categories."""
        self._guard, self._batches, self._key = guard, batches, key
        self._text = ""
        self._judged = 0
        self._held: list[Delta] = []

    async def deltas(self) -> AsyncGenerator[list[Delta], None]:
        """What may be told."""
        async with aclosing(self._batches) as batches:
            async for batch in batches:
                self._held += batch
                self._text += "".join(delta.text for delta in batch if delta.kind in READABLE)
                if len(self._text) - self._judged >= PART and (told := await self._release()):
                    yield told
                if self.flagged:
                    return
            if told := await self._release():
                yield told

    async def _release(self) -> list[Delta]:
        """What was held back, if all of the text may be told."""
        if self._judged < len(self._text):
            self.flagged = await self._guard.flags(self._text, "output", self._key)
            self._judged = len(self._text)
        told, self._held = self._held, []
        return [] if self.flagged else told


def guard_of(state: Any) -> Guard | None:
    """The guard of an app, where it has a moderation model and is asked to use it."""
    if state.moderator is None or not state.settings.moderation:
        return None
    store: Store | None = state.store
    return Guard(
        state.moderator, None if store is None else lambda key, verdict: store.of(key).moderation.add([verdict])
    )
