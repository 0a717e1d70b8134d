"""Texts for the next moderation model: what an operator said of reports and verdicts, and texts that nobody minded.

A report or a verdict that was upheld makes a positive, one that was rejected a negative, of the categories it named and
no others. Negatives of all categories are messages that were judged clean and never reported; of these a sample is
taken, always the same one, since to learn from all of them would drown what people said.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import and_, exists, select

from nestling.core.types import Labelled
from nestling.corpus.splits import unit_hash
from nestling.serving.store.schema import CONVERSATIONS, FLAGS, MESSAGES, VERDICTS
from nestling.serving.store.store import Store

CATEGORIES = (
    "harassment", "harassment/threatening", "hate", "hate/threatening", "illicit", "illicit/violent", "self-harm",
    "self-harm/intent", "self-harm/instructions", "sexual", "sexual/minors", "violence", "violence/graphic",
)  # fmt: skip
"""OpenAI's names, which a moderation model is trained on; a report in other words is no label."""


@dataclass
class Said:
    """A text and what is said of it: ``Said("You fool!", "c1", "report", {"harassment": True})``."""

    text: str
    conversation: str | None
    kind: str
    applies: dict[str, bool] = field(default_factory=dict)

    def row(self) -> Labelled:
        """As training reads it."""
        positive, judged = sorted(name for name, true in self.applies.items() if true), sorted(self.applies)
        return Labelled(text=self.text, labels=tuple(positive), judged=tuple(judged), meta=self.meta())

    def meta(self) -> dict[str, Any]:
        """Where it comes from; texts of one conversation are one group."""
        about = {"conversation": self.conversation} if self.conversation else {}
        return {"source": "feedback", "kind": self.kind, **about, "group": self.conversation or self.text}


def labels(store: Store, since: float, clean: float, trust: bool, left_out: Counter[str]) -> Iterator[Labelled]:
    """What an operator said, then clean texts.

    Args:
        since: Unix seconds: reports and verdicts from then on.
        clean: most clean texts for each of the others.
        trust: take reports that no operator has looked at for upheld.
        left_out: counts why reports and verdicts are no labels.
    """
    said = _said(store, since, trust, left_out)
    for one in said:
        yield one.row()
    for one in _clean(store, since, round(clean * len(said))):
        yield Labelled(text=one.text, labels=(), meta=one.meta())


def _said(store: Store, since: float, trust: bool, left_out: Counter[str]) -> list[Said]:
    """Every text that somebody spoke of; of two who contradict each other the later one counts."""
    found: dict[tuple[str, str], Said] = {}
    for row, kind, named in _statements(store, since):
        upheld = True if row.upheld is None and trust and kind == "report" else row.upheld
        text = row.text or row.content
        known = [name for name in named if name in CATEGORIES]
        if others := len(named) - len(known):
            left_out[f"{kind} in other words"] += others
        if not known:
            continue
        if upheld is None or not text:
            left_out[f"{kind} not reviewed" if upheld is None else f"{kind} without its text"] += 1
        else:
            one = found.setdefault((row.message_id or row.id, text), Said(text, row.conversation, kind))
            one.applies |= dict.fromkeys(known, bool(upheld))
    return list(found.values())


def _statements(store: Store, since: float) -> list[tuple[Any, str, list[str]]]:
    """(row, kind, categories) of every report and of every verdict that flags, in the order of their reviews."""
    mine, content = store.conversations.mine(), (MESSAGES.c.content, MESSAGES.c.conversation_id.label("conversation"))
    reports = select(FLAGS, MESSAGES.c.content.label("text"), *content).join(MESSAGES).join(CONVERSATIONS)
    verdicts = select(VERDICTS, *content).outerjoin(MESSAGES).outerjoin(CONVERSATIONS)
    verdicts = verdicts.where(VERDICTS.c.flagged, VERDICTS.c.message_id.is_(None) | mine, VERDICTS.c.created >= since)
    with store.database.read() as connection:
        rows: list[tuple[Any, str, list[str]]] = [
            (row, "report", [row.category]) for row in connection.execute(reports.where(mine, FLAGS.c.created >= since))
        ]
        rows += [
            (row, "verdict", [name for name, over in row.categories.items() if over])
            for row in connection.execute(verdicts)
        ]
    return sorted(rows, key=lambda found: (found[0].reviewed or found[0].created, found[0].id))


def _clean(store: Store, since: float, count: int) -> list[Said]:
    """The `count` messages with the smallest hashes out of those that were judged, and that nobody objected to."""
    about = VERDICTS.c.message_id == MESSAGES.c.id
    query = (
        select(MESSAGES.c.id, MESSAGES.c.content, MESSAGES.c.conversation_id).join(CONVERSATIONS)
        .where(
            store.conversations.mine(), MESSAGES.c.content != "",
            exists().where(and_(about, VERDICTS.c.created >= since)), ~exists().where(and_(about, VERDICTS.c.flagged)),
            ~exists().where(FLAGS.c.message_id == MESSAGES.c.id),
        )
    )  # fmt: skip
    with store.database.read() as connection:
        chosen = heapq.nsmallest(count, connection.execute(query), key=lambda row: unit_hash(row.id))
    return [Said(row.content, row.conversation_id, "clean") for row in chosen]
