"""Before a run and before a stage's first step: what is said, what is refused, and that the advice is true.

The limits are real: a process of its own may take little more memory (ulimit), and trains with that.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nestling.core import pipeline
from nestling.core.errors import UserError
from nestling.core.machine import held_memory
from nestling.core.metrics import read_metrics
from nestling.core.recipe import load_recipe
from nestling.core.runtime import detect
from nestling.core.storage import read_json, write_json
from nestling.stages._preflight import announce, disk_of, memory_of, planned

TINY = Path(__file__).with_name("tiny.yaml")
LARGE = (
    "pretrain.model={d_model: 128, n_layers: 8, n_heads: 4}",
    "pretrain.context=256",
    "pretrain.batch_rows=8",
    "pretrain.training.steps=2",
    "pretrain.training.validate_every=0",
    "pretrain.training.optimizer=adamw",
    "pretrain.objective.validation_batches=1",
    "pretrain.samples=[]",
)
@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to the tokens."""
    out = tmp_path_factory.mktemp("data") / "run"
    pipeline.run(load_recipe(TINY, LARGE), out, detect("cpu", "fp32", 1), "ngram", quiet=True)
    return out


CONFINED = """
import resource, sys
from pathlib import Path
import torch._dynamo
import nestling.objectives.next_token, nestling.stages.pretrain, nestling.training.loop
from nestling.core import pipeline
from nestling.core.errors import UserError
from nestling.core.machine import proc_numbers
from nestling.core.recipe import load_recipe
from nestling.core.runtime import detect
from nestling.model.config import DecoderConfig
from nestling.planning.activations import Microbatch, activations
room, recipe, out, said, *settings = sys.argv[1:]
activations(DecoderConfig(d_model=16, n_heads=2), Microbatch(rows=1, width=8))  # what a rehearsal imports and starts stays
held = proc_numbers(Path("/proc/self/status"))["VmData"] + int(room)
resource.setrlimit(resource.RLIMIT_DATA, (held, held))
try:
    pipeline.run(load_recipe(Path(recipe), settings), Path(out), detect("cpu", "fp32", 1), "pretrain", quiet=True)
    Path(said).write_text("")
except (UserError, RuntimeError) as error:
    Path(said).write_text(str(error))
"""


def within(room: float, out: Path, *settings: str) -> str:
    """Pre-train in a process of its own that may take so many MB more; what it was refused with, or nothing.

    Not in a fork: the heap of the test's own process may hold freed memory that no limit counts.
    """
    said = out.parent / "said"
    words = [str(int(room * 1e6)), str(TINY), str(out), str(said), *LARGE, *settings]
    subprocess.run([sys.executable, "-c", CONFINED, *words], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return said.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process are read from /proc")
def test_what_does_not_fit_is_refused_before_the_first_step_and_the_advice_helps(data: Path) -> None:
    refused = within(150, data)
    found = re.fullmatch(
        r"pretrain: a step takes about ([\d.]+) GB more memory \(weights .*activations .*\), and ([\d.]+) GB of [\d.]+ GB that "
        r"RLIMIT_DATA allows is free; set objective\.microbatches=(\d+) \(([\d.]+) GB\) or training\.recompute=blocks "
        r"\(([\d.]+) GB\); training\.ignore_memory=true starts all the same",
        refused,
    )
    assert found, refused
    assert float(found[1]) > float(found[2]) >= max(float(found[4]), float(found[5]))
    assert not (data / "pretrain" / "metrics.jsonl").exists(), "not a step was taken"
    assert (data / "ngram" / "stage.json").exists(), "nothing was lost"
    assert "allocate memory" in within(150, data, "pretrain.training.ignore_memory=true")
    assert within(150, data, "pretrain.training.recompute=blocks") == ""
    report = read_json(data / "pretrain" / "stage.json")["report"]
    assert report["steps"] == 2
    assert report["peak_memory_gb"] < report["predicted_memory_gb"] * 1.15


def test_both_peaks_stand_in_the_rows_and_in_the_report(data: Path, tmp_path: Path) -> None:
    settings = ["pretrain.training.steps=2", "pretrain.samples=[]"]
    before = held_memory(torch.device("cpu"))
    pipeline.run(load_recipe(TINY, settings), tmp_path, detect("cpu", "fp32", 1), "pretrain", quiet=True)
    last = read_metrics(tmp_path / "pretrain" / "metrics.jsonl")[-1]
    report = read_json(tmp_path / "pretrain" / "stage.json")["report"]
    assert report["peak_memory_gb"] == round(last["peak_memory"] / 1e9, 3)
    assert report["predicted_memory_gb"] == pytest.approx(report["peak_memory_gb"], rel=0.15)
    assert held_memory(torch.device("cpu")) / 2 < last["peak_memory"] < before + 1e9, "of the stage, not of all before it"


def test_a_plan_knows_every_model_before_there_is_one(tmp_path: Path) -> None:
    ahead = planned(pipeline.plan(load_recipe(TINY), tmp_path), tmp_path)
    work = {one.stage.spec.name: one.work for one in ahead}
    trained = {name for name, found in work.items() if found}
    assert trained == {"pretrain", "sft", "reward", "ppo"}
    pretrain, sft, ppo = work["pretrain"], work["sft"], work["ppo"]
    assert pretrain is not None
    assert sft is not None
    assert ppo is not None
    assert pretrain.models[0].vocab_size == 512
    assert sft.models[0].vocab_size == 512 + 7
    assert (pretrain.tokens, pretrain.rows) == (8 * 4 * 384, 4)
    assert len(ppo.models) == 2
    runtime = detect("cpu", "fp32")
    sizes = {one.stage.spec.name: (memory_of(one, runtime).peak, disk_of(one, runtime)) for one in ahead if one.work}
    assert all(memory > 0 and disk > 0 for memory, disk in sizes.values())


def test_a_run_is_announced_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    announce(pipeline.plan(load_recipe(TINY), tmp_path), tmp_path, detect("cpu", "fp32", 1))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("[machine] cpu, float32, 1 threads · ")
    assert re.search(r"takes the most memory, (about|at most) [\d.]+ GB of [\d.]+ GB free · checkpoints [\d.]+ GB of \d+ GB", line)
    assert "min of training" not in line  # nothing of this run was timed
    assert re.search(r"about \d+ s of training, \w+ [\d,]+ tokens/s at 40% of the peak measured", line)


def test_the_expected_speed_is_the_one_that_finished_stages_had(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runtime, settings = detect("cpu", "fp32", 1), ["pretrain.samples=[]", "sft.training.steps=6000"]
    report = pipeline.run(load_recipe(TINY, settings), tmp_path, runtime, "pretrain", quiet=True)["pretrain"]
    capsys.readouterr()
    stages = pipeline.plan(load_recipe(TINY, settings), tmp_path, "sft")
    announce(stages, tmp_path, runtime)
    found = re.search(r"about (\d+) min of training, sft ([\d,]+) tokens/s\n", capsys.readouterr().err)
    assert found
    work = {one.stage.spec.name: one.work for one in planned(stages, tmp_path)}
    flops, tokens = (work["pretrain"].flops() / report["training_seconds"], work["sft"].tokens)  # type: ignore[union-attr]
    assert float(found[2].replace(",", "")) == pytest.approx(tokens * flops / work["sft"].flops(), abs=1)  # type: ignore[union-attr]
    assert int(found[1]) == pytest.approx(tokens / float(found[2].replace(",", "")) / 60, abs=1)
    announce(pipeline.plan(load_recipe(TINY, [*settings, "pretrain.training.steps=9"]), tmp_path, "sft"), tmp_path, runtime)
    assert "peak measured" in capsys.readouterr().err, "the time of another number of steps tells nothing"


def test_fp8_is_refused_before_the_first_stage_and_not_for_a_stage_that_is_done(tmp_path: Path) -> None:
    recipe = load_recipe(TINY, ["sft.training.precision=fp8"])
    with pytest.raises(UserError, match=r"^sft\.training\.precision: fp8 needs a GPU .*; use bf16$"):
        pipeline.run(recipe, tmp_path, detect("cpu", "fp32", 1), quiet=True)
    assert not list(tmp_path.rglob("*.jsonl")), "nothing was computed"
    sft = pipeline.plan(recipe, tmp_path)[6]
    assert sft.spec.name == "sft"
    write_json(tmp_path / "sft" / "stage.json", {"key": sft.key, "report": {}, "seconds": 1.0})
    pipeline.run(recipe, tmp_path, detect("cpu", "fp32", 1), "corpus", quiet=True)
    pipeline._check(pipeline.plan(recipe, tmp_path), tmp_path, detect("cpu", "fp32", 1))


def test_finished_stages_tell_the_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["pretrain.training.steps=2", "pretrain.samples=[]", "sft.training.steps=6000"]
    runtime = detect("cpu", "fp32", 1)
    recipe: Any = load_recipe(TINY, settings)
    pipeline.run(recipe, tmp_path, runtime, "pretrain", quiet=True)
    announce(pipeline.plan(recipe, tmp_path), tmp_path, runtime)
    found = re.search(r"about (\d+) min of training", capsys.readouterr().err)
    assert found
    assert int(found[1]) > 0
