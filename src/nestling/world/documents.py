"""The mixture of documents: document number i of a seed and split is a pure function of i.

A fixed wheel of kinds turns, and every kind takes the people of the world in turn (a new order each lap), so that no
fact is rare however many documents are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

from nestling.core.types import Document
from nestling.world import exercises, pages
from nestling.world.facts import Citizen, Facts
from nestling.world.stories import story
from nestling.world.streams import Stream, bucket

Maker = Callable[[Facts, Stream, Citizen, str], str]
# kind → (maker, turns per lap of the wheel). Facts take about half of the text; the rest teaches form and reasoning.
KINDS: dict[str, tuple[Maker, int]] = {
    "biography": (pages.biography, 10), "story": (story, 8), "quiz": (pages.quiz, 16), "register": (pages.register, 6),
    "talk": (pages.talk, 5),
    "letter": (pages.letter, 2), "diary": (pages.diary, 2), "town": (pages.town_page, 4),
    "comparison": (pages.comparison, 2), "animals": (pages.animal_page, 1), "howto": (pages.howto, 3),
    "shopping": (pages.shopping, 2), "sums": (exercises.sums, 3), "spelling": (exercises.spelling, 2),
    "memory": (exercises.memory, 2), "lesson": (exercises.lesson, 1), "code": (exercises.code, 1)}


VAL_SHARE = 8  # one of so many texts belongs to validation


@lru_cache(maxsize=1)
def wheel() -> tuple[str, ...]:
    """The order of the kinds in one lap, each spread evenly over it."""
    spread = [((turn + 0.5) / turns, place, kind)
              for place, (kind, (_, turns)) in enumerate(KINDS.items()) for turn in range(turns)]
    return tuple(kind for _, _, kind in sorted(spread))


def documents(facts: Facts, seed: int, split: str, count: int | None = None) -> Iterator[Document]:
    """Documents 0, 1, 2, … of this seed and split; endless when `count` is None."""
    kinds, place = wheel(), 0
    visits = dict.fromkeys(KINDS, 0)
    orders: dict[str, list[Citizen]] = {kind: [] for kind in KINDS}
    while count is None or place < count:
        kind = kinds[place % len(kinds)]
        turn = visits[kind]
        visits[kind] = turn + 1
        if turn % len(facts.people) == 0:
            lap = Stream(seed, "order", split, kind, turn // len(facts.people))
            orders[kind] = lap.shuffled(facts.people)
        person = orders[kind][turn % len(facts.people)]
        text = _text(facts, Stream(seed, "document", split, place), person, split, KINDS[kind][0])
        yield Document(id=f"{split}-{place:07d}", text=text, source="world", meta={"kind": kind})
        place += 1


def _text(facts: Facts, stream: Stream, person: Citizen, split: str, maker: Maker) -> str:
    """A text of this split. Every possible text belongs to one split for good: train and val never share one."""
    while True:
        text = maker(facts, stream, person, split)
        if (bucket(text, VAL_SHARE) == 0) == (split != "train"):
            return text
