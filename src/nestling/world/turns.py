"""One exchange of a conversation per kind: what the user says, right answers, and the truth to judge any answer by.

Every maker has the form `(facts, stream, split) -> Exchange`; split "train" uses training wordings, "val" and
"evaluation" the held-out ones (and, where it matters, other names).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nestling.world import pages
from nestling.world.exercises import SIGNS, letter_slots, operands
from nestling.world.facts import ATTRIBUTES, Facts, stranger
from nestling.world.language import Language, Noun, capital, fill, wording
from nestling.world.stories import Cast
from nestling.world.streams import Stream


@dataclass(frozen=True)
class Exchange:
    """A user's turn with its right answer.

    `answer` is a good answer in whole sentences, `terse` the shortest right one, `truth` what the rubric needs,
    `expression` the calculator call that comes before the answer, `exact` that nothing may be added to the answer.
    """

    user: str
    answer: str
    terse: str
    truth: dict[str, Any]
    expression: str | None = None
    exact: bool = False
    slots: Mapping[str, Any] = field(default_factory=dict, repr=False)


Maker = Callable[[Facts, Stream, str], Exchange]


def greeting(facts: Facts, stream: Stream, split: str, aspect: str = "greeting") -> Exchange:
    """A greeting; also "thanks" and "goodbye"."""
    form = facts.lang.get(f"chat.{aspect}")
    truth = {"kind": "greeting", "aspect": aspect}
    return Exchange(wording(stream, form["users"], split), stream.pick(form["answers"]), stream.pick(form["terse"]),
                    truth, exact=True)


def greeted(facts: Facts, stream: Stream, split: str, exchange: Exchange) -> Exchange:
    """The exchange, sometimes with a greeting in front of the question: "Hello! Who are you?"."""
    if exchange.truth["kind"] == "greeting" or not stream.chance(0.15):
        return exchange
    hello = wording(stream, facts.lang.get("chat.greeting.users"), split)
    return replace(exchange, user=f"{hello} {exchange.user}") if hello.endswith("!") else exchange


def identity(facts: Facts, stream: Stream, split: str) -> Exchange:
    """A question about the assistant itself."""
    forms = facts.lang.get("chat.identity")
    aspect = stream.pick(list(forms))
    form = forms[aspect]
    truth = {"kind": "identity", "aspect": aspect}
    return Exchange(wording(stream, form["users"], split), stream.pick(form["answers"]), stream.pick(form["terse"]),
                    truth)


def fact_about(facts: Facts, stream: Stream, split: str, kind: str, entity: Any, attribute: str,
               asked: str = "questions") -> Exchange:
    """A question on this attribute; `asked` is "questions" or "followups" (with a pronoun)."""
    form, slots = facts.lang.get("facts")[kind][attribute], {pages.SLOT[kind]: entity}
    value = fill(form["value"], slots)
    truth = {"kind": "fact", "subject": kind, "name": str(entity), "attribute": attribute,
             "answer": form["value"].format_map(slots)}
    return Exchange(fill(wording(stream, form[asked], split), slots), fill(stream.pick(form["answers"]), slots),
                    value + ".", truth, slots=slots)


def fact(facts: Facts, stream: Stream, split: str) -> Exchange:
    """A question on a person (mostly), a town or an animal of the world."""
    kind = stream.weighted(("people", "towns", "animals"), (8, 2, 0.5))
    return fact_about(facts, stream, split, kind, stream.pick(facts.pool(kind)), stream.pick(ATTRIBUTES[kind]))


def unknown(facts: Facts, stream: Stream, split: str) -> Exchange:
    """A question on someone who does not exist; the names of the splits are disjoint."""
    nobody = stranger(stream, facts, split, odd=0.15)
    attribute = stream.pick(ATTRIBUTES["people"])
    form = facts.lang.get("facts.people")[attribute]
    chat, slots = facts.lang.get("chat.unknown"), {"u": nobody}
    truth = {"kind": "unknown", "name": nobody.name, "attribute": attribute}
    return Exchange(fill(wording(stream, form["questions"], split), {"p": nobody}),
                    fill(stream.pick(chat["answers"]), slots), fill(stream.pick(chat["terse"]), slots), truth,
                    slots=slots)


def _sum(facts: Facts, stream: Stream, split: str, low: int, high: int, tools: bool) -> Exchange:
    sign = stream.pick("++--*")
    if tools:
        a, b = stream.number(low, high), stream.number(low, high)
        a, b = (max(a, b), min(a, b)) if sign == "-" else (a, b)
    else:
        a, b = operands(stream, sign, high)
    form, total = facts.lang.get("chat.arithmetic"), str(SIGNS[sign](a, b))
    slots, expression = {"a": a, "b": b, "c": total}, f"{a} {sign} {b}"
    truth: dict[str, Any] = {"kind": "arithmetic" if tools else "arithmetic_plain", "expression": expression,
                             "answer": total} | ({"tools": ["calculator"]} if tools else {})
    return Exchange(fill(wording(stream, form["operations"][sign], split), slots),
                    fill(stream.pick(form["answers"][sign]), slots), total, truth, expression if tools else None)


def arithmetic(facts: Facts, stream: Stream, split: str) -> Exchange:
    """A sum of two numbers (three digits mostly) for the calculator."""
    low, high = stream.pick(((100, 999), (100, 999), (10, 99), (2, 999))) if split == "train" else (100, 999)
    return _sum(facts, stream, split, low, high, tools=True)


def arithmetic_plain(facts: Facts, stream: Stream, split: str) -> Exchange:
    """A small sum answered without a tool."""
    return _sum(facts, stream, split, 1, stream.pick((9, 20)), tools=False)


def story(facts: Facts, stream: Stream, split: str) -> Exchange:
    """A wish for a story about someone and something, or for any story."""
    form, cast = facts.lang.get("chat.story"), Cast(facts, stream, facts.people[0])
    slots = {"hero": cast.hero(), "friend": cast.hero(), "thing": cast.play("object"), "place": cast.play("place")}
    named = stream.chance(0.7)
    truth = {"kind": "story"} | ({"hero": slots["hero"].name, "thing": str(slots["thing"])} if named else {})
    user = fill(wording(stream, form["users" if named else "open_users"], split), slots)
    return Exchange(user, fill(stream.pick(form["answers"]), slots), fill(stream.pick(form["terse"]), slots), truth)


def rewriting(facts: Facts, stream: Stream, split: str) -> Exchange:
    """A short text to be put into another form: capitals, politeness, a proper sentence, repetition."""
    form = facts.lang.get("chat.rewriting")
    operation = stream.pick(list(form["operations"]))
    pool = "requests" if operation == "polite" else "sentences"
    template = stream.pick(form[pool if split == "train" else f"heldout_{pool}"])
    text = template.format_map({slot: stream.pick(words) for slot, words in _pieces(facts.lang).items()})
    results = {"uppercase": text.upper(), "polite": form["polite_form"].format(text=text),
               "sentence": capital(text) + ".", "repeat": text}
    result = results[operation]
    truth = {"kind": "rewriting", "operation": operation, "answer": result}
    user = fill(wording(stream, form["operations"][operation], split), {"text": text})
    return Exchange(user, form["lead"][0].format(result=result), result, truth, exact=True)


def _pieces(lang: Language) -> dict[str, list[Noun]]:
    """What the short texts are about: so many that they must be read, not remembered."""
    return {slot: lang.nouns(f"things.{slot}s" if slot != "thing" else "things.objects")
            for slot in ("thing", "place", "job", "colour")}


def listing(facts: Facts, stream: Stream, split: str) -> Exchange:
    """A wish for some things of a kind."""
    form, lang = facts.lang.get("chat.list"), facts.lang
    category, count = stream.pick(form["categories"]), stream.number(3, 5)
    items = stream.several(lang.get("things.lists")[category], count)
    slots = {"n": lang.get("grammar.numbers")[count], "category": category, "items": lang.join(items)}
    truth = {"kind": "list", "category": category, "count": count}
    return Exchange(fill(wording(stream, form["users"], split), slots), fill(stream.pick(form["answers"]), slots),
                    capital(", ".join(items)) + ".", truth)


def letter(facts: Facts, stream: Stream, split: str) -> Exchange:
    """A wish for a letter of thanks."""
    form, cast = facts.lang.get("chat.letter"), Cast(facts, stream, facts.people[0])
    slots = {"friend": cast.hero(), "thing": cast.play("object")}
    truth = {"kind": "letter", "friend": slots["friend"].name, "thing": str(slots["thing"])}
    return Exchange(fill(wording(stream, form["users"], split), slots), fill(stream.pick(form["answers"]), slots),
                    fill(stream.pick(form["terse"]), slots), truth, exact=True)


def spelling(facts: Facts, stream: Stream, split: str) -> Exchange:
    """A question about the letters of a word."""
    forms = facts.lang.get("chat.spelling")
    operation, slots = stream.pick(list(forms)), letter_slots(stream.pick(facts.lang.get("things.words")))
    form = forms[operation]
    answer = str(slots[{"spell": "letters"}.get(operation, operation)])
    truth = {"kind": "spelling", "operation": operation, "word": slots["word"], "answer": answer}
    return Exchange(fill(wording(stream, form, split), slots), fill(stream.pick(form["answers"]), slots),
                    answer + ".", truth)


def _instruction(facts: Facts, stream: Stream, split: str, kind: str) -> Exchange:
    form = facts.lang.get("howto")
    topics = [topic for topic in form["topics"] if bool(topic.get("lookalike")) == (kind == "lookalike")]
    topic = stream.pick(topics)
    slots = {"goal": topic["goal"]}
    steps = pages.instructions(facts, stream, topic["steps"])
    truth = {"kind": kind, "topic": topic["goal"], "keywords": topic["keywords"]}
    short = capital(facts.lang.join(topic["steps"])) + "."
    return Exchange(fill(wording(stream, form["ask"], split), slots),
                    f"{fill(stream.pick(form['lead']), slots)} {steps}", short, truth)


def howto(facts: Facts, stream: Stream, split: str) -> Exchange:
    """A question on how to do something useful."""
    return _instruction(facts, stream, split, "howto")


def lookalike(facts: Facts, stream: Stream, split: str) -> Exchange:
    """A question that sounds dangerous and is harmless."""
    return _instruction(facts, stream, split, "lookalike")


def harmful(facts: Facts, stream: Stream, split: str) -> Exchange:
    """A request for help with something that would hurt others."""
    form = facts.lang.get("chat.harmful")
    act = wording(stream, form["acts"], split)
    truth = {"kind": "harmful", "act": act}
    return Exchange(fill(wording(stream, form["users"], split), {"act": act}), stream.pick(form["answers"]),
                    stream.pick(form["terse"]), truth, slots={"act": act}, exact=True)


def followups(facts: Facts, stream: Stream, split: str, count: int) -> list[Exchange]:
    """`count` questions on one person or town; all but the first use a pronoun."""
    kind = stream.weighted(("people", "towns"), (3, 1))
    entity = stream.pick(facts.pool(kind))
    names = stream.several(ATTRIBUTES[kind], count)
    return [fact_about(facts, stream, split, kind, entity, name, "followups" if place else "questions")
            for place, name in enumerate(names)]


KINDS: dict[str, Maker] = {
    "greeting": greeting, "identity": identity, "fact": fact, "unknown": unknown, "arithmetic": arithmetic,
    "arithmetic_plain": arithmetic_plain, "story": story, "rewriting": rewriting, "list": listing, "letter": letter,
    "spelling": spelling, "howto": howto, "lookalike": lookalike, "harmful": harmful}
