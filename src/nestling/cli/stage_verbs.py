"""One verb for each file of `stages/`, its options generated from the stage's settings class."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import typer
import yaml
from pydantic.fields import FieldInfo
from rich.console import Console

from nestling.core import pipeline, ranks
from nestling.core.config import Config
from nestling.core.errors import UserError
from nestling.core.recipe import build_recipe, changed
from nestling.core.registry import find
from nestling.core.runtime import detect
from nestling.stages._preflight import announce


def verb(name: str) -> Any:
    """The function that runs one stage, with a parameter for each input and each setting, as typer reads them."""
    module = find("stages", name)
    roles = [role.rstrip("?") for role in module.READS]
    fields = dict(_leaves(module.Settings))

    def run(**given: Any) -> None:
        reads = {role: str(given[role]) for role in roles if given[role] is not None}
        body: dict[str, Any] = {"stage": name, "reads": reads}
        for dotted in fields:
            if (value := given[dotted.replace(".", "__")]) is not None:
                body = changed(body, dotted.split("."), _value(dotted, value), f"--{dotted}")
        recipe = build_recipe({"name": name, "seed": given["seed"], "stages": {name: body}})
        runtime = detect(given["device"], given["dtype"], given["threads"])
        reports = pipeline.run(recipe, given["out"], runtime, quiet=given["quiet"], before=announce)
        if ranks.is_main():
            Console(highlight=False).print_json(data=reports[name], default=str)

    run.__doc__ = f"{(module.__doc__ or name).strip().splitlines()[0]}"
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [*_inputs(module), *_settings(fields), *_surroundings()]
    )
    run.__annotations__ = {p.name: p.annotation for p in run.__signature__.parameters.values()}  # type: ignore[attr-defined]
    return run


def _value(dotted: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError("the value is not YAML", where=f"--{dotted.replace('_', '-')}", value=text) from None


def _leaves(cls: type[Config], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted name, field) of every setting, walking nested settings classes."""
    for name, field in cls.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Config):
            yield from _leaves(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def _inputs(module: ModuleType) -> list[inspect.Parameter]:
    """A path option for each role that the stage reads."""
    return [
        _parameter(role.rstrip("?"), Path | None, typer.Option(None, help=f"Folder that holds the {role.rstrip('?')}."))
        for role in module.READS
    ]


def _settings(fields: dict[str, FieldInfo]) -> list[inspect.Parameter]:
    """An option for each setting; the value is YAML and is checked by the settings class."""
    parameters = []
    for dotted, field in fields.items():
        default = "required" if field.is_required() else str(field.get_default(call_default_factory=True))
        flag = "--" + dotted.replace("_", "-")
        option = typer.Option(None, flag, help=f"{field.description or ''}  [default: {default}]", metavar="VALUE")
        parameters.append(_parameter(dotted.replace(".", "__"), str | None, option))
    return parameters


def _surroundings() -> list[inspect.Parameter]:
    return [
        _parameter("out", Path, typer.Option(Path("runs/single"), help="Run folder; the stage writes a folder in it.")),
        _parameter("seed", int, typer.Option(1, help="Drives every random stream.")),
        _parameter("device", str, typer.Option("auto", help="auto, cpu, cuda or mps.")),
        _parameter("dtype", str, typer.Option("auto", help="auto, bf16, fp16 or fp32.")),
        _parameter("threads", int | None, typer.Option(None, help="CPU threads.", min=1)),
        _parameter("quiet", bool, typer.Option(False, "--quiet", help="No progress.")),
    ]


def _parameter(name: str, kind: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind)
