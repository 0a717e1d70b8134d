"""Tools of a server that speaks the Model Context Protocol, reached by a command or a URL (https://modelcontextprotocol.io).

The session lives in a thread of its own for as long as the toolbox is open; a server that has gone away is asked again at
the next call. What it writes is data: it is cut to size and shown to the model, nothing else. Not covered: resources,
prompts, sampling by the server, pictures (named, not shown).
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import AsyncIterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from nestling.core.config import Config
from nestling.core.errors import UserError
from nestling.tools._schema import ERROR, definition, shorten

if TYPE_CHECKING:
    from mcp import Client
    from mcp.types import CallToolResult, Tool

MAX_PAGES = 100  # of a list of tools


class ServerSettings(Config):
    """How to reach a server, what to offer of it, and how long to wait."""

    command: tuple[str, ...] = ()
    """The program to start and its arguments; it is spoken to over its standard input and output."""
    environment: dict[str, str] = {}
    """Environment variables for the command, beyond PATH, HOME and the like."""
    folder: str | None = None
    """The folder that the command starts in."""
    url: str = ""
    """The address of a running server (streamable HTTP), in place of a command."""
    headers: dict[str, str] = {}
    """Headers sent to the URL, such as Authorization."""
    tools: tuple[str, ...] = ()
    """Names of the server's tools to offer; empty: all of them."""
    seconds: float = Field(30.0, gt=0)
    """Seconds that a call, or reaching the server, may take."""
    characters: int = Field(4000, ge=100)
    """Characters of a result that are kept, half from the beginning and half from the end."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if bool(self.command) == bool(self.url):
            raise UserError("an MCP server is reached by a command or by a url", fix="give one of the two")
        return self


class Server:
    """One session with one server, to be closed.

    Raises:
        UserError: the extra is not installed, or the server can't be reached or names no such tool.
    """

    def __init__(self, name: str, settings: ServerSettings) -> None:
        try:
            from anyio.from_thread import start_blocking_portal
            from mcp import Client
        except ImportError:
            raise UserError("MCP servers need an extra", where="mcp", fix="pip install 'nestling[mcp]'") from None
        self.name, self.settings = name, settings
        self._make = partial(Client, read_timeout_seconds=settings.seconds)
        self._thread = contextlib.ExitStack()
        self._session = contextlib.ExitStack()
        self._client: Client | None = None
        self._portal = self._thread.enter_context(start_blocking_portal())
        try:
            self._connect()
            self.tools = self._offered()
        except UserError:
            self.close()
            raise

    def definitions(self) -> dict[str, dict[str, Any]]:
        """The tools in OpenAI's function form by the server's own names; they are offered as <server>_<tool>."""
        return {
            tool.name: definition(_safe(f"{self.name}_{tool.name}"), tool.description or tool.name, tool.input_schema)
            for tool in self.tools
        }

    def run(self, tool: str, arguments: Mapping[str, Any]) -> str:
        """Call one of the server's tools; whatever goes wrong comes back as "error: …"."""
        from mcp import MCPError

        try:
            if self._client is None:
                self._connect()
            result = self._portal.call(self._call, tool, dict(arguments))
        except UserError as error:
            return f"{ERROR}{error}"
        except TimeoutError:
            return f"{ERROR}{self.name} did not answer within {self.settings.seconds:g} s"
        except (MCPError, OSError) as error:
            self._disconnect()
            return f"{ERROR}{self.name}: {error}"
        return shorten(_text(result), self.settings.characters)

    def close(self) -> None:
        """End the session and what it started."""
        self._disconnect()
        self._thread.close()

    def _connect(self) -> None:
        from mcp import MCPError

        try:
            self._client = self._session.enter_context(self._portal.wrap_async_context_manager(self._connected()))
        except (OSError, MCPError, ExceptionGroup) as error:
            reason = str(_innermost(error)) or f"no answer within {self.settings.seconds:g} s"
            raise UserError(f"the MCP server can't be reached: {reason}", where=f"mcp.{self.name}") from None

    def _disconnect(self) -> None:
        """A server that is gone can't say goodbye: that is no error."""
        from mcp import MCPError

        self._client = None
        with contextlib.suppress(OSError, MCPError, ExceptionGroup):
            self._session.close()

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[Client]:
        """A session, reached in time. The scope stays open as long as the session: they must nest."""
        import anyio

        with anyio.CancelScope(deadline=anyio.current_time() + self.settings.seconds) as scope:
            async with contextlib.AsyncExitStack() as stack:
                client = await stack.enter_async_context(self._make(await self._target(stack)))
                scope.deadline = math.inf
                yield client
            return
        raise TimeoutError

    async def _target(self, stack: contextlib.AsyncExitStack) -> Any:
        """A command, or a URL with its headers, as the library takes them."""
        import httpx2
        from mcp import StdioServerParameters
        from mcp.client.streamable_http import streamable_http_client

        settings = self.settings
        if settings.url:
            http = await stack.enter_async_context(httpx2.AsyncClient(headers=settings.headers, timeout=None))
            return streamable_http_client(settings.url, http_client=http)
        first, *rest = settings.command
        return StdioServerParameters(command=first, args=rest, env=settings.environment, cwd=settings.folder)

    async def _call(self, tool: str, arguments: dict[str, Any]) -> CallToolResult:
        import anyio

        assert self._client is not None
        with anyio.fail_after(self.settings.seconds):
            return await self._client.call_tool(tool, arguments)

    def _offered(self) -> list[Tool]:
        """The tools that the settings choose."""
        listed = {tool.name: tool for tool in self._portal.call(self._listed)}
        for wanted in self.settings.tools:
            if wanted not in listed:
                fix = f"it has {', '.join(listed)}"
                raise UserError("the server has no such tool", where=f"mcp.{self.name}.tools", value=wanted, fix=fix)
        return [listed[name] for name in self.settings.tools or listed]

    async def _listed(self) -> list[Tool]:
        """All tools, page by page."""
        assert self._client is not None
        found: list[Tool] = []
        cursor = None
        for _ in range(MAX_PAGES):
            page = await self._client.list_tools(cursor=cursor)
            found += page.tools
            cursor = page.next_cursor
            if cursor is None:
                break
        return found


def _safe(name: str) -> str:
    """A function name as OpenAI allows it: letters, digits, _ and -, at most 64."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[:64]


def _text(result: CallToolResult) -> str:
    """The text parts of a result; of other parts only their kind."""
    parts = [getattr(part, "text", f"[{part.type}]") for part in result.content]
    if not parts and result.structured_content is not None:
        parts = [json.dumps(result.structured_content, ensure_ascii=False)]
    return (ERROR if result.is_error else "") + "\n".join(parts)


def _innermost(error: BaseException) -> BaseException:
    """What went wrong inside groups of errors."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
