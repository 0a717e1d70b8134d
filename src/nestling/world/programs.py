"""Small Python functions that documents show with their results. Their source is the text: what is shown was run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from nestling.world.streams import Stream


def double(number: int) -> int:
    """Twice the number."""
    return number * 2


def next_even(number: int) -> int:
    """The first even number after this one."""
    if number % 2 == 0:
        return number + 2
    return number + 1


def is_even(number: int) -> bool:
    """Whether the number is even."""
    return number % 2 == 0


def larger(first: int, second: int) -> int:
    """The larger of two numbers."""
    if first > second:
        return first
    return second


def distance(first: int, second: int) -> int:
    """How far apart two numbers are."""
    return abs(first - second)


def count_down(number: int) -> list[int]:
    """The numbers from this one down to 1."""
    result = []
    while number > 0:
        result.append(number)
        number = number - 1
    return result


def backwards(word: str) -> str:
    """The word from its last letter to its first."""
    return word[::-1]


def letters(word: str) -> int:
    """How many letters the word has."""
    return len(word)


def first_letter(word: str) -> str:
    """The first letter of the word."""
    return word[0]


def shout(word: str) -> str:
    """The word in capital letters."""
    return word.upper() + "!"


def twice(word: str) -> str:
    """The word two times."""
    return word + " " + word


def total(numbers: list[int]) -> int:
    """The sum of all numbers in a list."""
    result = 0
    for number in numbers:
        result = result + number
    return result


def longest(words: list[str]) -> str:
    """The longest word of a list."""
    best = words[0]
    for word in words:
        if len(word) > len(best):
            best = word
    return best


def without(words: list[str], word: str) -> list[str]:
    """The list without this word."""
    return [other for other in words if other != word]


PROGRAMS: tuple[Callable[..., Any], ...] = (
    double, next_even, is_even, larger, distance, count_down, backwards, letters, first_letter, shout, twice, total,
    longest, without)


@cache
def source(program: Callable[..., Any]) -> str:
    """The text of a program."""
    return inspect.getsource(program).strip()


def arguments(program: Callable[..., Any], stream: Stream, words: list[str]) -> list[Any]:
    """Fitting arguments for a program, by its annotations; later ones may refer to a word of an earlier list."""
    values: list[Any] = []
    for kind in [hint for name, hint in program.__annotations__.items() if name != "return"]:
        if kind == "int":
            values.append(stream.number(2, 9) if program is count_down else stream.number(1, 30))
        elif kind == "list[int]":
            values.append([stream.number(1, 9) for _ in range(stream.number(2, 4))])
        elif kind == "list[str]":
            values.append(stream.several(words, 3))
        else:
            values.append(stream.pick(values[0]) if values else stream.pick(words))
    return values
