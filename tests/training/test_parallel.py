"""Several processes learn what one learns: same losses, norms and weights, however the work is shared and resumed."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from several import assert_same, learn, objective, rows_of, together, weights_of

from nestling.core import ranks
from nestling.core.errors import Interrupted, UserError
from nestling.training.hooks import Hook, Run, Sampling

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "data 2": (2, {}),
    "data 4": (4, {}),
    "full 2": (2, {"shard": "full"}),
    "full 4": (4, {"shard": "full"}),
    "hybrid 4": (4, {"shard": "hybrid", "shard_size": 2}),
    "tensor 2": (2, {"tensor": 2}),
    "tensor 2 x data 2": (4, {"tensor": 2}),
    "tensor 2 x full 2": (4, {"tensor": 2, "shard": "full"}),
}
GPT2 = {"architecture": "gpt2", "norm": "layer", "bias": True, "qkv_bias": True, "gated": False, "activation": "gelu_tanh",
        "positions": "learned", "tied": False, "qk_norm": False, "n_kv_heads": 4}  # fmt: skip


def work(folder: Path, layout: str, **given: Any) -> None:
    """Train in this layout, in as many processes."""
    import nestling.training.parallel  # noqa: F401 - once, before the processes part: it takes seconds

    folder.mkdir(parents=True, exist_ok=True)
    world, parallel = LAYOUTS[layout]
    if world == 1:
        _learn(folder, parallel, given)
    else:
        together(world, _learn, folder, parallel, given)


def _learn(folder: Path, parallel: dict[str, Any], given: dict[str, Any]) -> None:
    try:
        learn(folder, parallel=parallel, **given)
    except Interrupted:
        (folder / f"interrupted-{ranks.rank()}").touch()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process learns with Muon in one piece."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("alone")
    work(folder, "one")
    return folder


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_muon_learns_the_same_in_every_layout(tmp_path: Path, alone: Path, layout: str) -> None:
    work(tmp_path, layout, microbatches=2 if layout.endswith("2") else 1)
    assert_same(tmp_path, alone)


def test_processes_need_not_share_the_order_of_their_sets(
    tmp_path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    together(2, _learn, tmp_path, LAYOUTS["tensor 2"][1], {}, method="spawn")
    assert_same(tmp_path, alone)


def test_one_times_four_two_times_two_and_accumulation_agree(tmp_path: Path, alone: Path) -> None:
    for layout, pieces in (("one", 4), ("data 2", 2), ("data 4", 1)):
        work(tmp_path / layout, layout, microbatches=pieces)
        assert_same(tmp_path / layout, alone)


@pytest.mark.parametrize("layout", ["full 4", "tensor 2 x full 2"])
@pytest.mark.parametrize("model", [{}, GPT2], ids=["qwen3", "gpt2"])
def test_adamw_and_clipping_on_other_models(tmp_path: Path, layout: str, model: dict[str, Any]) -> None:
    given = {"optimizer": "adamw", "learning_rate": 0.003, "epsilon": 1e-4, "clip": 0.1, "model": model}
    work(tmp_path / "alone", "one", **given)
    work(tmp_path / "shared", layout, **given)
    assert_same(tmp_path / "shared", tmp_path / "alone")


def test_bf16_follows_one_process(tmp_path: Path) -> None:
    for layout in ("one", "full 2", "data 2", "tensor 2"):
        work(tmp_path / layout, layout, dtype="bf16", model={"head_size": 16})  # which native attention serves
    wanted = [row["loss"] for row in rows_of(tmp_path / "one")]
    for layout in ("full 2", "data 2", "tensor 2"):
        assert [row["loss"] for row in rows_of(tmp_path / layout)] == pytest.approx(wanted, rel=1e-2)
        assert all(tensor.dtype == torch.float32 for tensor in weights_of(tmp_path / layout).values())


class StopAt(Hook):
    """Sends SIGTERM, or worse, to one process in a step."""

    def __init__(self, step: int, rank: int, number: int = signal.SIGTERM) -> None:
        self.step, self.rank, self.number = step, rank, number

    def on_step(self, run: Run) -> None:
        if run.step == self.step and ranks.rank() == self.rank:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    ("before", "after"),
    [("full 4", "one"), ("full 4", "full 2"), ("full 2", "full 4"), ("tensor 2 x full 2", "data 2"),
     ("one", "tensor 2 x full 2"), ("hybrid 4", "full 2"), ("data 2", "tensor 2")],
)  # fmt: skip
def test_a_state_goes_on_in_another_layout(tmp_path: Path, alone: Path, before: str, after: str) -> None:
    work(tmp_path, before, hooks=(StopAt(2, rank=LAYOUTS[before][0] - 1),))
    stopped = len(list(tmp_path.glob("interrupted-*")))
    assert stopped == LAYOUTS[before][0], "one process got the signal, and all stop after the same step"
    assert len(rows_of(tmp_path)) in (2, 3)
    work(tmp_path, after)
    assert_same(tmp_path, alone)


@pytest.mark.parametrize("layout", ["data 2", "full 2"])
def test_a_killed_process_ends_the_run_and_a_restart_goes_on_bitwise(tmp_path: Path, layout: str) -> None:
    dropout = {"model": {"dropout": 0.1}, "save_every": 0}
    work(tmp_path / "whole", layout, **dropout)
    with pytest.raises(Exception, match=r"SIGKILL|another process of this run ended"):
        work(tmp_path / "killed", layout, hooks=(StopAt(4, rank=1, number=signal.SIGKILL),), **dropout)
    assert not (tmp_path / "killed" / "weights.pt").exists()
    work(tmp_path / "killed", layout, **dropout)
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")
    wanted = weights_of(tmp_path / "whole")
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in weights_of(tmp_path / "killed").items())


def _loses_a_peer(folder: Path) -> None:
    if ranks.rank() == 1:
        os._exit(0)
    try:
        with ranks.answering():
            ranks.gather("there?")
    except UserError as error:
        (folder / "said").write_text(str(error))


def test_who_is_left_says_what_happened(tmp_path: Path) -> None:
    together(2, _loses_a_peer, tmp_path)
    assert re.search(r"another process of this run ended.*run the same command again", (tmp_path / "said").read_text())


def _samples(folder: Path, parallel: dict[str, Any]) -> None:
    what = objective()
    kind = type(what.model)
    ids = torch.arange(8).unsqueeze(0)

    def sample(step: int) -> None:
        assert type(what.model) is kind
        (folder / f"sample-{step}-{ranks.rank()}").touch()
        assert what.model(ids).shape == (1, 8, 24)

    learn(folder, hooks=(Sampling(2, sample),), parallel=parallel, what=what)
    assert type(what.model) is kind
    assert all(type(p) is torch.nn.Parameter and p.numel() for p in what.model.parameters())
    what.model(ids)


@pytest.mark.parametrize("layout", ["data 2", "full 2", "tensor 2"])
def test_the_main_process_samples_from_whole_weights(tmp_path: Path, layout: str) -> None:
    import nestling.training.parallel  # noqa: F401

    together(*LAYOUTS[layout][:1], _samples, tmp_path, LAYOUTS[layout][1])
    assert sorted(path.name for path in tmp_path.glob("sample-*")) == ["sample-2-0", "sample-4-0", "sample-6-0"]


@pytest.mark.parametrize(
    ("parallel", "message"),
    [({"tensor": 3}, r"tensor: must divide the 2 processes"), ({"data": 3}, r"data: data x tensor is not 2"),
     ({"shard": "hybrid", "shard_size": 3}, r"shard_size: must divide the 2")],
)  # fmt: skip
def test_a_layout_that_does_not_fit_is_refused(tmp_path: Path, parallel: dict[str, Any], message: str) -> None:
    import nestling.training.parallel  # noqa: F401

    with pytest.raises(Exception, match=message):
        together(2, _learn, tmp_path, parallel, {})
