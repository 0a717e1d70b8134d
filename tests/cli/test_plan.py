"""`nestling plan` and `nestling doctor`: what they print, as tables and as JSON, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import TINY, CommandLine

from nestling.cli.doctor import _compiler, warnings
from nestling.training.compiling import missing_compiler

GPT3 = "{architecture: gpt2, vocab_size: 50257, context: 2048, d_model: 12288, n_layers: 96, n_heads: 96}"
CLUSTER = ("--tokens", 300e9, "--devices", 1024, "--peak", 312e12, "--utilisation", 0.449, "--rows", 1)


def test_a_recipe_is_planned_without_anything_being_written(nestling: CommandLine, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = nestling("plan", TINY, "--out", out, "--dtype", "fp32", "--threads", 1, "--peak", 1e11, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    rows = {row["stage"]: row for row in found["stages"] if "flops" in row}
    assert list(rows) == ["pretrain", "sft", "reward", "ppo"]
    assert rows["pretrain"]["tokens"] == 8 * 4 * 384
    assert rows["pretrain"]["seconds"] == pytest.approx(rows["pretrain"]["flops"] / (0.4 * 1e11))
    assert rows["pretrain"]["peak_memory"] > rows["pretrain"]["memory"]["activations"] > 0
    assert not out.exists()
    table = nestling("plan", TINY, "--out", out, "--dtype", "fp32", "--threads", 1, "--peak", 1e11).out
    assert "pretrain" in table
    assert "training in all" in table
    assert "not counted: corpus, tokenizer" in table


def test_finished_stages_tell_a_plan_its_speed(nestling: CommandLine, finished: Path) -> None:
    found = json.loads(nestling("plan", TINY, "--out", finished, "--dtype", "fp32", "--threads", 1, "--json").out)
    report = json.loads((finished / "pretrain" / "stage.json").read_text())["report"]
    (pretrain,) = [row for row in found["stages"] if row["stage"] == "pretrain"]
    assert pretrain["parameters"] == report["parameters"], "the plan's count is the trained model's"
    assert found["speed"]["measured"]
    assert found["speed"]["flops"] >= pretrain["flops"] / report["training_seconds"] * 0.999


def test_a_model_is_planned_from_its_sizes_alone(nestling: CommandLine) -> None:
    done = nestling("plan", "--model", GPT3, *CLUSTER, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["parameters"]["total"] == 174_604_259_328
    assert found["run"]["6ND"]["flops"] == pytest.approx(3.14e23, rel=0.002)
    assert found["run"]["8ND"]["seconds"] / 86400 == pytest.approx(34, abs=0.5)
    assert found["serving_memory"]["keys and values of a full context (bf16)"] == 4 * 2048 * 96 * 12288
    said = nestling("plan", "--model", GPT3, *CLUSTER).out
    assert "8 N D (activations computed again): 4.191e+23 FLOPs, 33.8 days" in said
    assert "6 N D: 3.143e+23 FLOPs, 25.4 days" in said


def test_a_trained_model_can_be_planned(nestling: CommandLine, finished: Path) -> None:
    found = json.loads(nestling("plan", "--model", finished / "pretrain", "--peak", 1e11, "--json").out)
    report = json.loads((finished / "pretrain" / "stage.json").read_text())["report"]
    assert found["parameters"]["total"] == report["parameters"]


def test_what_is_no_model_is_refused(nestling: CommandLine) -> None:
    assert "neither a folder nor a model's sizes (got 'nonsense')" in nestling.refused("plan", "--model", "nonsense")
    assert "--model.d_modle: unknown setting; did you mean 'd_model'?" in nestling.refused("plan", "--model", "{d_modle: 3}")


def test_doctor_says_what_the_machine_offers(nestling: CommandLine, tmp_path: Path) -> None:
    done = nestling("doctor", "--folder", tmp_path / "runs", "--threads", 1, "--json")
    assert done.code == 0, done.err
    facts: dict[str, Any] = json.loads(done.out)
    assert facts["processor"]["threads"] == 1
    assert 0 < facts["processor"]["usable cores"] <= facts["processor"]["cores"]
    assert facts["computing"]["flops"]["fp32"] > 1e8
    assert facts["memory"]["free"] > 0
    assert facts["disk"]["sync_ms"] > 0
    assert facts["sandbox"].keys() >= {"network"}
    assert facts["warnings"] == warnings(facts)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
    table = nestling("doctor", "--folder", tmp_path, "--threads", 1).out
    assert "matrix products" in table
    assert "TFLOP/s, measured" in table


GOOD: dict[str, Any] = {
    "software": {"cuda of torch": None},
    "processor": {"usable cores": 8, "cores": 8, "threads": 8, "load": 0.1},
    "computing": {"device": "cpu", "auto": "bfloat16", "flops": {"fp32": 1e11, "bf16": 9e11}},
    "memory": {"free": 3e10, "limit": ""},
    "disk": {"folder": "/runs", "free": 3e11, "total": 1e12, "writable": True, "sync_ms": 1.0, "spinning": False},
    "compiler": "found",
    "extras": {},
    "sandbox": {"network": "seccomp"},
}
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("processor", {"load": 7.0}, "other work is running (load 7.0 on 8 cores)"),
    ("processor", {"usable cores": 2.0}, "8 threads share 2 cores: set --threads 2"),
    ("processor", {"usable cores": 1, "threads": 1}, "1 core: expect hours"),
    ("computing", {"auto": "float32"}, "no fast bf16"),
    ("computing", {"flops": {"fp32": 1e11, "bf16": 5e10}}, "bf16 is slower than fp32 here"),
    ("memory", {"free": 1e9}, "1.0 GB of memory is free"),
    ("disk", {"free": 1e9}, "1.0 GB of disk is free"),
    ("disk", {"writable": False}, "/runs can't be written"),
    ("disk", {"sync_ms": 300.0}, "the disk takes 300 ms"),
    ("disk", {"sync_ms": 30.0, "spinning": True}, "the disk takes 30 ms"),
    ("sandbox", {"network": None}, "nothing keeps it from: network"),
]


def test_nothing_stands_in_the_way_of_a_good_machine() -> None:
    assert warnings(GOOD) == []


@pytest.mark.parametrize(("part", "change", "said"), BAD, ids=[said for _, _, said in BAD])
def test_what_will_hurt_is_said(part: str, change: dict[str, Any], said: str) -> None:
    (line,) = warnings({**GOOD, part: {**GOOD[part], **change}})
    assert line.startswith(said) or said in line


def test_doctor_finds_the_compiler_that_inductor_finds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert _compiler() == (missing_compiler([torch.nn.Linear(1, 1)]) or "found")
    monkeypatch.setenv("CXX", str(tmp_path / "absent"))
    assert _compiler() == "no C++ compiler was found (install g++ or clang)"


def test_a_missing_compiler_is_said() -> None:
    (line,) = warnings({**GOOD, "compiler": "no C++ compiler was found (install g++ or clang)"})
    assert "install g++ or clang" in line


def test_a_plan_says_what_a_depth_sets(nestling: CommandLine, tmp_path: Path) -> None:
    dial = ("--set", "pretrain.model={depth: 2}", "--out", tmp_path, "--peak", 1e11)
    (row, *_) = [row for row in json.loads(nestling("plan", TINY, *dial, "--json").out)["stages"] if "of_depth" in row]
    assert row["of_depth"].items() >= {"d_model": 128, "n_layers": 2, "n_heads": 2, "head_size": 64}.items()
    said = " ".join(nestling("plan", TINY, *dial).out.split())
    assert "pretrain: 2 layers, width 128, 2 heads of 64; learning rates" in said
    assert "width 384, 6 heads of 64" in " ".join(nestling("plan", "--model", "{depth: 6}", "--peak", 1e11).out.split())
