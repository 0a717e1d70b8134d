"""Held-out test sets, one per capability: wordings, strangers and personas that never occur in training.

A row asks its `meta["turns"]` one after another after the prompt; `meta["truths"]` holds what the rubric needs for each
reply, `meta["reference"]` one right reply each, `meta["tools"]` the tools on offer and `meta["world"]` which world it
is. The fields of the first truth also stand in meta itself. "preference" gives prompts of all kinds, one answer each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nestling.core.errors import UserError
from nestling.core.types import Message, PromptRow
from nestling.world import dialogues, rubric, turns
from nestling.world.facts import ATTRIBUTES, Facts, make_facts
from nestling.world.rankings import SHARES, situation
from nestling.world.streams import Stream
from nestling.world.turns import Exchange

SPLIT = "evaluation"
Maker = Callable[[Facts, Stream], tuple[list[Message], list[Exchange]]]


def evaluation(facts: Facts, kind: str, seed: int, count: int) -> list[PromptRow]:
    """`count` rows for this capability; different prompts as long as the world has any.

    Raises:
        UserError: an unknown capability.
    """
    if kind not in KINDS:
        raise UserError("the world has no such capability", value=kind, fix=f"use one of {', '.join(KINDS)}")
    rows: dict[str, PromptRow] = {}
    for place in range(4 * count):
        stream = Stream(seed, "evaluation", kind, place)
        maker = KINDS[kind]
        before, exchanges = _single(maker, facts, stream) if isinstance(maker, str) else maker(facts, stream)
        row = _row(facts, before, exchanges)
        rows.setdefault(_key(row), row)
        if len(rows) == count:
            break
    found = list(rows.values())
    return [found[place % len(found)] for place in range(count)]


def _key(row: PromptRow) -> str:
    return "\n".join([message.content for message in row.prompt] + row.meta["turns"])


def _row(facts: Facts, before: list[Message], exchanges: list[Exchange]) -> PromptRow:
    meta: dict[str, Any] = {
        **exchanges[0].truth, "turns": [exchange.user for exchange in exchanges[1:]],
        "truths": [exchange.truth for exchange in exchanges], "reference": [exchange.answer for exchange in exchanges],
        "world": {"seed": facts.seed, "size": facts.size, "language": facts.lang.name},
        "tools": [dialogues.CALCULATOR] if exchanges[0].expression else []}
    return PromptRow(prompt=(*before, Message(role="user", content=exchanges[0].user)), meta=meta)


def _single(kind: str, facts: Facts, stream: Stream) -> tuple[list[Message], list[Exchange]]:
    """One exchange of this kind."""
    exchange = turns.KINDS[kind](facts, stream, SPLIT)
    tools = (dialogues.CALCULATOR,) if exchange.expression else ()
    return dialogues.system(facts, stream, tools), [exchange]


def _known(facts: Facts, stream: Stream) -> tuple[list[Message], list[Exchange]]:
    """A question on a person or town of the world."""
    kind = stream.weighted(("people", "towns"), (4, 1))
    entity, attribute = stream.pick(facts.pool(kind)), stream.pick(ATTRIBUTES[kind])
    exchange = turns.fact_about(facts, stream, SPLIT, kind, entity, attribute)
    return dialogues.system(facts, stream, ()), [exchange]


def _identity(facts: Facts, stream: Stream) -> tuple[list[Message], list[Exchange]]:
    """1 to 3 questions about the assistant."""
    exchanges = [turns.identity(facts, stream, SPLIT) for _ in range(stream.number(1, 3))]
    return dialogues.system(facts, stream, ()), exchanges


def _greetings(facts: Facts, stream: Stream) -> tuple[list[Message], list[Exchange]]:
    """A greeting, and mostly a thank-you or goodbye after it."""
    aspects = stream.pick((["greeting"], ["greeting", "thanks"], ["greeting", "goodbye"],
                           ["greeting", "thanks", "goodbye"]))
    exchanges = [turns.greeting(facts, stream, SPLIT, aspect) for aspect in aspects]
    return dialogues.system(facts, stream, ()), exchanges


def _persona(facts: Facts, stream: Stream) -> tuple[list[Message], list[Exchange]]:
    """A character whose name is new, over several turns."""
    content, exchanges = dialogues.persona_exchanges(facts, stream, SPLIT)
    return [Message(role="system", content=content)], exchanges


def _preference(facts: Facts, stream: Stream) -> tuple[list[Message], list[Exchange]]:
    """Any kind of prompt, as in reinforcement learning but in held-out wordings."""
    messages, exchange = situation(facts, stream, SPLIT, SHARES)
    return messages[:-1], [exchange]


def judge(row: PromptRow, replies: list[str], verdict: Callable[[Facts, rubric.Truth, str], bool]) -> float:
    """1.0 when there is a reply to every turn and the verdict on each is true, else 0.0."""
    truths, world = row.meta["truths"], row.meta["world"]
    facts = make_facts(world["seed"], world["size"], world["language"])
    passed = len(replies) == len(truths) and all(map(verdict, [facts] * len(truths), truths, replies))
    return float(passed)


def is_right(facts: Facts, truth: rubric.Truth, text: str) -> bool:
    """Whether the content of a reply is wholly right."""
    return rubric.correct(facts, truth, text) == 1.0


# Capability → the maker of its rows, or the one kind of exchange it consists of.
KINDS: dict[str, Maker | str] = {
    "fact_recall": _known, "unknown_refused": "unknown", "known_refused": _known,
    "arithmetic_with_calculator": "arithmetic", "arithmetic_without": "arithmetic_plain", "identity": _identity,
    "greetings": _greetings, "persona": _persona, "harmful_declined": "harmful", "lookalikes_answered": "lookalike",
    "preference": _preference}
