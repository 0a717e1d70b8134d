"""When the block is compiled, that the choice is remembered, and that a missing compiler is one clear line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from toy_objective import Blocks, Toy

from nestling.core.runtime import detect
from nestling.training import compiling
from nestling.training.compiling import Compiler, repeated_blocks
from nestling.training.loop import train
from nestling.training.settings import TrainSettings


def test_repeated_blocks_are_found_without_knowing_the_architecture() -> None:
    blocks = Blocks()
    assert repeated_blocks({"m": blocks, "plain": nn.Linear(2, 2)}) == list(blocks.blocks)


@pytest.mark.parametrize(("seconds", "steps", "expected"), [(1.0, 1000, 5), (0.01, 1000, 0)])
def test_auto_compiles_only_long_runs_and_remembers(tmp_path: Path, seconds: float, steps: int, expected: int) -> None:
    said: list[str] = []
    record = tmp_path / "compile.json"
    compiler = Compiler("auto", {"m": Blocks()}, record, said.append)
    for step in range(1, 5):
        compiler.after(step, steps, 100.0 if step == 1 else seconds)
    assert compiler._from == expected
    assert len(said) == 1
    assert said[0].startswith("compile: on" if expected else "compile: off")
    assert Compiler("auto", {"m": Blocks()}, record, said.append)._from == expected


def test_the_choice_is_made_and_printed_by_a_run_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = TrainSettings(steps=6, log_every=6)
    assert settings.compile == "auto"
    train(Toy(), settings, folder=tmp_path, runtime=detect("cpu", "fp32"), seed=1)
    printed = capsys.readouterr()
    lines = [line for line in (printed.out + printed.err).splitlines() if "compile: " in line]
    assert len(lines) == 1
    assert "compile: off (about 0 s to go uncompiled; compiling costs up to 25 s)" in lines[0]


def test_without_a_compiler_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "missing_compiler", lambda blocks: "no C++ compiler was found")
    said: list[str] = []
    compiler = Compiler("on", {"m": Blocks()}, tmp_path / "x", said.append)
    compiler.before(1)
    compiler.before(2)
    assert said == ["compile: off, no C++ compiler was found; training goes on uncompiled"]


def test_a_gpu_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    block: Any = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device("cuda"))]))
    for there, said in ((False, "Triton is missing or doesn't know this GPU"), (True, None)):
        monkeypatch.setattr("torch.utils._triton.has_triton", lambda there=there: there)
        assert compiling.missing_compiler([block]) == said


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradient: torch.Tensor) -> torch.Tensor:
        raise BackendCompilerFailed(lambda: None, RuntimeError("gcc: internal error"), None)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_compiler_that_fails_is_one_line_and_plain_calls(monkeypatch: pytest.MonkeyPatch, direction: str) -> None:
    def broken(function: Callable[..., torch.Tensor]) -> object:
        def call(*args: torch.Tensor) -> torch.Tensor:
            if direction == "backward":
                return FailsBackward.apply(function(*args))
            raise BackendCompilerFailed(lambda: None, RuntimeError("gcc: internal error"), None)

        return call

    monkeypatch.setattr(torch, "compile", broken)
    said: list[str] = []
    blocks = Blocks()
    compiling.compile_blocks(list(blocks.blocks), said.append)
    blocks(torch.arange(3)).sum().backward()
    assert len(said) == 1
    assert "going on uncompiled" in said[0]
    assert all(block._compiled_call_impl is None for block in blocks.blocks), "a model asks this"
    assert all(weight.grad is not None for weight in blocks.parameters())


@pytest.mark.slow
def test_compiled_equals_plain(tmp_path: Path) -> None:
    if compiling.missing_compiler([nn.Linear(1, 1)]):
        pytest.skip("no C++ compiler on this machine")
    rows = {}
    for choice in ("on", "off"):
        settings = TrainSettings(steps=5, log_every=1, compile=choice)  # type: ignore[arg-type]
        toy = Toy()
        result = train(toy, settings, folder=tmp_path / choice, runtime=detect("cpu", "fp32"), seed=1, quiet=True)
        rows[choice] = [row["loss"] for row in result.history]
        assert all(block._compiled_call_impl is None for block in toy.model.blocks)
    assert rows["on"] == pytest.approx(rows["off"], rel=1e-4)
