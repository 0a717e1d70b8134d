"""The Python tool as a tool: what it answers, what it offers the code, what it refuses."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from sandboxes.arena import Arena

from nestling import tools
from nestling.core.errors import UserError
from nestling.tools import _sandbox, python
from nestling.tools.python import Settings


def test_value_of_the_last_line_is_shown_as_at_the_prompt(room: Arena) -> None:
    assert room.run("print('a')\n'b' + 'c'") == "a\n'bc'"
    assert room.run("None") == "(no output)"
    assert room.run("for x in [1, 2]:\n    x") == "(no output)", "only the last line, not what stands in a loop"
    assert room.run("def f(n):\n    return n if n < 2 else f(n - 1) + f(n - 2)\nf(15)") == "610"


@pytest.mark.parametrize(
    ("code", "answer"),
    [
        ("print('before')\n{}['x']", "error: KeyError: 'x'\nbefore\n\n  line 2, in <module>: {}['x']"),
        ("1 +", "error: SyntaxError: invalid syntax"),
        ("import sys; sys.exit(3)", "error: exit status 3"),
        ("import sys; sys.exit('gone')", "error: gone"),
        ("import sys; sys.exit(0)", "(no output)"),
        ("import nestling", "error: ModuleNotFoundError: No module named 'nestling'"),
        ("import ctypes; ctypes.string_at(0)", "error: ended by SIGSEGV"),
        ("int('x' * 3)", "error: ValueError: invalid literal for int() with base 10: 'xxx'"),
    ],
)
def test_what_goes_wrong_is_told(room: Arena, code: str, answer: str) -> None:
    assert room.run(code).startswith(answer)


def test_ordinary_programs_run(room: Arena) -> None:
    """Files, folders, dates, exact numbers, regular expressions, asyncio, temporary files, databases, archives."""
    code = """
import asyncio, collections, dataclasses, datetime, decimal, fractions, itertools, json, pathlib, random, re
import shutil, sqlite3, statistics, tempfile, textwrap, zipfile, zoneinfo
@dataclasses.dataclass
class Point:
    x: int
pathlib.Path("deep/er").mkdir(parents=True)
pathlib.Path("deep/er/note.txt").write_text("héllo")
with zipfile.ZipFile("a.zip", "w") as z:
    z.write("deep/er/note.txt")
with tempfile.NamedTemporaryFile("w+") as f:
    f.write("x"); f.flush()
db = sqlite3.connect("a.db"); db.execute("create table t(a)"); db.execute("insert into t values (1)"); db.commit()
async def main():
    await asyncio.sleep(0.001)
    return 7
shutil.rmtree("deep")
print(asyncio.run(main()), db.execute("select a from t").fetchall(), decimal.Decimal("0.1") * 3)
print(datetime.datetime(2024, 1, 1, tzinfo=zoneinfo.ZoneInfo("UTC")).year, random.Random(1).random() < 1, Point(1))
statistics.mean([1, 2, 3]), re.findall(r"\\d", "a1b2"), sorted(p.name for p in pathlib.Path().iterdir())
"""
    assert room.run(code) == (
        "7 [(1,)] 0.3\n2024 True Point(x=1)\n(2, ['1', '2'], ['a.db', 'a.zip'])"
    )  # fmt: skip


def test_the_same_code_gives_the_same_output(room: Arena) -> None:
    code = "import tempfile\nset('abcdefgh'), hash('x')"
    assert room.run(code) == room.run(code)


def test_installed_packages_only_where_the_settings_say_so(room: Arena) -> None:
    code = "import numpy as np\nint(np.linalg.det(np.eye(3)) + np.arange(5).sum())"
    assert room.run(code).startswith("error: ModuleNotFoundError")
    assert room.run(code, packages=True) == "11"


def test_long_output_keeps_its_head_and_tail(room: Arena) -> None:
    text = room.run("print('é' * 3000 + 'ü' * 3000)", characters=1000)
    assert text.startswith("é" * 500 + "\n… ")
    assert text.endswith(" …\n" + "ü" * 499), "half of what is kept, the line's end with it"
    assert room.run("print('é' * 999)", characters=1000) == "é" * 999
    assert room.run("print('日' * 1500, end='')\nprint('x')", characters=1502) == "日" * 1500 + "x"


def test_calls_side_by_side(room: Arena) -> None:
    with ThreadPoolExecutor(4) as pool:
        chosen = Settings(seconds=20)
        answers = pool.map(lambda n: python.call(f"open('n', 'w').write('{n}')\nopen('n').read()", chosen), range(8))
    assert list(answers) == [f"'{n}'" for n in range(8)]


def test_large_programs_and_odd_characters_arrive(room: Arena) -> None:
    assert room.run("x = '" + "é" * 200_000 + "'\nlen(x)") == "200000"
    assert room.run("print('\\ud800')").startswith("error: UnicodeEncodeError")


def test_every_line_of_the_isolation_has_its_means() -> None:
    told = python.isolation()
    assert {kept.what for kept in told} >= {"network", "files elsewhere", "memory", "environment and open files"}
    assert all(kept.how is None or kept.how for kept in told)


NOTHING = _sandbox.Layers("none", 0, False)


@pytest.mark.parametrize(
    ("layers", "missing"),
    [
        (None, {"files elsewhere", "network", "other processes"}),
        (NOTHING, {"files elsewhere", "network", "other processes"}),
        (_sandbox.Layers("none", 0, True), {"files elsewhere"}),
        (_sandbox.Layers("none", 7, False), {"files elsewhere", "network", "other processes"}),
        (_sandbox.Layers("namespaces", 0, True), {"files elsewhere"}),
        (_sandbox.Layers("bubblewrap", 0, True), set()),
        (_sandbox.Layers("none", 7, True), set()),
    ],
)
def test_what_is_missing_is_named_and_refused(layers, missing, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(_sandbox, "probe", lambda wrapper="auto": layers)
    assert {kept.what for kept in python.isolation() if kept.how is None} - {
        "starting processes and threads"
    } == missing
    if missing:
        with pytest.raises(UserError, match="files elsewhere") as error:
            python.call(f"open({str(tmp_path / 'ran')!r}, 'w')")
        assert "trusted" in str(error.value)
        assert not (tmp_path / "ran").exists(), "refused code has not run"
        assert tools.run("python", {"code": "1"}).startswith("error: ")


def test_root_may_start_processes_where_only_a_limit_for_users_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = _sandbox.Layers("bubblewrap", 7, False)
    for user, expected in ((0, None), (1000, "RLIMIT_NPROC")):
        monkeypatch.setattr("os.getuid", lambda user=user: user)
        told = {kept.what: kept.how for kept in _sandbox.isolation(layers)}
        assert told["starting processes and threads"] == expected


def test_trusted_code_runs_with_the_limits_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sandbox, "probe", lambda wrapper="auto": NOTHING)
    assert python.call("6 * 7", Settings(trusted=True)) == "42"
    start = time.monotonic()
    assert python.call("while True: pass", Settings(trusted=True, seconds=0.5)).startswith("error: stopped after 0.5 s")
    assert time.monotonic() - start < 3


def test_a_door_that_does_not_close_lets_nothing_run(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """The probe said that Landlock works; in the process it does not: the code must not run."""
    if sys.platform != "linux":
        pytest.skip("Linux only")
    marker = tmp_path / "ran"
    monkeypatch.setattr(_sandbox, "probe", lambda wrapper="auto": _sandbox.Layers("none", 7, True))
    monkeypatch.setattr(_sandbox, "_readable", lambda: ["/proc/self/nope/\0"])  # a path that no system takes
    answer = python.call(f"open({str(marker)!r}, 'w')", Settings(trusted=True))
    assert answer.startswith("error: ")
    assert not marker.exists()


def test_importing_the_tools_starts_nothing() -> None:
    code = "import sys, nestling.tools.python as p; print([m for m in sys.modules if m in ('torch', 'mcp', 'ctypes')])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
