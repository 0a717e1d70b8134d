"""Documents that state facts: biographies, town pages, letters, diaries, quizzes, talks; and lists and instructions.

The facts of a person come in ever new wordings and surroundings, so that a model learns them rather than the page.
"""

from __future__ import annotations

import copy
from typing import Any

from nestling.world.facts import ATTRIBUTES, Citizen, Facts, stranger
from nestling.world.language import capital, fill
from nestling.world.stories import Cast
from nestling.world.streams import Stream

SLOT = {"people": "p", "towns": "t", "animals": "a"}
_HELD_OUT_SHARE = 0.15


def phrase(stream: Stream, choices: dict[str, list[str]], split: str) -> str:
    """A wording for a document: training wordings, in other splits now and then a held-out one."""
    held_out = split != "train" and stream.chance(_HELD_OUT_SHARE)
    return stream.pick(choices["heldout" if held_out else "train"])


def statement(facts: Facts, stream: Stream, kind: str, attribute: str, entity: Any, split: str) -> str:
    """One sentence that tells this attribute of a person, town or animal."""
    form = phrase(stream, facts.lang.get("facts")[kind][attribute]["statements"], split)
    return fill(form, {SLOT[kind]: entity})


def _referring(facts: Facts, stream: Stream, attribute: str, person: Citizen, split: str) -> str:
    """A later sentence about a person: by full name, first name or pronoun."""
    form = phrase(stream, facts.lang.get("facts.people")[attribute]["statements"], split)
    way = stream.random()
    if way < 0.4:
        return fill(form, {"p": person})
    if way < 0.7 and form.startswith("{p.name} "):
        return fill("{p.He}" + form.removeprefix("{p.name}"), {"p": person})
    familiar = copy.copy(person)
    familiar.name = person.first
    return fill(form, {"p": familiar})


def biography(facts: Facts, stream: Stream, person: Citizen, split: str) -> str:
    """All facts of a person in running text, as a card, or beside those of another person."""
    pages = facts.lang.get("pages")
    attributes = _turned(stream, ATTRIBUTES["people"])
    first = statement(facts, stream, "people", attributes[0], person, split)
    rest = [_referring(facts, stream, attribute, person, split) for attribute in attributes[1:]]
    title = fill(stream.pick(pages["biography"]["titles"]), {"p": person})
    text = f"{title}\n\n{' '.join([first, *rest])}"
    if stream.chance(0.3):
        text += " " + fill(stream.pick(pages["biography"]["closings"]), {"p": person})
    if person.sibling and stream.chance(0.4):
        text += "\n\n" + _siblings(facts, stream, person)
    if stream.chance(0.3):
        text += "\n\n" + card(facts, stream, person, split)
    return text


def _turned(stream: Stream, items: tuple[str, ...]) -> list[str]:
    start = stream.number(0, len(items) - 1)
    turned = [*items[start:], *items[:start]]
    return turned if stream.chance(0.5) else turned[::-1]


def _siblings(facts: Facts, stream: Stream, person: Citizen) -> str:
    other = person.sibling
    assert other is not None, "called for a person with a sibling"
    words = facts.lang.get("grammar.kin")
    kin = words["mixed"] if person.gender != other.gender else words[person.gender]
    slots = {"p": person, "q": other, "kin": kin, "a_sibling": facts.lang.noun(other.words["brother"]).a}
    return fill(stream.pick(facts.lang.get("pages.siblings")), slots)


def card(facts: Facts, stream: Stream, person: Citizen, split: str) -> str:
    """The facts of a person line by line."""
    record = facts.lang.get("pages.record")
    lines = [fill(line, {"p": person}) for line in record["lines"]]
    return "\n".join([fill(stream.pick(record["titles"]), {"p": person}), *lines])


def comparison(facts: Facts, stream: Stream, person: Citizen, split: str) -> str:
    """Two people side by side, then one more time each."""
    other = _someone_else(facts, stream, person)
    slots = {"p": person, "q": other, "t": stream.pick(facts.towns)}
    text = fill(stream.pick(facts.lang.get("pages.comparison")), slots)
    chosen = stream.several(ATTRIBUTES["people"], 2)
    more = [statement(facts, stream, "people", chosen[place], who, split) for place, who in enumerate((person, other))]
    return f"{person.name}, {other.name}\n\n{text}\n\n{' '.join(more)}"


def _someone_else(facts: Facts, stream: Stream, person: Citizen) -> Citizen:
    other = stream.pick(facts.people)
    while other.first == person.first:
        other = stream.pick(facts.people)
    return other


def town_page(facts: Facts, stream: Stream, person: Citizen, split: str) -> str:
    """The town where the person lives: its facts and some of its people with theirs."""
    pages, town = facts.lang.get("pages.town"), person.town
    told = [statement(facts, stream, "towns", name, town, split) for name in _turned(stream, ATTRIBUTES["towns"])]
    others = [who for who in facts.people if who.town is town and who is not person]
    group = [person, *stream.several(others, 2)]
    names = facts.lang.join([who.name for who in group])
    form = stream.pick(pages["people"]) if len(group) > 1 else pages["people"][-1]
    people = [fill(form, {"names": names})]
    people += [statement(facts, stream, "people", stream.pick(ATTRIBUTES["people"][1:]), who, split) for who in group]
    text = f"{fill(stream.pick(pages['titles']), {'t': town})}\n\n{' '.join(told)}\n\n{' '.join(people)}"
    return text + "\n\n" + fill(stream.pick(pages["closings"]), {"t": town}) if stream.chance(0.3) else text


def letter(facts: Facts, stream: Stream, person: Citizen, split: str) -> str:
    """A letter from a person to someone else in the world."""
    form = facts.lang.get("pages.letter")
    slots = {"p": person, "q": _correspondent(facts, stream, person), "thing": stream.pick(facts.objects)}
    parts = [fill(stream.pick(form[part]), slots) for part in ("greetings", "openings", "bodies", "questions")]
    ending = fill(stream.pick(form["endings"]), slots)
    return f"{parts[0]}\n\n{parts[1]} {parts[2]}\n\n{parts[3]}\n\n{ending}"


def _correspondent(facts: Facts, stream: Stream, person: Citizen) -> Citizen:
    other = _someone_else(facts, stream, person)
    while other is person.friend:
        other = _someone_else(facts, stream, person)
    return other


def diary(facts: Facts, stream: Stream, person: Citizen, split: str) -> str:
    """Two days with a person."""
    days = facts.lang.get("grammar.days")
    place = stream.number(0, 6)
    slots = {"p": person, "day": days[place], "next_day": days[(place + 1) % 7], "thing": stream.pick(facts.objects),
             "colour": facts.lang.noun(stream.pick(facts.lang.get("things.colours")))}
    return fill(stream.pick(facts.lang.get("pages.diary")), slots)


def question_and_answer(facts: Facts, stream: Stream, kind: str, entity: Any, split: str) -> tuple[str, str]:
    """A question on a random attribute and its answer, both whole sentences."""
    attribute = stream.pick(ATTRIBUTES[kind])
    forms = facts.lang.get("facts")[kind][attribute]
    slots = {SLOT[kind]: entity}
    return fill(phrase(stream, forms["questions"], split), slots), fill(stream.pick(forms["answers"]), slots)


def quiz(facts: Facts, stream: Stream, person: Citizen, split: str) -> str:
    """Questions and answers about the person, others, towns, and people whom nobody knows."""
    pages = facts.lang.get("pages.quiz")
    form, lines = stream.pick(pages["forms"]), [stream.pick(pages["titles"])]
    for place in range(stream.number(6, 9)):
        if stream.chance(0.35):
            nobody = stranger(stream, facts, "train")
            forms = facts.lang.get("facts.people")[stream.pick(ATTRIBUTES["people"])]
            question = fill(phrase(stream, forms["questions"], split), {"p": nobody})
            answer = fill(stream.pick(pages["unknown"]), {"u": nobody})
        elif stream.chance(0.25):
            kind = stream.pick(("towns", "animals"))
            question, answer = question_and_answer(facts, stream, kind, stream.pick(facts.pool(kind)), split)
        else:
            who = person if place % 3 == 0 else stream.pick(facts.people)
            question, answer = question_and_answer(facts, stream, "people", who, split)
        lines.append(form.format(question=question, answer=answer))
    return "\n\n".join(lines)


def register(facts: Facts, stream: Stream, person: Citizen, split: str) -> str:
    """Names looked up one after another: who the person is, or that there is nobody of this name."""
    pages = facts.lang.get("pages.register")
    form, lines = stream.pick(pages["forms"]), [stream.pick(pages["titles"])]
    for place in range(stream.number(8, 14)):
        if stream.chance(0.5):
            nobody = stranger(stream, facts, "train")
            lines.append(form.format(name=nobody.name, entry=fill(stream.pick(pages["nobody"]), {"u": nobody})))
        else:
            who = person if place == 0 else stream.pick(facts.people)
            lines.append(form.format(name=who.name, entry=fill(stream.pick(pages["entries"]), {"p": who})))
    return "\n".join(lines)


def talk(facts: Facts, stream: Stream, person: Citizen, split: str) -> str:
    """Two friends talk about a person: one asks, the other knows; of a stranger neither knows anything."""
    pages, cast = facts.lang.get("pages.talk"), Cast(facts, stream, person)
    slots: dict[str, Any] = {"hero": cast.hero(), "friend": cast.hero(), "place": cast.play("place")}
    lines = [fill(stream.pick(pages["scenes"]), slots)]
    for attribute in stream.several(ATTRIBUTES["people"], stream.number(3, 4)):
        forms = facts.lang.get("facts.people")[attribute]
        question = fill(phrase(stream, forms["questions"], split), {"p": person})
        answer = fill(stream.pick(forms["answers"]), {"p": person})
        lines.append(stream.pick(pages["asks"]).format(question=question, who=slots["hero"]) + " "
                     + stream.pick(pages["replies"]).format(answer=answer, said=spoken(answer), who=slots["friend"]))
    if stream.chance(0.6):
        lines.append(fill(stream.pick(pages["nobody"]), slots | {"u": stranger(stream, facts, "train")}))
    lines.append(fill(stream.pick(pages["thanks"]), slots | {"topic": person.first}))
    return "\n".join(lines)


def spoken(sentence: str) -> str:
    """A sentence as it stands inside quotation marks before "said": its full stop becomes a comma."""
    return sentence[:-1] + "," if sentence.endswith(".") else sentence


def animal_page(facts: Facts, stream: Stream, person: Citizen, split: str) -> str:
    """What everybody knows about some animals."""
    parts = []
    for animal in stream.several(facts.animals, 3):
        told = [statement(facts, stream, "animals", name, animal, split) for name in ATTRIBUTES["animals"]]
        parts.append(fill(stream.pick(facts.lang.get("pages.animals.titles")), {"a": animal}) + "\n" + " ".join(told))
    return "\n\n".join(parts)


def shopping(facts: Facts, stream: Stream, person: Citizen, split: str) -> str:
    """A shopping list, read out in order and unpacked in reverse."""
    pages, lang = facts.lang.get("pages.shopping"), facts.lang
    goods = [thing.a for thing in stream.several(facts.objects, 3)] + stream.several(lang.get("things.foods"), 3)
    goods = stream.shuffled(goods)
    slots: dict[str, Any] = {
        "hero": Cast(facts, stream, person).hero(), "items": lang.join(goods), "first": goods[0], "last": goods[-1],
        "reversed": lang.join(goods[::-1])}
    title = fill(stream.pick(pages["titles"]), slots)
    told = [fill(stream.pick(pages[part]), slots) for part in ("recap", "reverse", "first_last")]
    return f"{title}\n\n" + "\n".join(f"- {thing}" for thing in goods) + "\n\n" + " ".join(told)


def instructions(facts: Facts, stream: Stream, steps: list[str]) -> str:
    """The steps of a how-to in order, as sentences."""
    order = facts.lang.get("howto.order")
    words = [stream.pick(order["first"]), *[stream.pick(order["then"]) for _ in steps[2:]], stream.pick(order["last"])]
    return " ".join(f"{word}, {step}." for word, step in zip(words, steps, strict=True))


def howto(facts: Facts, stream: Stream, person: Citizen, split: str) -> str:
    """Somebody learns how to do something and says the steps again."""
    pages, lang, cast = facts.lang.get("pages.howto"), facts.lang, Cast(facts, stream, person)
    topic = stream.pick(lang.get("howto.topics"))
    slots: dict[str, Any] = {"goal": topic["goal"], "name": cast.hero(), "friend": cast.hero(),
                             "plan": lang.join(topic["steps"])}
    steps = instructions(facts, stream, topic["steps"])
    lead = fill(stream.pick(lang.get("howto.lead")), slots)
    recap = fill(stream.pick(pages["recap"]), slots)
    return (f"{fill(stream.pick(pages['titles']), slots)}\n\n{fill(stream.pick(pages['need']), slots)} "
            f"{lead} {steps}\n\n{capital(recap)}")
