"""The tools that a person has chosen to offer, each with its settings."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from nestling.core import registry
from nestling.core.config import Config, parse
from nestling.core.errors import UserError
from nestling.tools._mcp import Server, ServerSettings
from nestling.tools._schema import ERROR, run, schema

MCP = "mcp"


@dataclass(frozen=True)
class Offer:
    """A tool's definition in OpenAI's function form, and the function that answers a call."""

    definition: Mapping[str, Any]
    answer: Callable[[Mapping[str, Any]], str]


class Toolbox(contextlib.AbstractContextManager["Toolbox"]):
    """What a model may call. Each call blocks up to the limit in its tool's settings, and may come from any thread.

    >>> with Toolbox.open({"calculator": {}, "python": {"seconds": 2}}) as box:
    ...     box.run("calculator", {"expression": "6 * 7"})
    '42'
    """

    def __init__(self, offers: Mapping[str, Offer], opened: contextlib.ExitStack | None = None) -> None:
        self._offers = dict(offers)
        self._opened = opened or contextlib.ExitStack()

    @classmethod
    def open(cls, settings: Mapping[str, Mapping[str, Any]], where: str = "tools") -> Self:
        """Open tools by name.

        Args:
            settings: for each tool its settings; under "mcp" a name and `ServerSettings` for each MCP server, whose
                tools are offered as <server>_<tool>.
            where: the place that errors begin with.

        Raises:
            UserError: an unknown tool or setting, a server that can't be reached, two tools of one name.
        """
        with contextlib.ExitStack() as opened:
            offers: dict[str, Offer] = {}
            for name, values in settings.items():
                found = _servers(values, f"{where}.{MCP}", opened) if name == MCP else [_local(name, values, where)]
                for offer in found:
                    if (offered := offer.definition["function"]["name"]) in offers:
                        raise UserError("two tools have this name", where=where, value=offered)
                    offers[offered] = offer
            return cls(offers, opened.pop_all())

    @property
    def names(self) -> tuple[str, ...]:
        """The tools on offer, in the order of the settings."""
        return tuple(self._offers)

    def schemas(self) -> list[Mapping[str, Any]]:
        """All definitions in OpenAI's function form."""
        return [offer.definition for offer in self._offers.values()]

    def run(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Answer a model's call; whatever goes wrong comes back as "error: …"."""
        if name not in self._offers:
            return f"{ERROR}no tool {name!r} on offer; there is {', '.join(self._offers)}"
        return self._offers[name].answer(arguments)

    def close(self) -> None:
        """End the sessions with MCP servers."""
        self._opened.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def _local(name: str, values: Mapping[str, Any], where: str) -> Offer:
    """A file of this folder, or a module elsewhere by its dotted name."""
    kind = getattr(registry.find("tools", name, where=where), "Settings", None)
    chosen: Config | None = None
    if kind is not None:
        chosen = parse(kind, values, f"{where}.{name}")
    elif values:
        raise UserError("this tool has no settings", where=f"{where}.{name}", value=dict(values))
    return Offer(schema(name), partial(run, name, settings=chosen))


def _servers(servers: Mapping[str, Any], where: str, opened: contextlib.ExitStack) -> list[Offer]:
    """The tools of all MCP servers."""
    found = []
    for name, values in servers.items():
        server = Server(name, parse(ServerSettings, values, f"{where}.{name}"))
        opened.callback(server.close)
        found += [Offer(about, partial(server.run, tool)) for tool, about in server.definitions().items()]
    return found
