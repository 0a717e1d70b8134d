"""What the documents tell people to type works, and what they point at exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def commands(first: str) -> list[tuple[str, list[str]]]:
    """(page, words) of every line of a shell block that begins with this word; comments are cut."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
            lines = (shlex.split(line, comments=True) for line in block.splitlines())
            found += [(page.name, words) for words in lines if words[:1] == [first]]
    return found


def name(command: tuple[str, list[str]]) -> str:
    """A readable test id."""
    return f"{command[0]}: {' '.join(command[1])}"


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    """The command line; built here because it imports everything, which the other tests of this folder do without."""
    from nestling.cli.app import build_app

    return build_app()


def test_the_readme_begins_with_the_two_commands():
    """The README's first block of commands is `make demo` and `make test`."""
    block = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)[0]
    assert [line.split("#")[0].strip() for line in block.splitlines()] == ["make demo", "make test"]


@pytest.mark.parametrize("command", commands("make"), ids=name)
def test_make_targets_exist(command):
    """Every `make` command of the documents is a target of the Makefile."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(command[1][1:]) <= set(targets)


@pytest.mark.parametrize("command", commands("nestling"), ids=name)
def test_commands_exist_with_their_options(command, app):
    """Every `nestling` command of the documents is a verb, with the options that it is given."""
    verb = command[1][1]
    result = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == 0, f"nestling has no verb {verb!r}: {result.output}"
    known = {option for parameter in typer.main.get_command(app).commands[verb].params for option in parameter.opts}
    assert {word for word in command[1] if word.startswith("--")} <= known


@pytest.mark.parametrize("command", [c for c in commands("nestling") if c[1][1] == "run"], ids=name)
def test_named_recipes_exist(command):
    """A recipe that the documents run by path or by name is there (my.yaml is the reader's own)."""
    recipe = command[1][2]
    if not recipe.startswith(("-", "my")):
        assert (ROOT / "recipes" / Path(recipe).with_suffix(".yaml").name).exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Every relative link and picture of the documents is a file of the project."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_walk_through_the_code_names_real_files():
    """Every file that docs/structure.md names in full exists."""
    text = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_]+(?:/[a-z0-9_]+)+\.py)`", text))
    assert sorted(path for path in named if not (ROOT / "src" / "nestling" / path).exists()) == []
