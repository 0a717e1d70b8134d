"""A small MCP server: `python mcp_server.py stdio`, or `python mcp_server.py http PORT`."""

from __future__ import annotations

import asyncio
import os
import sys

from mcp.server.mcpserver import MCPServer

server = MCPServer("toy", log_level="ERROR")


@server.tool()
def add(a: int, b: int = 1) -> int:
    """Add two whole numbers."""
    return a + b


@server.tool()
def environment() -> str:
    """The names of all environment variables, and the folder."""
    return f"{sorted(os.environ)} {os.getcwd()}"


@server.tool(name="odd.name/1")
def odd() -> str:
    """A name that no function may have."""
    return "odd"


@server.tool()
def fail() -> str:
    """Always goes wrong."""
    raise ValueError("broken")


@server.tool()
def long() -> str:
    """A long text."""
    return "é" * 50_000


@server.tool()
async def slow() -> str:
    """Takes a minute."""
    await asyncio.sleep(60)
    return "done"


@server.tool()
def die() -> str:
    """Ends the server at once."""
    os._exit(1)


if __name__ == "__main__":
    if sys.argv[1] == "stdio":
        server.run("stdio")
    else:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[2]))
