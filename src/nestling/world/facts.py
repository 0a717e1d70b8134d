"""What is true in the world: people, towns and animals with their attributes, and who does not exist.

Everything is drawn once from the seed. `Facts.values` knows which phrases of the language name a value of which
attribute, so that any text can be checked against the truth.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from nestling.core.errors import UserError
from nestling.world.language import Language, Noun, Person, language
from nestling.world.streams import Stream, T, bucket

SIZES = {"tiny": (12, 5), "small": (100, 20), "medium": (1000, 60)}


class Town(Noun):
    """A town: its name, and one value for each attribute of facts.yaml's `towns`."""

    country: str
    river: str
    famous: str
    building: Noun
    festival: str


class Animal(Noun):
    """A kind of animal and what everybody knows about it."""

    sound: str
    eats: str
    home: Noun


class Citizen(Person):
    """A person of the world with one value for each attribute of facts.yaml's `people`."""

    town: Town
    job: Noun
    food: Noun
    pet: Noun
    pet_name: str
    hobby: str
    month: str
    friend: Citizen
    sibling: Citizen | None = None


@dataclass
class Facts:
    """The whole truth of one world, and the language it is told in."""

    seed: int
    size: str
    lang: Language
    people: list[Citizen]
    towns: list[Town]
    animals: list[Animal]
    objects: list[Noun]
    events: list[str]
    by_name: dict[str, Citizen] = field(default_factory=dict)
    values: dict[str, set[str]] = field(default_factory=dict)
    dictionary: dict[str, str] = field(default_factory=dict)
    pattern: re.Pattern[str] = field(default_factory=lambda: re.compile(""))

    def index(self) -> None:
        """Fill the look-ups from the entities."""
        self.by_name = {person.name: person for person in self.people}
        for kind in ATTRIBUTES:
            for attribute in (*ATTRIBUTES[kind], *(("pet_name",) if kind == "people" else ())):
                for entity in self.pool(kind):
                    self.values.setdefault(str(getattr(entity, attribute)), set()).add(f"{kind}.{attribute}")
        words = sorted(self.values, key=lambda word: (-len(word), word))
        self.pattern = re.compile(r"\b(" + "|".join(map(re.escape, words)) + r")\b")

    def mentioned(self, text: str) -> dict[str, set[str]]:
        """The values (of anyone) that a text names, by attribute: {"people.job": {"baker"}}.

        Names must be spelled with their capitals (so that "may" is no month); other values may start a sentence.
        """
        found: dict[str, set[str]] = {}
        names = {word for word in self.pattern.findall(text) if word[0].isupper()}
        for word in names.union(self.pattern.findall(text.lower())):
            for attribute in self.values[word]:
                found.setdefault(attribute, set()).add(word)
        return found

    def entity(self, kind: str, name: str) -> Any:
        """The person, town or animal of this name."""
        return next(entity for entity in self.pool(kind) if str(entity) == name)

    def pool(self, kind: str) -> Sequence[Any]:
        """All people, towns or animals."""
        if kind == "people":
            return self.people
        return self.towns if kind == "towns" else self.animals

    def truths(self, kind: str, name: str) -> set[str]:
        """Every value that may be said about an entity: its own, its town's, its friend's and sibling's names."""
        entity = self.entity(kind, name)
        known = {name, *(str(getattr(entity, attribute)) for attribute in ATTRIBUTES[kind])}
        if kind == "people":
            known |= {str(getattr(entity.town, attribute)) for attribute in ATTRIBUTES["towns"]}
            known |= {entity.pet_name, entity.friend.name}
            known |= {entity.sibling.name} if entity.sibling else set()
        return known


ATTRIBUTES = {
    "people": ("town", "job", "food", "pet", "hobby", "month", "friend"),
    "towns": ("country", "river", "famous", "building", "festival"),
    "animals": ("sound", "eats", "home"),
}


@lru_cache(maxsize=8)
def make_facts(seed: int, size: str, language_name: str) -> Facts:
    """Draw the world of this seed and size; made once, to be read only.

    Raises:
        UserError: an unknown size.
    """
    if size not in SIZES:
        raise UserError("unknown size of the world", value=size, fix=f"use one of {', '.join(SIZES)}")
    lang = language(language_name)
    people_count, town_count = SIZES[size]
    towns = _towns(Stream(seed, "world", "towns"), town_count, lang)
    people = _people(Stream(seed, "world", "people"), people_count, towns, lang)
    animals = [_animal(name, row, lang) for name, row in lang.get("things.animals").items()]
    events = sorted({str(town.festival) for town in towns})
    facts = Facts(seed, size, lang, people, towns, animals, lang.nouns("things.objects"), events)
    facts.index()
    return facts


def _copy_forms(target: Noun, noun: Noun) -> None:
    for form, text in vars(noun).items():
        setattr(target, form, text)


def _animal(name: str, row: dict[str, str], lang: Language) -> Animal:
    animal = Animal(name)
    _copy_forms(animal, lang.noun(name))
    animal.sound, animal.eats, animal.home = row["sound"], row["eats"], lang.noun(row["home"])
    return animal


def _towns(stream: Stream, count: int, lang: Language) -> list[Town]:
    starts, ends = lang.get("names.town_start"), lang.get("names.town_end")
    names = _distinct(stream, [(start, end) for start in starts for end in ends], count)
    decks = {key: _deck(stream, lang.get(path), count) for key, path in _TOWN_POOLS.items()}
    towns = []
    for place, name in enumerate(names):
        town = Town(name)
        _copy_forms(town, lang.noun(name))
        for key, deck in decks.items():
            setattr(town, key, lang.noun(deck[place]))
        towns.append(town)
    return towns


def _distinct(stream: Stream, pairs: list[tuple[str, str]], count: int) -> list[str]:
    """`count` names; beginnings repeat only when all have been used."""
    shuffled = stream.shuffled(pairs)
    used: dict[str, int] = {}
    names: list[str] = []
    for turn in range(1, len(pairs) + 1):
        for start, end in shuffled:
            if len(names) < count and used.get(start, 0) < turn and start + end not in names:
                used[start] = used.get(start, 0) + 1
                names.append(start + end)
        if len(names) == count:
            break
    return names


_BUCKETS = {"train": (0, 1), "val": (2,), "evaluation": (3,)}
_TOWN_POOLS = {"country": "names.countries", "river": "names.rivers", "famous": "things.products",
               "building": "things.buildings", "festival": "things.festivals"}
_PEOPLE_POOLS = {"job": "things.jobs", "food": "things.foods", "pet": "things.pets", "hobby": "things.hobbies",
                 "month": "grammar.months", "pet_name": "names.pets"}


def _deck(stream: Stream, items: Sequence[T], count: int) -> list[T]:
    """`count` items: the whole list in random order, again and again, so that no value is rare."""
    deck: list[T] = []
    while len(deck) < count:
        deck += stream.shuffled(items)
    return deck[:count]


def _people(stream: Stream, count: int, towns: list[Town], lang: Language) -> list[Citizen]:
    people = []
    decks = {key: _deck(stream, lang.get(path), count) for key, path in _PEOPLE_POOLS.items()}
    homes = _deck(stream, [str(place) for place in range(len(towns))], count)
    for place, (name, gender) in enumerate(_known_names(stream, count, lang)):
        person = Citizen(name, gender, lang.grammar)
        person.a_child = lang.noun(person.words["boy"]).a
        person.town = towns[int(homes[place])]
        for key, deck in decks.items():
            setattr(person, key, lang.noun(deck[place]))
        people.append(person)
    _befriend(stream, people)
    return people


def _known_names(stream: Stream, count: int, lang: Language) -> list[tuple[str, str]]:
    """Names with two people (more in a large world) to each first and each last name: only both tell who is meant."""
    firsts = [(name, gender) for gender in ("she", "he") for name in lang.get(f"names.first.{gender}")]
    some = (count + 1) // 2
    firsts, lasts = stream.shuffled(firsts)[:some], stream.shuffled(lang.get("names.last"))[:some]
    names: dict[str, str] = {}
    while len(names) < count:
        for (first, gender), last in zip(_deck(stream, firsts, count), _deck(stream, lasts, count), strict=True):
            if len(names) < count:
                names.setdefault(f"{first} {last}", gender)
    return list(names.items())


def _befriend(stream: Stream, people: list[Citizen]) -> None:
    """Friends in a circle of random order (everyone is someone's friend); people of one last name are siblings."""
    circle = stream.shuffled(people)
    for place, person in enumerate(circle):
        person.friend = circle[(place + 1) % len(circle)]
    families: dict[str, Citizen] = {}
    for person in people:
        other = families.get(person.last)
        if other is None:
            families[person.last] = person
        elif other.sibling is None:
            person.sibling, other.sibling = other, person


def stranger(stream: Stream, facts: Facts, split: str, odd: float = 0.0) -> Person:
    """Someone who is not in the world: names of two people of it put together, or a name nobody there has.

    A share `odd` of them has a name out of a fairy tale.

    A name belongs to one split for good ("train", "val" or "evaluation"), whatever the seed.
    """
    lang, buckets = facts.lang, _BUCKETS[split]
    while True:
        bearer = stream.pick(facts.people)
        gender, first, last = bearer.gender, bearer.first, stream.pick(facts.people).last
        if stream.chance(0.4):
            gender = stream.pick(("she", "he"))
            first = stream.pick(lang.get(f"names.fresh.{gender}"))
            last = stream.pick(lang.get("names.fresh.last")) if stream.chance(0.7) else last
        name = _odd_name(stream, lang) if stream.chance(odd) else f"{first} {last}"
        if name not in facts.by_name and bucket(name, 4) in buckets:
            return lang.person(name, gender)


def _odd_name(stream: Stream, lang: Language) -> str:
    """Two names of a fairy tale, of two syllables each."""
    sounds = lang.get("names.odd")
    parts = ["".join(stream.pick(sounds[sound]) for sound in ("onset", "vowel", "onset", "vowel", "coda")).capitalize()
             for _ in range(2)]
    return str(stream.pick(sounds["joined"]).format(*parts))


def coined_name(stream: Stream, lang: Language, split: str) -> str:
    """A name put together from syllables; split by the name as in `stranger`."""
    buckets = _BUCKETS[split]
    parts = lang.get("names.syllables")
    while True:
        name = str(stream.pick(parts["start"]) + stream.pick(parts["middle"]) + stream.pick(parts["end"]))
        if bucket(name, 4) in buckets:
            return name
