"""Small exact texts with one right continuation: sums, spelling, memory games, an invented language, Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nestling.world.facts import Citizen, Facts
from nestling.world.language import capital, fill
from nestling.world.programs import PROGRAMS, arguments, source
from nestling.world.stories import Cast
from nestling.world.streams import Stream

SIGNS: dict[str, Callable[[int, int], int]] = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def operands(stream: Stream, sign: str, largest: int) -> tuple[int, int]:
    """Two numbers up to `largest` for this sign; differences are not negative, products stay small."""
    if sign == "*":
        return stream.number(2, min(largest, 12)), stream.number(2, min(largest, 12))
    first, second = stream.number(1, largest), stream.number(1, largest)
    return (first, second) if sign == "+" else (max(first, second), min(first, second))


def sums(facts: Facts, stream: Stream, known: Citizen, split: str) -> str:
    """A page of sums, each written in figures and then in words: the second line follows from the first."""
    lang = facts.lang
    lines = [stream.pick(lang.get("exercises.arithmetic_titles")), ""]
    for _ in range(stream.number(5, 8)):
        sign, largest = stream.pick("++--*"), stream.pick((9, 20, 99, 999))
        a, b = operands(stream, sign, largest)
        slots: dict[str, Any] = {"a": a, "b": b, "c": SIGNS[sign](a, b), "big": max(a, b), "small": min(a, b)}
        forms = stream.several(lang.get("exercises.operations")[sign]["statements"], 2)
        lines += [fill(form, slots) for form in forms]
        if a != b and stream.chance(0.4):
            lines.append(fill(stream.pick(lang.get("exercises.bigger")), slots))
    lines.append(_counting(facts, stream))
    return "\n".join(lines)


def _counting(facts: Facts, stream: Stream) -> str:
    lang, step, start = facts.lang, stream.pick((1, 1, 2, 3, 5, 10)), stream.number(0, 60)
    numbers = [start + step * place for place in range(stream.number(6, 10))]
    slots = {"name": Cast(facts, stream, facts.people[0]).hero(), "a": numbers[0], "b": numbers[-1], "k": step}
    back = step == 1 and stream.chance(0.4)
    form = lang.get("exercises.backwards")[0] if back else lang.get("exercises.counting")[
        2 if step > 1 else stream.number(0, 1)]
    return fill(form, slots | {"numbers": ", ".join(map(str, numbers[::-1] if back else numbers))})


def letter_slots(word: str) -> dict[str, Any]:
    """What there is to say about the letters of a word: {"letters": "c-a-t", "count": 3, "first": "c", ...}."""
    return {"word": word, "letters": "-".join(word), "count": len(word), "first": word[0], "last": word[-1],
            "backwards": word[::-1], "capitals": word.upper()}


def spelling(facts: Facts, stream: Stream, known: Citizen, split: str) -> str:
    """Some words and their letters."""
    lang = facts.lang
    lines = [stream.pick(lang.get("exercises.spelling.titles")), ""]
    for word in stream.several(lang.get("things.words"), stream.number(4, 6)):
        forms = stream.several(lang.get("exercises.spelling.statements"), stream.number(2, 3))
        lines.append(" ".join(fill(form, letter_slots(word)) for form in forms))
    return "\n".join(lines)


def memory(facts: Facts, stream: Stream, known: Citizen, split: str) -> str:
    """Scenes in which something has to be remembered and said again, forwards and backwards."""
    return "\n\n".join(_scene(facts, stream, form) for form in stream.shuffled(facts.lang.get("exercises.memory"))[:3])


def _scene(facts: Facts, stream: Stream, form: str) -> str:
    lang, cast = facts.lang, Cast(facts, stream, facts.people[0])
    things = [lang.noun(thing) for thing in stream.several(lang.get("things.objects"), stream.number(3, 5))]
    words = stream.several(lang.get("things.words"), stream.number(4, 6))
    numbers = stream.several(range(10, 100), 3)
    slots: dict[str, Any] = {
        "hero": cast.hero(), "friend": cast.hero(), "third": cast.hero(), "x1": things[0], "x2": things[1],
        "x3": things[2], "n1": numbers[0], "n2": numbers[1], "n3": numbers[2],
        "items": lang.join([thing.a for thing in things]), "words": ", ".join(words),
        "reversed": lang.noun(lang.join([thing.a for thing in things[::-1]])), "words_cap": capital(", ".join(words)),
        "words_back": capital(", ".join(words[::-1])), "w_first": words[0], "w_last": words[-1]}
    return fill(form, slots)


def dictionary(facts: Facts) -> dict[str, str]:
    """The invented language: one word for each English one, the same everywhere in a world of this seed."""
    lang, stream = facts.lang, Stream(facts.seed, "world", "dictionary")
    plan = lang.get("exercises.language")
    words = [*plan["nouns"], *plan["verbs"], *plan["adjectives"]]
    made: list[str] = []
    while len(made) < len(words):
        word = "".join(stream.pick("bdgklmnprstvz") + stream.pick("aeiou") for _ in range(stream.number(2, 3)))
        if word not in made:
            made.append(word)
    return dict(zip(words, made, strict=True))


def lesson(facts: Facts, stream: Stream, known: Citizen, split: str) -> str:
    """A lesson: some words of the invented language, then sentences made of just these words."""
    plan = facts.lang.get("exercises.language")
    if not facts.dictionary:
        facts.dictionary = dictionary(facts)
    nouns, verbs = stream.several(plan["nouns"], 3), stream.several(list(plan["verbs"]), 2)
    adjectives = stream.several(plan["adjectives"], 1)
    lines = [stream.pick(plan["titles"]), "", stream.pick(plan["intro"])]
    for word in [*nouns, *verbs, *adjectives]:
        english = word if word in nouns or word in adjectives else plan["verbs"][word]
        lines.append(fill(stream.pick(plan["word"]), {"en": english, "velu": facts.dictionary[word]}))
    for place in range(stream.number(4, 6)):
        lines.append(_sentence(facts, stream, nouns, verbs, adjectives[0] if place % 2 else ""))
    return "\n".join(lines)


def _sentence(facts: Facts, stream: Stream, nouns: list[str], verbs: list[str], adjective: str) -> str:
    plan = facts.lang.get("exercises.language")
    subject, other = stream.several(nouns, 2)
    verb = stream.pick(verbs)
    slots = {"subject": subject, "object": other, "verb": verb, "adjective": adjective}
    english = plan["form" if adjective else "plain"].format_map(slots)
    words = [adjective, subject, other, verb] if adjective else [subject, other, verb]
    velu = " ".join(facts.dictionary[word] for word in words)
    return fill(stream.pick(plan["sentence"]), {"en": english, "velu": velu})


def code(facts: Facts, stream: Stream, known: Citizen, split: str) -> str:
    """A Python function, some calls and their true results, in Python's notation and in words."""
    lang, program = facts.lang, stream.pick(PROGRAMS)
    lines = [stream.pick(lang.get("exercises.code.titles")), "", source(program), "",
             stream.pick(lang.get("exercises.code.calls"))]
    for _ in range(stream.number(3, 5)):
        values = arguments(program, stream, lang.get("things.words"))
        call = f"{program.__name__}({', '.join(map(repr, values))})"
        result = repr(program(*values))
        lines += [f">>> {call}", result]
    lines += ["", stream.pick(lang.get("exercises.code.words")).format(call=call, result=result)]
    return "\n".join(lines)

