"""`nestling plan RECIPE` or `nestling plan --model …`: weights, operations, memory and time, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from nestling.cli.runs import recipe_path
from nestling.core import pipeline
from nestling.core.errors import UserError
from nestling.core.recipe import load_recipe
from nestling.core.registry import find, names
from nestling.core.runtime import Runtime, detect, measured_peak
from nestling.core.storage import read_json
from nestling.model.config import DecoderConfig
from nestling.model.depth import TOKENS_PER_WEIGHT, rates
from nestling.model.hub import from_hub, make_config
from nestling.model.locate import checkpoint_folder
from nestling.planning.activations import Microbatch
from nestling.planning.flops import flops_per_token, six_n_d
from nestling.planning.memory import ADAMW, Learning, cache_memory, training_memory
from nestling.planning.parameters import count_parameters
from nestling.planning.time import TYPICAL_UTILISATION, Speed
from nestling.stages._preflight import disk_of, memory_of, planned, seen_rate

GB = 1e9


def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of one in recipes/.")] = "",
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a setting: stage.key=value.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run, whose finished stages tell the speed.")] = None,
    model: Annotated[str, typer.Option(help="Instead: a model's folder, or its sizes: '{d_model: 768, …}'.")] = "",
    tokens: Annotated[float, typer.Option(help="Tokens that the model is to learn from.", min=0)] = 0.0,
    rows: Annotated[int, typer.Option(help="Rows of a microbatch of the model.", min=1)] = 8,
    devices: Annotated[int, typer.Option(help="Devices that share the work.", min=1)] = 1,
    peak: Annotated[float, typer.Option(help="FLOP/s of one; measured here when not given.", min=0)] = 0.0,
    utilisation: Annotated[float | None, typer.Option(help="Share of it that training reaches.", min=0.01, max=1)] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bf16, fp16 or fp32.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.", min=1)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a recipe or a model will take: weights, operations, memory, time. Nothing is trained."""
    runtime = detect(device, dtype, threads)
    config = _config(model) if model else None
    stages = [] if config else pipeline.plan(load_recipe(recipe_path(recipe or "demo"), list(set_ or [])), out or Path("runs"))
    speed = Speed(peak or measured_peak(runtime), utilisation or TYPICAL_UTILISATION, devices)
    if config is not None:
        found = _of_model(config, tokens, rows, runtime, speed)
    else:
        found = _of_recipe(stages, out or Path("runs"), runtime, speed, utilisation is not None)
    console = Console(highlight=False)
    if json:
        console.print_json(data=found)
    elif config is not None:
        _show_model(console, found)
    else:
        _show_recipe(console, found, recipe or "demo")


def _config(text: str) -> DecoderConfig:
    """The model of a folder, or the one that sizes in YAML describe.

    Raises:
        UserError: neither.
    """
    if Path(text).exists():
        folder = checkpoint_folder(text)
        return from_hub(read_json(folder / "config.json"), str(folder / "config.json"))[0]
    try:
        sizes = yaml.safe_load(text)
    except yaml.YAMLError:
        sizes = None
    if not isinstance(sizes, dict):
        fix = "write sizes as '{architecture: gpt2, d_model: 768, n_layers: 12}'"
        raise UserError("neither a folder nor a model's sizes", where="--model", value=text, fix=fix)
    return make_config(sizes, "--model")


def _of_recipe(
    stages: list[pipeline.Plan], out: Path, runtime: Runtime, speed: Speed, given: bool
) -> dict[str, Any]:
    """{"stages": [...], "speed": {...}}: one row for each stage, its numbers None where it trains nothing."""
    ahead = planned(stages, out)
    seen = [] if given else [rate for one in ahead if (rate := seen_rate(one, out))]
    rate = max(seen) * speed.devices if seen else speed.flops
    listed = []
    for one in ahead:
        row: dict[str, Any] = {"stage": one.stage.spec.name}
        if work := one.work:
            counts, memory = count_parameters(work.models[0]), memory_of(one, runtime)
            row |= {
                "parameters": counts.total,
                "active": counts.active,
                "tokens": work.tokens,
                "flops": work.flops(),
                "peak_memory": memory.peak,
                "memory": asdict(memory),
                "disk": disk_of(one, runtime),
                "seconds": work.flops() / rate,
                "exact": work.exact,
            }
            if work.logits and "depth" in (getattr(one.stage.settings, "model", None) or {}):
                tokens = work.sequences * work.width
                enough = -(-TOKENS_PER_WEIGHT * counts.active // tokens)
                row["of_depth"] = {**_sizes(work.models[0]), **_rates(one.stage.settings), "steps_that_suit": enough}
        listed.append(row)
    return {"stages": listed, "speed": {**asdict(speed), "measured": bool(seen), "flops": rate}, "runtime": runtime.name}


def _sizes(config: DecoderConfig) -> dict[str, int]:
    return {"d_model": config.d_model, "n_layers": config.n_layers, "n_heads": config.n_heads, "head_size": config.head}


def _rates(settings: Any) -> dict[str, float | None]:
    return {name: getattr(settings.training, name) for name in rates(1)}


def _of_model(config: DecoderConfig, tokens: float, rows: int, runtime: Runtime, speed: Speed) -> dict[str, Any]:
    """Everything that follows from a configuration alone."""
    counts, work = count_parameters(config), flops_per_token(config)
    exact = {"exact": work.training, "6ND": six_n_d(config, 1), "8ND": six_n_d(config, 1, recomputed=True)}
    return {
        "sizes": _sizes(config),
        "rates": rates(config.d_model),
        "tokens_that_suit": TOKENS_PER_WEIGHT * counts.active,
        "parameters": {**asdict(counts), "total": counts.total, "active": counts.active},
        "flops_per_token": {**asdict(work), "forward": work.forward, "backward": work.backward, **exact},
        "training_memory": _training_memory(config, rows, runtime),
        "serving_memory": {
            "weights (bf16)": 2 * counts.total,
            "keys and values of a full context (bf16)": cache_memory(config, 1),
        },
        "tokens": tokens,
        "run": {name: {"flops": each * tokens, "seconds": speed.seconds(each * tokens)} for name, each in exact.items()},
        "speed": {**asdict(speed), "flops": speed.flops},
        "rows": rows,
        "context": config.context,
        "runtime": runtime.name,
    }


def _training_memory(config: DecoderConfig, rows: int, runtime: Runtime) -> dict[str, dict[str, int]]:
    """Of one microbatch, for every optimiser, activations kept or computed again."""
    batch = Microbatch(rows, config.context, runtime.dtype, str(runtime.device))
    found = {}
    for name in names("training.optimizers"):
        kept = getattr(find("training.optimizers", name), "MEMORY", ADAMW)
        for recompute in (False, True):
            memory = training_memory(config, Learning(batch, kept, recompute=recompute))
            found[f"{name}{', recomputed' if recompute else ''}"] = {**asdict(memory), "peak": memory.peak}
    return found


def _show_recipe(console: Console, found: Mapping[str, Any], title: str) -> None:
    table = Table(title=f"{title} on {found['runtime']}")
    for name in ("stage", "weights", "tokens", "FLOPs", "memory", "disk", "time"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    trained = [row for row in found["stages"] if "flops" in row]
    for row in trained:
        most = "" if row["exact"] else "≤ "
        table.add_row(
            row["stage"], written(row["parameters"]), most + written(row["tokens"]), f"{most}{row['flops']:.2e}",
            f"{most}{row['peak_memory'] / GB:.2f} GB", f"{row['disk'] / GB:.2f} GB", most + duration(row["seconds"]),
        )  # fmt: skip
    console.print(table)
    for row in trained:
        if dial := row.get("of_depth"):
            console.print(f"{row['stage']}: {_described(dial, dial)}; about {dial['steps_that_suit']:,} steps are "
                          f"{TOKENS_PER_WEIGHT} tokens a weight")  # fmt: skip
    others = ", ".join(row["stage"] for row in found["stages"] if "flops" not in row)
    total = duration(sum(row["seconds"] for row in trained))
    console.print(f"training in all: {total}, at {_speed(found['speed'])}")
    console.print(f"not counted: {others}; and what Python and PyTorch take themselves, about 0.4 GB")


def _described(sizes: Mapping[str, int], chosen: Mapping[str, Any]) -> str:
    one, rest = chosen["learning_rate"], chosen["adam_learning_rate"]
    learning = f"learning rate {one}" if rest is None else f"learning rates {one} (matrices), {rest} (the rest)"
    return f"{sizes['n_layers']} layers, width {sizes['d_model']}, {sizes['n_heads']} heads of {sizes['head_size']}; {learning}"


def _speed(speed: Mapping[str, Any]) -> str:
    if speed["measured"]:
        return f"{speed['flops'] / 1e12:.3g} TFLOP/s, which this run's finished stages reached"
    many = f"{speed['devices']} x " if speed["devices"] > 1 else ""
    return f"{speed['utilisation']:.0%} of {many}{speed['peak'] / 1e12:.3g} TFLOP/s"


def _show_model(console: Console, found: Mapping[str, Any]) -> None:
    table = Table(title="weights and operations of a token")
    for name in ("part", "weights", "FLOPs"):
        table.add_column(name, justify="left" if name == "part" else "right")
    weights, work = found["parameters"], found["flops_per_token"]
    shared = {"embedding": "", "positions": "", "attention": "projections", "scores": "scores", "feed_forward": "feed_forward",
              "experts": "", "norms": "", "head": "logits"}  # fmt: skip
    for part, operations in shared.items():
        each = work.get(operations, 0) if part != "feed_forward" or not weights["experts"] else 0
        each = work["feed_forward"] if part == "experts" and weights["experts"] else each
        if weights.get(part) or each:
            table.add_row(part.replace("_", " "), written(weights.get(part, 0)), f"{each:.3g}" if each else "")
    table.add_row("in all, forward", written(weights["total"]), f"{work['forward']:.3g}")
    table.add_row("in use, forward and backward", written(weights["active"]), f"{work['exact']:.3g}")
    console.print(table)
    console.print(f"{_described(found['sizes'], found['rates'])}: what depth sets for this width")
    console.print(f"{TOKENS_PER_WEIGHT} tokens a weight: {written(found['tokens_that_suit'])}")
    _show_memory(console, found)
    if found["tokens"]:
        for name, run in found["run"].items():
            title = {"exact": "product by product", "8ND": "8 N D (activations computed again)", "6ND": "6 N D"}[name]
            console.print(f"{written(found['tokens'])} tokens, {title}: {run['flops']:.3e} FLOPs, {duration(run['seconds'])}")
        console.print(f"at {_speed(found['speed'])}")


def _show_memory(console: Console, found: Mapping[str, Any]) -> None:
    table = Table(title=f"memory in GB: {found['rows']} rows of {found['context']} tokens, {found['runtime']}")
    parts = ("weights", "states", "gradients", "activations", "loss", "peak")
    for name in ("training with", *parts):
        table.add_column(name, justify="left" if name == "training with" else "right")
    for name, memory in found["training_memory"].items():
        table.add_row(name, *(f"{memory[part] / GB:.2f}" for part in parts))
    console.print(table)
    console.print("serving: " + ", ".join(f"{name} {size / GB:.3g} GB" for name, size in found["serving_memory"].items()))


def written(number: float) -> str:
    """A number for reading: "3.51 M", "174.6 B", "812"."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.4g} {letter}"
    return f"{number:.4g}"


def duration(seconds: float) -> str:
    """Seconds for reading: "40 s", "12 min", "3.5 h", "34 days"."""
    for size, word in ((2 * 86400, "days"), (2 * 3600, "h"), (2 * 60, "min")):
        if seconds >= size:
            return f"{seconds / {'days': 86400, 'h': 3600, 'min': 60}[word]:.3g} {word}"
    return f"{seconds:.3g} s"
