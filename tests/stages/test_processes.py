"""Reward model and PPO as stages under two processes: the same weights and figures as under one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from several import together

import nestling.training.parallel  # noqa: F401 - once, before the processes part: it takes seconds
from nestling.core import pipeline
from nestling.core.recipe import load_recipe
from nestling.core.registry import find, names
from nestling.core.runtime import detect
from nestling.core.storage import read_json
from nestling.stages._training import TrainingStage

RECIPE = Path(__file__).with_name("tiny.yaml")
TIMING = {"training_seconds", "tokens_per_second", "utilisation", "peak_memory_gb", "predicted_memory_gb"}


def run(out: Path, until: str, *settings: str) -> None:
    pipeline.run(load_recipe(RECIPE, settings), out, detect("cpu", "fp32", 1), until=until, quiet=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """From one SFT model on, by one process and by two."""
    alone = tmp_path_factory.mktemp("processes") / "alone"
    run(alone, "rankings")
    together_ = alone.with_name("together")
    shutil.copytree(alone, together_)
    run(alone, "ppo")
    together(2, run, together_, "ppo")
    return alone, together_


def report(run: Path, stage: str) -> dict[str, Any]:
    found = read_json(run / stage / "stage.json")["report"]
    return {name: value for name, value in found.items() if name not in TIMING and isinstance(value, int | float)}


@pytest.mark.parametrize("stage", ["reward", "ppo"])
def test_two_processes_end_where_one_ends(runs: tuple[Path, Path], stage: str) -> None:
    one, two = (load_file(run / stage / "model" / "model.safetensors") for run in runs)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert report(runs[1], stage) == pytest.approx(report(runs[0], stage), rel=1e-4, abs=1e-5)


UNEVEN = r"parallel: this objective calls its models unevenly; use shard: none and tensor: 1"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["reward.training.parallel.shard=full"], rf"reward\.training\.{UNEVEN}"),
        (["ppo.training.parallel.tensor=2"], rf"ppo\.training\.{UNEVEN}"),
        (["ppo.stage=align", "ppo.objective=ppo", "ppo.settings={}", "ppo.training.parallel.shard=full"], UNEVEN),
        (["sft.training.parallel.tensor=3"], r"sft\.training\.parallel\.tensor: must divide the 2 processes \(got 3\)"),
        (["sft.training.parallel.shard=full", "sft.training.precision=fp16"], r"sft.training.precision: fp16 can't be shar"),
    ],
)
def test_a_layout_that_a_stage_cant_do_is_refused_before_the_first_stage(
    tmp_path: Path, settings: list[str], message: str
) -> None:
    with pytest.raises(Exception, match=message):
        together(2, run, tmp_path / "run", "ppo", *settings)
    assert not list(tmp_path.rglob("*.jsonl")), "nothing was computed"


def test_every_stage_knows_whether_its_objective_is_regular() -> None:
    known = {name: find("stages", name).Settings for name in names("stages")}
    trains = {name: settings.regular for name, settings in known.items() if issubclass(settings, TrainingStage)}
    even = {"pretrain", "sft"}
    assert trains == {name: name in even for name in (*even, "reward", "ppo", "align", "moderation")}
