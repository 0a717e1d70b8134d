"""Capabilities: every row is asked, in all its turns, and its score lands with its task."""

from __future__ import annotations

import pytest

from nestling.core.intervals import wilson
from nestling.core.types import Message, PromptRow
from nestling.evaluation.capabilities import Capability, Exam, converse, measure
from nestling.generation.chat import replies
from nestling.generation.engine import Engine
from nestling.generation.sampling import Sampling
from nestling.objectives import _toys

GREEDY = Sampling(temperature=0, max_tokens=5)


@pytest.fixture(scope="module")
def engine() -> Engine:
    tokenizer = _toys.byte_tokenizer()
    return Engine(_toys.small_decoder(tokenizer, 0, context=256), tokenizer, rows=4)


def row(text: str, **meta: object) -> PromptRow:
    return PromptRow(prompt=(Message(role="user", content=text),), meta=meta)


def test_every_turn_is_answered_with_the_conversation_before_it(engine: Engine) -> None:
    rows = [row("a"), row("b", turns=["c", "d"]), row("e", tools=["calculator"], turns=["f"])]
    texts = converse(rows, engine, GREEDY)
    assert [len(turns) for turns in texts] == [1, 3, 2]
    prompt = rows[1].prompt
    for text, following in zip(texts[1], ["c", "d", None], strict=True):
        (alone,) = replies(engine, [PromptRow(prompt=prompt)], GREEDY, 0)
        assert alone.text == text
        prompt += (*alone.messages, Message(role="user", content=following or ""))
    (offered,) = replies(engine, [rows[2]], GREEDY, 0)
    assert texts[2][0] == offered.text


def test_a_conversation_that_outgrows_the_context_ends_with_what_it_has(engine: Engine) -> None:
    rows = [row("a", turns=["b" * 300, "c"]), row("d", turns=["e"])]
    assert [len(texts) for texts in converse(rows, engine, GREEDY)] == [1, 2]


def test_scores_land_with_their_task(engine: Engine) -> None:
    def whose(letter: str) -> Exam:
        rows = [row(letter, good=number % 4 > 0) for number in range(8)]
        return Exam(
            letter, rows, check=lambda r, texts: float(r.meta["good"] and r.prompt[0].content == letter), bar=0.7
        )

    figures = measure([whose("a"), whose("b")], engine, GREEDY, failures=1)
    assert list(figures) == ["a", "b"]
    for name, figure in figures.items():
        assert (figure.value, figure.n, figure.reached) == (0.75, 8, True)
        assert figure.interval == wilson(6, 8)
        (failure,) = figure.failures
        assert failure.prompt == [{"role": "user", "content": name}]
        assert failure.meta == {"good": False}
        assert len(failure.replies) == 1


def test_lower_can_be_better(engine: Engine) -> None:
    exam = Exam("refusals", [row("a"), row("b")], lambda r, _: float(r.prompt[0].content == "a"), 0.05, False)
    (figure,) = measure([exam], engine, GREEDY).values()
    assert (figure.value, figure.reached) == (0.5, False)
    assert [sample.prompt[0]["content"] for sample in figure.failures] == ["a"]


def test_the_report_entry_has_its_keys() -> None:
    entry = Capability(0.9, 10, None, wilson(9, 10)).to_row()
    assert {"value", "n", "bar", "interval"} <= entry.keys()
    assert entry["reached"] is None
