"""Adapters in the loop: several processes learn what one learns, also with frozen weights cut up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from several import assert_same, learn, objective, rows_of, together, weights_of

from nestling.model.adapters import Adaptation, AdapterSettings, adapt, trained
from nestling.objectives.next_token import NextToken

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "data 2": (2, {}),
    "full 2": (2, {"shard": "full"}),
    "full 4": (4, {"shard": "full"}),
}


def adapted() -> NextToken:
    """The small decoder with adapters that do something already, and two rows of the embedding that learn."""
    what = objective()
    adapt(what.model, Adaptation(AdapterSettings(rank=3, alpha=6.0), Path("base")), torch.Generator().manual_seed(1), (2, 5))
    for name, value in trained(what.model).items():
        if name.endswith("lora_b"):
            value.data.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(2))
    return what


def _learn(folder: Path, parallel: dict[str, Any]) -> None:
    learn(folder, what=adapted(), parallel=parallel)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("alone")
    _learn(folder, {})
    return folder


def test_only_what_is_trained_moves(alone: Path) -> None:
    before, after = adapted().model, weights_of(alone)
    learns = set(trained(before))
    assert {name for name, value in before.state_dict().items() if not torch.equal(value, after[name])} == learns
    losses = [row["loss"] for row in rows_of(alone)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_processes_learn_what_one_learns(alone: Path, tmp_path: Path, layout: str) -> None:
    import nestling.training.parallel  # noqa: F401 - once, before the processes part: it takes seconds

    world, parallel = LAYOUTS[layout]
    together(world, _learn, tmp_path, parallel)
    assert_same(tmp_path, alone)


def test_adapted_layers_are_not_divided(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="adapters can't be divided"):
        together(2, _learn, tmp_path, {"tensor": 2})
