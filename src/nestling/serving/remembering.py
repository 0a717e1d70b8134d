"""What is remembered of responses for previous_response_id: in the store where there is one, else in memory."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from nestling.core.types import Message
from nestling.serving.store.store import Store


@dataclass(frozen=True)
class Kept:
    """A response that may be asked for again: what was sent, and the conversation so far without instructions."""

    body: dict[str, Any]
    messages: tuple[Message, ...]


class Memory:
    """The latest responses of each key.

    Args:
        size: how many of a key's responses are remembered.
        store: keeps them beyond the end of the service.
    """

    def __init__(self, size: int, store: Store | None = None) -> None:
        self._size, self._store = size, store
        self._kept: dict[str, OrderedDict[str, Kept]] = {}

    async def keep(self, kept: Kept, key: str) -> None:
        """Remember a response; the key's oldest one may be forgotten for it."""
        if self._store is not None:
            responses = self._store.of(key).responses
            await asyncio.to_thread(responses.keep, kept.body, kept.messages, self._size)
            return
        own = self._kept.setdefault(key, OrderedDict())
        own[kept.body["id"]] = kept
        while len(own) > self._size:
            own.popitem(last=False)

    async def get(self, name: str, key: str) -> Kept | None:
        """The response of that id, if the key's holder made it."""
        if self._store is None:
            return self._kept[key].get(name) if key in self._kept else None
        found = await asyncio.to_thread(self._store.of(key).responses.get, name)
        return None if found is None else Kept(*found)

    async def forget(self, name: str, key: str) -> bool:
        """Forget a response; whether there was one."""
        if self._store is None:
            return key in self._kept and self._kept[key].pop(name, None) is not None
        return await asyncio.to_thread(self._store.of(key).responses.forget, name)
