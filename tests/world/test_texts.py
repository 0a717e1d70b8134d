"""What the world writes reads as English, and what it claims is true."""

from __future__ import annotations

import ast
import re

import pytest

from nestling.tools import run
from nestling.world import World
from nestling.world.language import language

WORLD = World.generate(1)
DOCUMENTS = list(WORLD.documents(1, 1500)) + list(WORLD.documents(1, 500, "val"))
PROSE = [d for d in DOCUMENTS if d.meta["kind"] not in ("code", "lesson", "spelling", "sums")]
TALKS = [c for split in ("train", "val", "evaluation") for c in WORLD.dialogues(1, 600, split)]
TEXTS = [d.text for d in PROSE] + [m.content for c in TALKS for m in c.messages if m.role != "tool"]

MISTAKES = {
    "a for an": r"\b[Aa] [aeio][a-z]+", "an for a": r"\b[Aa]n (?!hour|honest)[^aeiouAEIOU\W]", "slot left": r"[{}]",
    "double space": r"  ", "double word": r"\b(?!that|had|well)([a-z]+) \1\b", "space before stop": r" [.,!?](?!\.)",
    "two stops": r"[.,!?][.,](?!\.)", "None": r"\bNone\b", "doubled article": r"\b(?:the|a|an) (?:the|a|an)\b",
    "lower case after stop": r"[a-z][.!?] [a-z]"}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_no_slip_of_grammar(mistake):
    found = [(match.group(), text[:80]) for text in TEXTS for match in [re.search(MISTAKES[mistake], text)] if match]
    assert not found, found[:3]


def test_first_letters_are_capital():
    for document in PROSE:
        assert document.text[0].isupper() or document.text[0] in "\"0123456789"
    for conversation in TALKS:
        for message in conversation.messages:
            if message.role == "user":
                assert message.content[0].isupper() or message.content[0].isdigit(), message.content


@pytest.mark.parametrize(("word", "a", "many"), [
    ("cat", "a cat", "cats"), ("owl", "an owl", "owls"), ("hour", "an hour", "hours"), ("pony", "a pony", "ponies"),
    ("donkey", "a donkey", "donkeys"), ("mouse", "a mouse", "mice"), ("box", "a box", "boxes"),
    ("sheep", "a sheep", "sheep"), ("loaf of bread", "a loaf of bread", "loaves of bread"),
    ("clock tower", "a clock tower", "clock towers"), ("bus driver", "a bus driver", "bus drivers")])
def test_forms_of_nouns(word, a, many):
    noun = language("en").noun(word)
    assert (noun.a, noun.many, noun.the, noun.The) == (a, many, f"the {word}", f"The {word}")


def test_lists_are_joined():
    join = language("en").join
    assert [join([]), join(["a"]), join(["a", "b"]), join(["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]


def test_every_template_can_be_filled():
    """All kinds of everything, so often that every plot and wording comes up, without an error."""
    assert len({d.text for d in DOCUMENTS}) > 0.97 * len(DOCUMENTS)


def test_programs_do_what_they_show():
    """Every shown result is what Python gives for the shown source."""
    shown = [d.text for d in DOCUMENTS if d.meta["kind"] == "code"]
    assert shown
    for text in shown:
        scope: dict[str, object] = {}
        exec(text[text.index("def "):text.index("\n>>> ")].rsplit("\n\n", 1)[0], scope)
        for call, result in re.findall(r">>> (.+)\n(.+)", text):
            assert eval(call, scope) == ast.literal_eval(result), call


def test_sums_are_right():
    checked = 0
    for document in DOCUMENTS:
        for left, sign, right, total in re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", document.text):
            assert eval(f"{left} {sign} {right}") == int(total)
            checked += 1
    assert checked > 50


def test_tool_results_are_the_tools():
    """The calculator's answer in a dialogue is what the calculator says."""
    calls = 0
    for conversation in TALKS:
        for call, result in zip(conversation.messages, conversation.messages[1:], strict=False):
            for wanted in call.tool_calls:
                assert "calculator" in conversation.tools
                assert run(wanted.name, wanted.arguments) == result.content
                calls += 1
    assert calls > 50


def test_problems_end_in_their_answer():
    for problem in WORLD.problems(1, 200):
        assert problem.answer in problem.meta["thought"]
        assert WORLD.score(problem.meta, problem.answer).total > 0.6


def test_conversations_alternate():
    """A user turn, then the assistant's (perhaps with a tool in between), and the assistant has the last word."""
    for conversation in TALKS:
        roles = [message.role for message in conversation.messages]
        assert roles[-1] == "assistant"
        order = "".join({"system": "s", "user": "u", "assistant": "a", "tool": "t"}[role] for role in roles)
        assert re.fullmatch(r"s?(u(at)?a)+", order), order


def test_quizzes_tell_the_truth():
    """Every answer of a quiz about a person of the world names only true values."""
    facts = WORLD.facts
    for document in DOCUMENTS:
        if document.meta["kind"] == "quiz":
            for question, answer in re.findall(r"Q: (.+)\nA: (.+)", document.text):
                known = [person for person in facts.people if person.name in question]
                if known and len(known) == 1:
                    assert not _false(facts, known[0], answer), (question, answer)


def _false(facts, person, text):
    allowed = facts.truths("people", person.name)
    found = facts.mentioned(text)
    return {word for name, words in found.items() if name.startswith("people.") for word in words} - allowed


def test_speed_is_printed(capsys):
    import time

    start, size = time.perf_counter(), 0
    for document in WORLD.documents(9, 1500):
        size += len(document.text)
    with capsys.disabled():
        print(f"\nworld documents: {size / (time.perf_counter() - start) / 1e6:.1f} MB/s")
