"""Kills a writer with SIGKILL, again and again, and looks for what it had acknowledged.

    python tests/serving/store/writer.py sqlite:////tmp/kill.db 100      prints: kills, acknowledged rows, lost rows

The writer is forked from a process that has imported everything and opened nothing, writes messages and votes as fast as
it can, and says each one into a pipe as soon as the store's method has returned.
"""

from __future__ import annotations

import os
import random
import select
import signal
import sys
import time

from nestling.serving.store.records import MessageRecord, Missing, ModelVersion, VoteRecord, Written
from nestling.serving.store.store import Store

REPLY = Written(version=ModelVersion(name="small"), content="Hello! " * 50)
FIRST, SPREAD = 0.03, 0.12
"""Seconds: a writer lives at least the first, and up to the sum; every fourth may be killed while it opens the store."""


def write(address: str, pipe: int) -> None:
    """Write for ever; one line for each row that is on disk: "message ID" or "vote ID"."""
    store = Store.open(address)
    id = store.conversations.create().id
    while True:
        question = store.conversations.ask(id, "Hi", None)
        os.write(pipe, f"message {question.id}\n".encode())
        reply = store.conversations.answer(id, question.id, REPLY)
        os.write(pipe, f"message {reply.id}\n".encode())
        store.feedback.vote(reply.id, VoteRecord(value=1))
        os.write(pipe, f"vote {reply.id}\n".encode())


def killed(address: str, seconds: float, *, busy: bool) -> list[list[str]]:
    """What a writer acknowledged before it was killed, as (kind, id). The time counts from its first row if `busy`."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        write(address, writing)
    os.close(writing)
    if busy:
        select.select([reading], [], [], 30)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(reading) as told:
        return [line.split() for line in told if line.endswith("\n")]


def found(store: Store, id: str) -> MessageRecord | None:
    """The message, if it is there."""
    try:
        return store.conversations.message(id)
    except Missing:
        return None


def main() -> None:
    """Kill so many writers; print kills, acknowledged rows and lost rows."""
    address, kills = sys.argv[1], int(sys.argv[2])
    Store.open(address).close()
    clock = random.Random(1)
    acknowledged = lost = 0
    for kill in range(kills):
        rows = killed(address, FIRST + SPREAD * clock.random(), busy=kill % 4 > 0)
        store = Store.open(address)
        for kind, id in rows:
            message = found(store, id)
            lost += message is None or (kind == "vote" and message.vote is None)
        acknowledged += len(rows)
        store.close()
    print(kills, acknowledged, lost)


if __name__ == "__main__":
    main()
