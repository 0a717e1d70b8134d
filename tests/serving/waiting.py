"""What the service does after its answer has gone out is waited for, not expected at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

SECONDS = 10.0


def wait_until(is_so: Callable[[], object], seconds: float = SECONDS) -> bool:
    """Whether it became so."""
    end = time.monotonic() + seconds
    while not (found := bool(is_so())) and time.monotonic() < end:
        time.sleep(0.01)
    return found


async def until(is_so: Callable[[], object], seconds: float = SECONDS) -> bool:
    """The same, while the event loop goes on."""
    end = time.monotonic() + seconds
    while not (found := bool(is_so())) and time.monotonic() < end:
        await asyncio.sleep(0.005)
    return found
