"""The causal story engine: a plot from stories.yaml, a cast drawn for it, and one text per beat.

What happens follows from what was said before (the tool packed at the start opens the gate later, the last scene
retells the first), so a reader who remembers the story can predict most of it.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from nestling.world.facts import Citizen, Facts
from nestling.world.language import fill
from nestling.world.streams import Stream


class Cast:
    """Draws the players of a story; nobody and nothing plays two parts.

    The pronouns of heroes alternate, so that "he" and "she" always say who is meant.
    """

    def __init__(self, facts: Facts, stream: Stream, known: Citizen) -> None:
        self.facts, self.stream, self.known = facts, stream, known
        self.used: set[str] = set()
        self.gender = stream.pick(("she", "he"))

    def hero(self) -> Any:
        """A story person, of the other gender than the hero before."""
        self.gender = "he" if self.gender == "she" else "she"
        name = self._new(self.facts.lang.get(f"names.story.{self.gender}"))
        return self.facts.lang.person(name, self.gender)

    def play(self, kind: str) -> Any:
        """A player of this kind: "hero", "known", "obstacle", "number", "small", "traits", or a pool in `_POOLS`."""
        stream, lang = self.stream, self.facts.lang
        if kind == "hero":
            return self.hero()
        if kind == "known":
            return self.known
        if kind in ("number", "small"):
            return stream.number(20, 80) if kind == "number" else stream.number(2, 9)
        if kind == "traits":
            return stream.pick(lang.get("things.traits"))
        if kind == "obstacle":
            row = self._new_obstacle()
            return SimpleNamespace(**{**row, "tool": lang.noun(row["tool"])})
        return lang.noun(self._new(lang.get(_POOLS[kind])))

    def _new(self, pool: list[str]) -> str:
        name = self.stream.pick(pool)
        while name in self.used:
            name = self.stream.pick(pool)
        self.used.add(name)
        return name

    def _new_obstacle(self) -> dict[str, str]:
        rows = [row for row in self.facts.lang.get("stories.obstacles") if row["tool"] not in self.used]
        row: dict[str, str] = self.stream.pick(rows)
        self.used.add(row["tool"])
        return row


_POOLS = {"object": "things.objects", "place": "things.places", "colour": "things.colours", "pet": "things.pets",
          "petname": "names.pets", "job": "things.jobs", "vegetable": "things.vegetables", "fruit": "things.fruits",
          "garden": "things.gardens", "breakable": "things.breakables",
          "animal": "things.story_animals", "relative": "things.relatives", "day": "grammar.days"}


def cast_for(cast: Cast, wanted: dict[str, str], sums: dict[str, list[str]]) -> dict[str, Any]:
    """The slots of a plot: its players by name, then the numbers that follow from others."""
    slots = {slot: cast.play(kind) for slot, kind in wanted.items()}
    for slot, (left, sign, right) in sums.items():
        slots[slot] = slots[left] + slots[right] if sign == "+" else slots[left] - slots[right]
    return slots


def story(facts: Facts, stream: Stream, known: Citizen, split: str) -> str:
    """One story, with a title; some plots are about `known`, with everything in them true."""
    plot = stream.pick(list(facts.lang.get("stories.plots").values()))
    slots = cast_for(Cast(facts, stream, known), plot["cast"], plot.get("sums", {}))
    beats = [fill(stream.pick(beat), slots) for beat in plot["beats"]]
    middle = (len(beats) + 1) // 2
    return f"{fill(stream.pick(plot['titles']), slots)}\n\n{' '.join(beats[:middle])}\n\n{' '.join(beats[middle:])}"
