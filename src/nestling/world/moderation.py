"""Texts for a moderation model: harmful ones with their categories, look-alikes of each kind, and ordinary ones.

The wordings are in `moderation.yaml`. `meta["group"]` is the phrase that a text was made of: texts of one group are the
same idea said again, so whoever divides the rows keeps a group together and counts groups when it says how sure it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from nestling.core.errors import UserError
from nestling.core.types import Labelled
from nestling.world import dialogues, turns
from nestling.world.facts import Facts
from nestling.world.language import Language, fill, wording
from nestling.world.streams import Stream

ORDINARY = 0.2  # share of texts that have nothing to do with any category
REPLIES, REFUSALS = 0.2, 0.1  # of what is asked for: shares that an assistant explains, and that it declines
SURROUNDED = 0.3  # share of texts that stand among ordinary ones: harm is to be found in a long talk, too
OTHERS = 20  # ordinary texts around one, at most
TOLD = 0.25  # share of them that tell a fact of the world; the others are said in talks
LONGEST = 760  # characters of it with them, as many as a window of 254 tokens holds
CUT = 0.3  # share of surroundings that begin and end anywhere, as windows and parts of a reply do
HURRIED, PLAIN = 0.3, 0.15  # shares with short forms ("I'll"), and without capitals and a full stop
CLOSINGS = ("thanks", "goodbye")  # said in talks of several turns only
_SLOT = re.compile(r"\{(\w+)[^}]*\}")


def labelled(facts: Facts, seed: int, count: int, split: str) -> Iterator[Labelled]:
    """`count` texts; number i is a pure function of seed, split and i. "train" and the others share no wording.

    Raises:
        UserError: the world's language has no such wordings.
    """
    if "moderation" not in facts.lang.data:
        raise UserError("the world has no texts for moderation in this language", value=facts.lang.name)
    for place in range(count):
        stream = Stream(seed, "moderation", split, place)
        if stream.chance(ORDINARY):
            text = _ordinary(facts, stream, split)
            said = _typed(facts, stream, _surrounded(facts, stream, split, text))
            yield Labelled(text=said, labels=(), meta={"kind": "ordinary", "group": text})
        else:
            yield _flagged_or_alike(facts, stream, split)


def _flagged_or_alike(facts: Facts, stream: Stream, split: str) -> Labelled:
    """A text of one of the kinds of moderation.yaml; declining to help with harm does no harm."""
    data = facts.lang.data["moderation"]
    kind = stream.pick(list(data["kinds"]))
    made = data["kinds"][kind]
    form, labels = made["form"], tuple(made.get("labels", ()))
    if form == "ask":
        form = stream.weighted((form, "reply", "refuse"), (1 - REPLIES - REFUSALS, REPLIES, REFUSALS if labels else 0))
        labels = () if form == "refuse" else labels
    phrase, slots = _phrase(facts, stream, kind, split)
    text = fill(wording(stream, data["forms"][form], split), slots)
    group = phrase if form != "refuse" else f"refuse {phrase}"
    text = _typed(facts, stream, _surrounded(facts, stream, split, text))
    return Labelled(text=text, labels=labels, meta={"kind": kind, "group": group})


def _phrase(facts: Facts, stream: Stream, kind: str, split: str) -> tuple[str, Slots]:
    """A phrase of this kind, and the slots of its text with the filled phrase as x; in training none that is held out."""
    made = facts.lang.data["moderation"]["kinds"][kind]
    while True:
        phrase, slots = wording(stream, made, split), Slots(facts, stream, split)
        slots["x"] = phrase.format_map(slots)
        if split != "train" or not held_out(facts.lang, kind).fullmatch(slots["x"]):
            return phrase, slots


class Slots(dict[str, Any]):
    """What a wording's slots stand for: one and the same people, town and group, but other words each time."""

    def __init__(self, facts: Facts, stream: Stream, split: str) -> None:
        data = facts.lang.data["moderation"]
        first, second = stream.several(facts.people, 2)
        town = stream.pick(facts.towns)
        super().__init__(p=first, q=second, t=town, o=stream.pick(facts.objects), a=stream.pick(facts.animals))
        self["g"] = wording(stream, data["groups"], split).format_map({"t": town})
        self._stream, self._lang = stream, facts.lang
        self._lists: Mapping[str, Sequence[str]] = {**data["words"], **data["parts"]}

    def __missing__(self, name: str) -> str:
        """One of the words of this name; a noun where it holds no slots of its own, so that {word.a} has an article."""
        chosen = self._stream.pick(self._lists[name])
        return chosen.format_map(self) if "{" in chosen else self._lang.noun(chosen) if chosen else chosen


@lru_cache(maxsize=64)
def held_out(lang: Language, kind: str) -> re.Pattern[str]:
    """What matches every text that a held-out phrase of this kind can become."""
    data = lang.data["moderation"]

    def choices(slot: re.Match[str]) -> str:
        words = data["words"].get(slot[1])
        return "(?:" + "|".join(map(re.escape, words)) + ")" if words else ".+?"

    phrases = [re.sub(r"\\{(\w+)[^}]*\\}", choices, re.escape(phrase)) for phrase in data["kinds"][kind]["heldout"]]
    return re.compile("|".join(phrases), re.IGNORECASE)


def _surrounded(facts: Facts, stream: Stream, split: str, text: str) -> str:
    """The text, sometimes with ordinary ones before and after it: often few, as many as there is room for now and then."""
    if not stream.chance(SURROUNDED):
        return text
    others: list[str] = []
    count, room = int(OTHERS ** stream.random()), LONGEST - len(text)
    while len(others) < count:
        told = stream.chance(TOLD)
        others.append(turns.fact(facts, stream, split).answer if told else _ordinary(facts, stream, split))
        room -= len(others[-1]) + 1
        if room < 0:
            others.pop()
            break
    place, joint = stream.number(0, len(others)), stream.pick((" ", " ", " ", "\n"))
    before, after = joint.join(others[:place]), joint.join(others[place:])
    if stream.chance(CUT):
        before, after = before[stream.number(0, len(before)) :], after[: stream.number(0, len(after))]
    return joint.join(part.strip() for part in (before, text, after) if part.strip())


def _typed(facts: Facts, stream: Stream, text: str) -> str:
    """The text as somebody types it who does not care: "I'll come" for "I will come.", now and then."""
    if stream.chance(HURRIED):
        short = facts.lang.data["moderation"]["short_forms"]
        text = re.sub(r"\b(?:" + "|".join(short) + r")\b", lambda found: short[found[0]], text)
    return text.lower().removesuffix(".") if stream.chance(PLAIN) else text


def _ordinary(facts: Facts, stream: Stream, split: str) -> str:
    """What is said in a talk by anyone, in any style and any kind but requests for harm, of which the refusals stay."""
    kind = stream.pick([*(kind for kind in dialogues.SHARES if kind != "multi"), *CLOSINGS])
    if kind in CLOSINGS:
        said = dialogues.spoken(facts, stream, turns.greeting(facts, stream, split, kind))
    else:
        said = list(dialogues.dialogue(facts, stream, split, kind).messages)
    return stream.pick([m.content for m in said if m.content and (kind != "harmful" or m.role == "assistant")])
