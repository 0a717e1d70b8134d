"""Verifiable problems: a question, a chain of thought, one exact answer and the name of the checker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nestling.core.types import Message, Problem
from nestling.world import turns
from nestling.world.exercises import SIGNS, operands
from nestling.world.facts import Facts
from nestling.world.language import fill
from nestling.world.stories import Cast
from nestling.world.streams import Stream

NUMBER, PHRASE = "number", "phrase"


def problems(facts: Facts, seed: int, count: int, split: str) -> Iterator[Problem]:
    """Word problems, sums and questions about letters; `meta["thought"]` is the way to the answer."""
    for place in range(count):
        stream = Stream(seed, "problem", split, place)
        yield stream.weighted((_word_problem, _sum, _letters), (6, 2, 2))(facts, stream, split)


def _problem(user: str, answer: str, verifier: str, thought: str, truth: dict[str, Any]) -> Problem:
    return Problem(prompt=(Message(role="user", content=user),), answer=answer, verifier=verifier,
                   meta={**truth, "thought": thought})


def _word_problem(facts: Facts, stream: Stream, split: str) -> Problem:
    forms, cast = facts.lang.get("exercises"), Cast(facts, stream, facts.people[0])
    form = stream.pick(forms["problems"])
    a, b = operands(stream, form["op"], 60)
    a, b = (a + 20, b) if form["op"] == "-" else (a + 1, b + 1)
    answer = str(SIGNS[form["op"]](a, b))
    slots = {"hero": cast.hero(), "fruit": cast.play("fruit"), "a": a, "b": b, "c": answer}
    thought = " ".join(fill(step, slots) for step in [*form["steps"], stream.pick(forms["problem_end"])])
    truth = {"kind": "arithmetic_plain", "expression": f"{a} {form['op']} {b}", "answer": answer}
    return _problem(fill(form["text"], slots), answer, NUMBER, thought, truth)


def _sum(facts: Facts, stream: Stream, split: str) -> Problem:
    exchange = turns.arithmetic_plain(facts, stream, split)
    return _problem(exchange.user, exchange.truth["answer"], NUMBER, exchange.answer, exchange.truth)


def _letters(facts: Facts, stream: Stream, split: str) -> Problem:
    exchange = turns.spelling(facts, stream, split)
    verifier = NUMBER if exchange.truth["operation"] == "count" else PHRASE
    return _problem(exchange.user, exchange.truth["answer"], verifier, exchange.answer, exchange.truth)
