"""Toolboxes: tools of ours with settings, and tools of real MCP servers over standard input and over HTTP."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nestling.core.errors import UserError
from nestling.tools import Toolbox, schema

SERVER = str(Path(__file__).parent / "sandboxes" / "mcp_server.py")
COMMAND = [sys.executable, SERVER, "stdio"]


# ---- tools of ours ----


def test_tools_have_their_settings(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The stork flies south.")
    with Toolbox.open({"calculator": {}, "search": {"index": str(tmp_path / "a.txt")}}) as box:
        assert box.names == ("calculator", "search")
        assert box.schemas() == [schema("calculator"), schema("search")]
        assert box.run("calculator", {"expression": "6 * 7"}) == "42"
        assert box.run("search", {"query": "stork"}) == "[1] a.txt\nThe stork flies south."
        assert box.run("python", {"code": "1"}) == "error: no tool 'python' on offer; there is calculator, search"
        assert box.run("calculator", {"expression": "1 / 0"}) == "error: division by zero"
        assert box.run("calculator", {"settings": {}}).startswith("error: argument")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"calculatr": {}}, "tools: nothing in tools has this name .* did you mean 'calculator'"),
        ({"calculator": {"digits": 3}}, "tools.calculator: this tool has no settings"),
        ({"python": {"second": 3}}, "tools.python.second: unknown setting; did you mean 'seconds'"),
        ({"python": {"seconds": -1}}, "tools.python.seconds: .* greater than 0"),
        ({"mcp": {"x": {}}}, "tools.mcp.x: .*reached by a command or by a url"),
        ({"mcp": {"x": {"command": ["a"], "url": "http://b"}}}, "tools.mcp.x: .*by a command or by a url"),
    ],
)
def test_mistakes_are_named(settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Toolbox.open(settings)


def test_a_tool_elsewhere_is_offered_under_its_last_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for lab in ("lab_of_mine", "lab_of_yours"):
        (tmp_path / lab).mkdir()
        (tmp_path / lab / "weather.py").write_text(
            'def call(place: str) -> str:\n    """Tell the weather.\n\n    Args:\n        place: where.\n    """\n'
            "    return f'rain in {place}'\n"
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    with Toolbox.open({"lab_of_mine.weather": {}}) as box:
        assert box.names == ("weather",)
        assert box.run("weather", {"place": "Ulm"}) == "rain in Ulm"
    with pytest.raises(UserError, match="two tools have this name"):
        Toolbox.open({"lab_of_mine.weather": {}, "lab_of_yours.weather": {}})


# ---- MCP ----


@pytest.fixture
def address() -> Iterator[str]:
    """A server over streamable HTTP in a process of its own."""
    pytest.importorskip("mcp")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, SERVER, "http", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert time.monotonic() < end, "the server does not start"
                assert process.poll() is None
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(params=["stdio", "http"])
def toy(request: pytest.FixtureRequest) -> Iterator[Toolbox]:
    """A toolbox with one server, reached in either way."""
    pytest.importorskip("mcp")
    how = {"command": COMMAND} if request.param == "stdio" else {"url": request.getfixturevalue("address")}
    with Toolbox.open({"calculator": {}, "mcp": {"toy": {**how, "seconds": 10, "characters": 1000}}}) as box:
        yield box


def test_tools_of_a_server(toy: Toolbox) -> None:
    assert toy.names[:2] == ("calculator", "toy_add")
    assert "toy_odd_name_1" in toy.names
    function = toy.schemas()[1]["function"]
    assert function["description"] == "Add two whole numbers."
    assert function["parameters"]["properties"]["b"]["type"] == "integer"
    assert function["parameters"]["required"] == ["a"]
    assert toy.run("toy_add", {"a": 1, "b": 2}) == "3"
    assert toy.run("toy_odd_name_1", {}) == "odd"
    assert toy.run("toy_add", {"a": "x"}).startswith("error: ")
    assert toy.run("toy_add", {}).startswith("error: ")
    assert toy.run("toy_fail", {}).startswith("error: ")
    assert toy.run("add", {"a": 1}).startswith("error: no tool 'add' on offer")
    answer = toy.run("toy_long", {})
    assert answer == "é" * 500 + "\n… 49000 characters left out …\n" + "é" * 500
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda n: toy.run("toy_add", {"a": n}), range(20))) == [str(n + 1) for n in range(20)]


def test_slow_calls_end_in_time_and_do_not_hold_up_others(address: str) -> None:
    pytest.importorskip("mcp")
    for how in ({"command": COMMAND}, {"url": address}):
        with Toolbox.open({"mcp": {"toy": {**how, "seconds": 5}}}) as box:
            begun = time.monotonic()
            with ThreadPoolExecutor(1) as beside:
                waiting = beside.submit(box.run, "toy_slow", {})
                assert box.run("toy_add", {"a": 1}) == "2"
                assert time.monotonic() - begun < 2
                assert waiting.result() == "error: toy did not answer within 5 s"
            assert box.run("toy_add", {"a": 2}) == "3", "the session goes on"


def test_a_server_that_died_is_started_again() -> None:
    pytest.importorskip("mcp")
    with Toolbox.open({"mcp": {"toy": {"command": COMMAND, "seconds": 15}}}) as box:
        assert box.run("toy_die", {}).startswith("error: toy: ")
        assert box.run("toy_add", {"a": 1}) == "2"


def test_settings_of_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen tools, its own folder and variables; it does not get ours."""
    pytest.importorskip("mcp")
    monkeypatch.setenv("NESTLING_SECRET", "hidden")
    about = {"command": COMMAND, "tools": ["environment"], "environment": {"COLOUR": "red"}, "folder": str(tmp_path)}
    with Toolbox.open({"mcp": {"toy": about}}) as box:
        assert box.names == ("toy_environment",)
        answer = box.run("toy_environment", {})
    assert "COLOUR" in answer
    assert str(tmp_path) in answer
    assert "NESTLING_SECRET" not in answer
    with pytest.raises(UserError, match=r"mcp\.toy\.tools: the server has no such tool \(got 'sub'\); it has add"):
        Toolbox.open({"mcp": {"toy": {"command": COMMAND, "tools": ["sub"]}}})


@pytest.mark.parametrize(
    "how", [{"command": ["no-such-program"]}, {"command": ["true"]}, {"command": ["sleep", "60"]},
            {"url": "http://127.0.0.1:1/mcp"}, {"url": "not a url"}]
)  # fmt: skip
def test_a_server_that_can_not_be_reached_is_named(how: dict) -> None:
    pytest.importorskip("mcp")
    begun, threads = time.monotonic(), threading.active_count()
    with pytest.raises(UserError, match=r"mcp\.far: the MCP server can't be reached: \S"):
        Toolbox.open({"mcp": {"far": {**how, "seconds": 1}}})
    assert time.monotonic() - begun < 8
    assert threading.active_count() <= threads


def test_closing_ends_the_server() -> None:
    pytest.importorskip("mcp")
    with Toolbox.open({"mcp": {"toy": {"command": COMMAND}}}) as box:
        assert box.run("toy_add", {"a": 1}) == "2"
        mine = subprocess.run(["ps", "-ww", "--ppid", str(os.getpid()), "-o", "pid,args"], capture_output=True, text=True)
        running = [int(line.split()[0]) for line in mine.stdout.splitlines() if "mcp_server" in line]
        assert running
    for process in running:
        with pytest.raises(ProcessLookupError):
            os.kill(process, signal.SIGCONT)


def test_without_the_extra_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mcp", None)
    with pytest.raises(UserError, match=r"pip install 'nestling\[mcp\]'"):
        Toolbox.open({"mcp": {"toy": {"command": COMMAND}}})
