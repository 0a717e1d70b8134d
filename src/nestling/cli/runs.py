"""Verbs about whole runs: `nestling run RECIPE` and `nestling report RUN`."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.console import Console
from rich.table import Table

from nestling.cli.starting import from_model, on_conversations
from nestling.core import pipeline, ranks
from nestling.core.config import nearest
from nestling.core.errors import UserError
from nestling.core.recipe import Recipe, StageSpec, load_recipe
from nestling.core.registry import find
from nestling.core.runtime import detect
from nestling.core.storage import BadRows
from nestling.report.build import build_report
from nestling.report.table import capability_table
from nestling.stages._preflight import announce

OutOption = Annotated[Path | None, typer.Option(help="Folder of the run.  [default: runs/<recipe>]")]


def run(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of one in recipes/.")] = "",
    out: OutOption = None,
    text: Annotated[Path | None, typer.Option(help="Learn from this text file or folder instead.")] = None,
    model: Annotated[Path | None, typer.Option(help="Start from this model instead of pre-training one.")] = None,
    conversations: Annotated[Path | None, typer.Option(help="Learn these conversations (JSONL) instead.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a setting: stage.key=value.")] = None,
    until: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None,
    on_bad_row: Annotated[str | None, typer.Option(help="What a bad row of a data file does: stop or skip.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bf16, fp16 or fp32.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.", min=1)] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Run a recipe: raw text to an aligned chat model, stage by stage. Finished stages are skipped."""
    path = recipe_path(recipe or ("own-text" if text else "demo"))
    overrides = list(set_ or [])
    plan = load_recipe(path, overrides)
    if text is not None:
        plan = _on_text(plan, text)
    if conversations is not None:
        plan = on_conversations(plan, conversations)
    if model is not None:
        plan = from_model(plan, model)
    if on_bad_row is not None:
        plan = _on_bad_row(plan, on_bad_row)
    folder = out or Path("runs") / plan.name
    pipeline.run(plan, folder, detect(device, dtype, threads), until, quiet, announce)
    if ranks.is_main():
        show(folder)


def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
) -> None:
    """Write report.json and report.html of a run and print its table."""
    if not (folder / "recipe.json").exists():
        raise UserError("not a run folder (it has no recipe.json)", where=folder)
    build_report(folder)
    show(folder)


def show(folder: Path) -> None:
    """Print what the run's model can do beside its bars, and where the report lies."""
    rows = capability_table(build_report(folder))
    console = Console(highlight=False)
    if rows:
        table = Table(title=f"{folder}: what the model can do")
        for name in ("measure", "value", "bar", "", "n", "95 % interval"):
            table.add_column(name, justify="left" if name == "measure" else "right")
        for row in rows:
            count = "" if row.n is None else str(row.n)
            table.add_row(row.title, row.value_text, row.bar_text, row.met_text, count, row.interval_text)
        console.print(table)
    console.print(f"report: {folder / 'report.html'}")


def recipe_path(name: str) -> Path:
    """The file itself, or recipes/<name>.yaml here or beside the installed sources."""
    if Path(name).is_file():
        return Path(name)
    shelves = [Path("recipes"), Path(str(importlib.resources.files("nestling"))).parents[1] / "recipes"]
    known = [path for shelf in shelves for path in shelf.glob("*.yaml")]
    for path in known:
        if path.stem == name.removesuffix(".yaml"):
            return path
    if Path(name).is_dir():
        fix = "give its recipe file; a run goes on by the command that began it"
        raise UserError("this is a folder, not a recipe", where=name, fix=fix)
    fix = f"{nearest(Path(name).stem, {path.stem for path in known})}; or the path of a .yaml file"
    raise UserError("no such recipe", value=name, fix=fix)


def _on_text(recipe: Recipe, text: Path) -> Recipe:
    """The recipe with every corpus stage reading the given text."""
    if not text.exists():
        raise UserError("no such file or folder", where="--text", value=str(text))
    if not any(spec.stage == "corpus" for spec in recipe.stages):
        raise UserError("the recipe has no corpus stage to point at the text", where="--text")
    sources = [{"source": "files", "settings": {"paths": [str(text)]}}]
    return _with(recipe, lambda spec: spec.stage == "corpus", sources=sources)


def _on_bad_row(recipe: Recipe, policy: str) -> Recipe:
    """The recipe with every stage that reads rows of the user's following one policy."""
    if policy not in get_args(BadRows):
        raise UserError("unknown policy", where="--on-bad-row", value=policy, fix="use stop or skip")
    return _with(recipe, lambda spec: "on_bad_row" in _fields(spec), on_bad_row=policy)


def _fields(spec: StageSpec) -> Mapping[str, object]:
    return find("stages", spec.stage).Settings.model_fields


def _with(recipe: Recipe, which: Callable[[StageSpec], bool], **settings: object) -> Recipe:
    stages = [
        spec.model_copy(update={"settings": spec.settings | settings}) if which(spec) else spec
        for spec in recipe.stages
    ]
    return recipe.model_copy(update={"stages": tuple(stages)})
