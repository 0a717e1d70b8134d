"""Recomputing blocks changes what is remembered, and no number."""

from __future__ import annotations

from pathlib import Path

import torch
from several import learn, objective, rows_of

from nestling.training.recompute import recompute_blocks


def test_the_same_numbers_bit_for_bit_with_dropout(tmp_path: Path) -> None:
    for choice in ("none", "blocks"):
        _, what = learn(tmp_path / choice, model={"dropout": 0.1}, recompute=choice)
        assert all("forward" not in vars(block) for block in what.model.blocks)
    assert rows_of(tmp_path / "blocks") == rows_of(tmp_path / "none")


def test_much_less_is_remembered() -> None:
    def remembered() -> int:
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            kept.append(tensor)
            return tensor

        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            what.terms(next(iter(what.updates(1))).microbatches[0])
        return sum(sizes.values())

    what = objective(n_layers=6)
    what.model.train()
    plain = remembered()
    undo = recompute_blocks(what.trainable())
    less = remembered()
    undo()
    assert less < plain / 2
    assert remembered() == plain
