"""One language of the world: its wordings (data files in languages/<name>/) and the few rules of its grammar.

A second language is a second folder of data files. Templates are Python format strings over slots
(`"{p.name} has {p.pet.a}."`); a filled text that still holds slots (a wording inside a wording) is filled again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import resources
from typing import Any

import yaml

from nestling.core.errors import UserError
from nestling.world.streams import Stream


class Noun(str):
    """A noun or noun phrase in its dictionary form, with its other forms as attributes.

    `a` with the indefinite article, `the` with the definite one, `many` the plural; `cap`, `A`, `The` capitalised.
    """

    a: str
    A: str
    the: str
    The: str
    many: str
    cap: str


class Person:
    """Someone a text can speak of: a name and the pronouns that go with it.

    `he`, `him`, `his`, `He`, `His` hold the right pronoun of this person; `first` is the given name.
    """

    def __init__(self, name: str, gender: str, grammar: Mapping[str, Any]) -> None:
        self.name, self.gender = name, gender
        self.first, _, self.last = name.partition(" ")
        self.words: Mapping[str, str] = grammar["pronouns"][gender]
        self.he, self.him, self.his = self.words["he"], self.words["him"], self.words["his"]
        self.He, self.His = capital(self.he), capital(self.his)
        self.a_child = ""

    def __format__(self, spec: str) -> str:
        return self.name

    def __str__(self) -> str:
        return self.name


class Language:
    """The wordings and grammar of one language."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.data: dict[str, Any] = _load(name)
        self.grammar: dict[str, Any] = self.data["grammar"]
        self._article = [(re.compile(pattern), word) for pattern, word in self.grammar["article"]["rules"]]
        self._plural = [(re.compile(pattern), form) for pattern, form in self.grammar["plural"]["rules"]]
        self._nouns: dict[str, Noun] = {}

    def get(self, path: str) -> Any:
        """The data at a dotted path, e.g. "chat.greeting.answers"."""
        value: Any = self.data
        for key in path.split("."):
            value = value[key]
        return value

    def noun(self, text: str) -> Noun:
        """The noun with all its forms (made once)."""
        found = self._nouns.get(text)
        return found if found is not None else self._nouns.setdefault(text, self._make_noun(text))

    def nouns(self, path: str) -> list[Noun]:
        """The list at a dotted path as nouns."""
        return [self.noun(text) for text in self.get(path)]

    def _make_noun(self, text: str) -> Noun:
        noun = Noun(text)
        exceptions = self.grammar["article"]["exceptions"]
        article = exceptions.get(text.split()[0]) or next(w for rule, w in self._article if rule.search(text))
        noun.a, noun.the = f"{article} {text}", f"{self.grammar['definite']} {text}"
        irregular = self.grammar["plural"]["irregular"]
        start, _, last = text.rpartition(" ")
        noun.many = irregular.get(text) or f"{start} {irregular.get(last) or self._regular(last)}".strip()
        noun.A, noun.The, noun.cap = capital(noun.a), capital(noun.the), capital(text)
        return noun

    def _regular(self, word: str) -> str:
        return next(rule.sub(form, word, count=1) for rule, form in self._plural if rule.fullmatch(word))

    def person(self, name: str, gender: str) -> Person:
        """A person with the pronouns of this gender ("she" or "he")."""
        person = Person(name, gender, self.grammar)
        person.a_child = self.noun(person.words["boy"]).a
        return person

    def join(self, items: Sequence[str]) -> str:
        """A list in running text: "a, b and c"."""
        comma, last = self.grammar["join"]["comma"], self.grammar["join"]["last"]
        return comma.join(items[:-1]) + last + items[-1] if len(items) > 1 else "".join(items)


def capital(text: str) -> str:
    """The text with its first letter in capitals."""
    return text[:1].upper() + text[1:]


def fill(template: str, slots: Mapping[str, Any]) -> str:
    """The template with its slots filled, first letter in capitals."""
    text = template.format_map(slots)
    if "{" in text:
        text = text.format_map(slots)
    return text[:1].upper() + text[1:]


def wording(stream: Stream, choices: Mapping[str, Sequence[str]], split: str) -> str:
    """One wording of the split: "train" uses the training list, "val" and "evaluation" only the held-out one."""
    return stream.pick(choices["train" if split == "train" else "heldout"])


@lru_cache(maxsize=4)
def language(name: str) -> Language:
    """The language of this name, read once.

    Raises:
        UserError: there is no folder of data files for it.
    """
    return Language(name)


def _load(name: str) -> dict[str, Any]:
    root = resources.files("nestling.world") / "languages"
    folder = root / name
    if not name.isidentifier() or not folder.is_dir():
        known = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        raise UserError("the world does not speak this language", value=name, fix=f"use one of {', '.join(known)}")
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return {f.name.removesuffix(".yaml"): yaml.safe_load(f.read_text(encoding="utf-8")) for f in files}
