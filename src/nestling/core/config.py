"""Typed settings. One sentence under each field; an unknown key names the nearest one that exists."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from nestling.core.errors import UserError

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """Base of every settings class: frozen, strict about keys, validated when built.

    >>> class Heat(Config):
    ...     degrees: float = 1.0
    >>> Heat(degrees=2).degrees
    2.0
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)


def parse(cls: type[C], data: Mapping[str, Any], where: str) -> C:
    """Build `cls` from plain data; `where` is the dotted place that error messages begin with.

    Raises:
        UserError: the first thing wrong, with its dotted place, the value and what would be right.
    """
    try:
        return cls.model_validate(dict(data))
    except ValidationError as error:
        raise _explain(cls, error, where) from None


def nearest(name: str, known: Iterable[str]) -> str:
    """Words that help after a misspelt name: the closest known one, then all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known)}"


def _explain(cls: type[Config], error: ValidationError, where: str) -> UserError:
    first = error.errors()[0]
    place = _join(where, *(str(part) for part in first["loc"]))
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return cause.at(place)
    if first["type"] == "extra_forbidden":
        fields = _fields_at(cls, first["loc"][:-1])
        return UserError("unknown setting", where=place, fix=nearest(str(first["loc"][-1]), fields))
    if first["type"] == "missing":
        return UserError("this setting is required", where=place)
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return UserError(message[:1].lower() + message[1:], where=place, value=first["input"])


def _join(*parts: str) -> str:
    """A dotted place; after a file's name, which ends in ": ", comes no dot."""
    joined = ".".join(part for part in parts if part)
    return joined.replace(": .", ": ").removesuffix(": ")


def _fields_at(cls: type[Config], path: tuple[int | str, ...]) -> list[str]:
    """The field names of the settings class that `path` leads to, walking nested classes."""
    for part in path:
        field = cls.model_fields.get(str(part))
        cls = (_settings_in(field.annotation) if field else None) or cls
    return list(cls.model_fields)


def _settings_in(annotation: Any) -> type[Config] | None:
    """The settings class in a type such as `Inner`, `Inner | None`, `tuple[Inner, ...]` or `dict[str, Inner]`."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _settings_in(inner))), None)
