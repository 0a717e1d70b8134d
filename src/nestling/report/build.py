"""Builds the report of a run: `report.json`, final figures under stable keys, and `report.html`, the page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nestling import __version__
from nestling.core.storage import write_json, write_text
from nestling.report.checks import curve_of, find_wrongs
from nestling.report.page import Contents, render
from nestling.report.records import Row, Run, StageRecord, read_run
from nestling.report.table import capability_table
from nestling.training.health import summary

FORMAT = 1  # raised when a key changes its meaning or goes
KEPT_OF_A_CAPABILITY = ("value", "n", "bar", "higher_is_better", "interval")


def build_report(run_folder: Path) -> dict[str, Any]:
    """Write `report.json` and `report.html` into a run folder, each atomically; returns what the JSON holds.

    Stages that the recipe lacks are left out; a stage that was not completed is listed with `finished` null.

    >>> build_report(Path("runs/demo"))["stages"]["pretrain"]["val_bpb"]       # doctest: +SKIP
    0.81

    Raises:
        UserError: the folder holds no run, or can't be written.
    """
    run = read_run(run_folder)
    report = figures(run)
    table = capability_table(report)
    answers = _answers(run)
    findings = find_wrongs(run, table, answers)
    for row in table:
        if row.key in report["capabilities"]:
            report["capabilities"][row.key]["met"] = row.met
    report["looks_wrong"] = [{"weight": f.weight, "where": f.where, "text": f.text} for f in findings]
    page = render(Contents(run, report, table, findings, answers))
    write_json(run_folder / "report.json", report)
    write_text(run_folder / "report.html", page)
    return report


def figures(run: Run) -> dict[str, Any]:
    """What `report.json` holds, before it is judged: `{"name", "stages": {…}, "capabilities": {…}, …}`."""
    capabilities: dict[str, Any] = {}
    for stage in run.of_kind("evaluate"):
        for name, entry in (stage.report.get("capabilities") or {}).items():
            capabilities[name] = {key: entry[key] for key in KEPT_OF_A_CAPABILITY if key in entry}
    return _plain(
        {
            "format": FORMAT,
            "nestling": __version__,
            "name": run.name,
            "description": run.description,
            "seed": run.seed,
            "finished": run.finished,
            "seconds": round(run.seconds, 2),
            "synthetic_world": run.synthetic,
            "stages": {stage.name: _stage(stage) for stage in run.stages},
            "capabilities": capabilities,
            "answers": _answers(run),
        }
    )


def _stage(stage: StageRecord) -> dict[str, Any]:
    """A stage's own report beside what the pipeline knows of it; capabilities and answers have their own place.

    `{"value": 0.66, "n": 200, "interval": […]}` under `win_rate_vs_sft` becomes that number under that key, with
    `win_rate_vs_sft_n` and `win_rate_vs_sft_interval` beside it.
    """
    own: dict[str, Any] = {}
    for key, value in stage.report.items():
        if isinstance(value, Mapping) and "value" in value:  # a measured figure: the key itself is the number
            own[key] = value["value"]
            own |= {f"{key}_{part}": inner for part, inner in value.items() if part != "value"}
        elif key not in ("capabilities", "answers"):
            own[key] = value
    if bars := stage.settings.get("bars"):
        own.setdefault("bars", bars)
    model, ngram = stage.figure("val_bpb"), stage.figure("ngram_bpb")
    if model is not None and ngram:
        own.setdefault("bpb_against_ngram", model / ngram)
    if stage.rows and (verdict := summary(curve_of(stage))):
        own["verdict"] = verdict
    known = {"stage": stage.kind, "key": stage.key, "finished": stage.finished, "seconds": stage.seconds}
    return {**known, **own}


def _answers(run: Run) -> list[Row]:
    return [row for stage in run.of_kind("evaluate") for row in stage.report.get("answers") or ()]


def _plain(value: Any) -> Any:
    """JSON values only: mappings and lists rebuilt, a number that is not finite as null, anything else as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
