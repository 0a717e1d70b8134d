"""Training in 8 bits, emulated: torchao computes what the units would, in full precision after rounding."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from several import learn, objective, rows_of, together, weights_of
from torch import nn
from torchao.float8 import Float8LinearConfig
from torchao.float8.float8_linear import Float8Linear

from nestling.core.errors import UserError
from nestling.training import float8
from nestling.training.float8 import configuration, round_linears
from nestling.training.hooks import Hook, Run
from nestling.training.parameters import group, hidden_names, named_parameters
from nestling.training.settings import TrainSettings

FITS: dict[str, Any] = {"d_model": 32, "head_size": 16, "d_ff": 64}
CUDA = torch.device("cuda")


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Float8LinearConfig(emulate=True, pad_inner_dim=True)
    monkeypatch.setattr(float8, "configuration", lambda device: settings)


class Looks(Hook):
    """Notes what the layers are while they train, and stops where it is told to."""

    def __init__(self, stop: int = 0) -> None:
        self.stop, self.kinds = stop, {}

    def on_step(self, run: Run) -> None:
        (model,) = run.objective.trainable().values()
        self.kinds = {name: type(part) for name, part in model.named_modules() if isinstance(part, nn.Linear)}
        if run.step == self.stop:
            raise InterruptedError


@pytest.mark.slow
@pytest.mark.usefixtures("emulated")
def test_it_learns_like_bf16_and_leaves_a_plain_model(tmp_path: Path) -> None:
    looks = Looks()
    for precision in ("bf16", "fp8"):
        _, what = learn(tmp_path / precision, (looks,), model=FITS, steps=30, precision=precision)
    blocks = {name: kind for name, kind in looks.kinds.items() if name.startswith("blocks.")}
    assert len(blocks) == 2 * 7
    assert set(blocks.values()) == {Float8Linear}
    assert all(kind is nn.Linear for name, kind in looks.kinds.items() if name not in blocks)
    assert {type(part) for part in what.model.modules() if isinstance(part, nn.Linear)} == {nn.Linear}
    rounded, plain = (weights_of(tmp_path / name) for name in ("fp8", "bf16"))
    assert {k: (v.shape, v.dtype) for k, v in rounded.items()} == {k: (v.shape, v.dtype) for k, v in plain.items()}
    losses, wanted = ([row["loss"] for row in rows_of(tmp_path / name)] for name in ("fp8", "bf16"))
    assert losses == pytest.approx(wanted, rel=0.03)
    assert losses != wanted, "nothing was rounded"
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.usefixtures("emulated")
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    learn(tmp_path / "whole", model=FITS, precision="fp8")
    with pytest.raises(InterruptedError):
        learn(tmp_path / "cut", (Looks(stop=4),), model=FITS, precision="fp8", save_every=0)
    learn(tmp_path / "cut", model=FITS, precision="fp8")
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
    for name, weight in weights_of(tmp_path / "whole").items():
        assert torch.equal(weights_of(tmp_path / "cut")[name], weight)


@pytest.mark.usefixtures("emulated")
def test_weights_and_their_groups_stay_and_choosing_layers_stay_exact() -> None:
    experts = {"count": 4, "per_token": 2, "d_ff": 32}
    modules = objective(**FITS, experts=experts, n_layers=3).trainable()

    def seen() -> tuple[dict[str, int], list[str]]:
        names = {name: id(parameter) for name, parameter in named_parameters(modules).items()}
        return names, list(group(named_parameters(modules), hidden_names(modules)).hidden)

    before = seen()
    undo = round_linears(modules, CUDA)
    kinds = {name.rsplit(".", 1)[-1]: type(part) for name, part in modules["model"].named_modules()}
    assert kinds["query"] is Float8Linear
    assert kinds["router"] is nn.Linear
    assert seen() == before
    undo()
    assert seen() == before


@pytest.mark.usefixtures("emulated")
def test_a_model_of_odd_sizes_is_refused() -> None:
    with pytest.raises(UserError, match=r"^training.precision: no linear layer .* multiples of 16 .*'fp8'\); use bf16$"):
        round_linears(objective().trainable(), CUDA)


def test_what_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^training.precision: fp8 needs a GPU .* 8\.9 or more \(got 'fp8'\); use bf16$"):
        learn(tmp_path, model=FITS, precision="fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(UserError, match=r"8\.9 or more"):
        configuration(CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert not configuration(CUDA).emulate
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UserError, match=r"fp8 needs torchao .*nestling\[fp8\]"):
        configuration(CUDA)


def test_it_is_a_setting() -> None:
    assert TrainSettings(steps=1, precision="fp8").precision == "fp8"


def _divided(folder: Path) -> None:
    learn(folder, model=FITS, precision="fp8", parallel={"tensor": 2})


@pytest.mark.usefixtures("emulated")
def test_with_layers_shared_among_processes_it_is_the_two_settings_that_are_named(tmp_path: Path) -> None:
    import nestling.training.parallel  # noqa: F401

    message = r"training\.precision: fp8 layers can't be divided .* training\.parallel\.tensor is 2 .*training\.parallel\.tensor=1"
    with pytest.raises(Exception, match=message):
        together(2, _divided, tmp_path)
