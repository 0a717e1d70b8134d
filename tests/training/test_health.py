"""Faults are planted into small runs, and each is named while the run goes on; a healthy run hears nothing but a verdict."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from several import LAYOUTS_OF_TWO, learn, objective, together
from torch import Tensor

import nestling.training.parallel  # noqa: F401 - once, before processes part: it takes seconds
from nestling.core import ranks
from nestling.core.runtime import detect, torch_stream
from nestling.loading.batches import TokenBatch
from nestling.loading.repeats import Counted, copies
from nestling.loading.shards import Shards, write_shards
from nestling.objectives import next_token
from nestling.objectives.next_token import NextToken
from nestling.tokenizer.bpe import Tokenizer
from nestling.training import health
from nestling.training.contract import Term
from nestling.training.health import Curve, Expected, Watching, band_of, summary, symptoms, without_gradient
from nestling.training.hooks import Hook, Run
from nestling.training.loop import train
from nestling.training.settings import TrainSettings

WORDS = 24
GUESSING = Expected(chance=math.log(WORDS), unigram=math.log(WORDS) - 0.1, ngram=0.8 * math.log(WORDS))
PLAIN: dict[str, Any] = {
    "steps": 160, "optimizer": "adamw", "learning_rate": 0.01, "log_every": 1, "compile": "off", "save_every": 1e9,
}  # fmt: skip


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the person watching is told."""
    lines: list[str] = []
    monkeypatch.setattr(health, "say", lines.append)
    return lines


def watch(what: NextToken, folder: Path, expected: Expected = GUESSING, **changes: Any) -> list[dict[str, Any]]:
    settings = TrainSettings(**{**PLAIN, **changes})
    return train(
        what, settings, folder=folder, runtime=detect("cpu", "fp32"), seed=1, hooks=[Watching(expected)], quiet=True
    ).history


class Changed:
    """The toy's rows after a change."""

    def __init__(self, change: Callable[[TokenBatch, int], TokenBatch]) -> None:
        self.rows, self.change = next_token.toy(1).batches, change

    def batch(self, step: int) -> TokenBatch:
        return self.change(self.rows.batch(step), step)

    def validation(self) -> Iterator[TokenBatch]:
        return (self.batch(1000 + step) for step in range(2))


def with_rows(change: Callable[[TokenBatch, int], TokenBatch]) -> NextToken:
    toy, rows = next_token.toy(1), Changed(change)
    return NextToken(toy.settings, toy.model, rows, toy.byte_lengths, rows.validation)


def test_a_healthy_run_hears_a_verdict_and_nothing_else(tmp_path: Path, said: list[str]) -> None:
    watch(next_token.toy(1), tmp_path, replace(GUESSING, ngram=0.5), steps=100)
    assert len(said) == 1, said
    (verdict,) = said
    assert "of the way from unigram counts (3.08) to a 5-gram model (0.5)" in verdict


def test_guessing(tmp_path: Path, said: list[str]) -> None:
    def drawn(batch: TokenBatch, step: int) -> TokenBatch:
        return replace(batch, targets=torch.randint(WORDS, batch.targets.shape, generator=torch_stream(1, "t", step)))

    watch(with_rows(drawn), tmp_path, learning_rate=1e-9, steps=60)
    assert said[0].endswith("inputs and targets don't belong together. Try training.learning_rate: 1e-08.")
    assert "guessing gives 3.18: nothing has been learnt" in said[0]


SKEWED = torch.tensor([2.0**-n for n in range(1, WORDS + 1)])


def test_single_tokens_only(tmp_path: Path, said: list[str]) -> None:
    """Targets that have nothing to do with the inputs."""

    def unrelated(batch: TokenBatch, step: int) -> TokenBatch:
        drawn = torch.multinomial(SKEWED, batch.targets.numel(), replacement=True, generator=torch_stream(1, "t", step))
        return replace(batch, targets=drawn.view_as(batch.targets))

    entropy = float(-(SKEWED * SKEWED.log()).sum())
    watch(with_rows(unrelated), tmp_path, Expected(math.log(WORDS), entropy, 0.5))
    assert any("the entropy of single tokens (1.39): the model knows how frequent they are" in line for line in said)


def test_coming_apart(tmp_path: Path, said: list[str]) -> None:
    """A rate that rises all the way to ten."""
    watch(next_token.toy(1), tmp_path, learning_rate=10.0, warmup=0.4, steps=100, schedule="constant", clip=0.0)
    assert any("training came apart. Try training.learning_rate: 3.3." in line for line in said), said


def test_answers_that_leak(tmp_path: Path, said: list[str]) -> None:
    watch(with_rows(lambda batch, step: replace(batch, ids=batch.targets)), tmp_path)
    assert any("far below a 5-gram model's (2.54): the answer leaks into the input" in line for line in said), said


def test_a_dead_layer(tmp_path: Path, said: list[str]) -> None:
    toy = next_token.toy(1)
    block = toy.model.blocks[1]
    alive = block.forward
    block.forward = lambda x, *rest, **more: alive(x, *rest, **more) * 0 + x
    rows = watch(toy, tmp_path, steps=40)
    assert rows[-1]["dead_layers"] == "model.blocks.1"
    assert any("No gradient reaches model.blocks.1: it learns nothing. Try" in line for line in said)


class Jumping(NextToken):
    """Now and then a step weighs five hundred times as much."""

    step = 0

    def terms(self, microbatch: TokenBatch) -> list[Term]:
        self.step += 1
        (term,) = super().terms(microbatch)
        return [replace(term, weight=500.0 if self.step % 25 == 0 else 1.0)]


@pytest.mark.parametrize("log_every", [1, 4])
def test_gradients_that_jump(tmp_path: Path, said: list[str], log_every: int) -> None:
    """Also where the steps in which they do are not logged."""
    toy = next_token.toy(1)
    jumping = Jumping(toy.settings, toy.model, toy.batches, toy.byte_lengths, None)
    rows = watch(jumping, tmp_path, log_every=log_every, steps=160)
    assert any("The gradient's norm jumped to more than 10 times its usual size in" in line for line in said), said
    assert any(row.get("grad_norm_max", 0) > row["grad_norm"] for row in rows) == (log_every > 1)


def curve(losses: list[float], rate: float = 0.02, tokens: int = 508, **more: Any) -> Curve:
    """A logged curve, each loss standing for five steps."""
    rows = [{"step": 5 * n, "loss": x, "tokens": 5 * n * tokens, "grad_norm": 1.0} for n, x in enumerate(losses, 1)]
    return Curve(rows, Expected(6.24, 5.3, 2.08, 60_000), rate, **more)


def measured(*levels: float) -> list[float]:
    """Means of ten steps, every twentieth, of a measured run, filled in between."""
    return [a + (b - a) * share for a, b in pairwise(levels) for share in (0, 0.25, 0.5, 0.75)]


HEALTHY = measured(6.06, 5.32, 5.11, 4.81, 4.51, 4.35, 4.20, 3.96, 3.72, 3.68, 3.64, 3.55, 3.63)
SLOW = measured(6.21, 6.02, 5.86, 5.70, 5.58, 5.48, 5.38, 5.33, 5.23, 5.17, 5.14, 5.10, 5.11)


def test_measured_curves_of_three_rates() -> None:
    """250 steps of the tiny recipe with Muon at 0.02 and 0.002, and with a rate that stops it early."""
    assert symptoms(curve(HEALTHY)) == []
    (slow,) = symptoms(curve(SLOW, rate=0.002))
    assert (slow.kind, slow.fix) == ("rate too low", "training.learning_rate: 0.006")
    assert "reference runs were at 34% to 59%" in slow.text
    (fast,) = symptoms(curve([6.2, 5.8, 5.2, *(4.95 + 0.05 * (-1) ** n for n in range(45))], rate=1.0))
    assert (fast.kind, fast.fix) == ("rate too high", "training.learning_rate: 0.33")


def test_what_was_never_measured_is_not_judged() -> None:
    slow = curve(SLOW)
    assert band_of(slow) is not None
    assert band_of(replace(slow, expected=replace(slow.expected, corpus_tokens=1e9))) is None
    assert band_of(replace(slow, rows=slow.rows[:19])) is None
    assert summary(replace(slow, expected=Expected(chance=6.2))) is None
    huge = curve(SLOW, tokens=500_000)  # a step of half a million tokens counts as one of the reference runs' at most
    assert huge.tokens == health.STEP * huge.rows[-1]["step"]


def test_the_loss_of_a_policy_is_not_judged() -> None:
    assert symptoms(curve([0.01, 0.9] * 30, policy=True)) == []


def test_blocks_without_gradient_are_named() -> None:
    norms = {"m.embedding.weight": 1.0, "m.blocks.0.a.weight": 0.0, "m.blocks.0.b": 0.1, "m.blocks.1.a.weight": 0.0}
    assert without_gradient({**norms, "m.head.weight": 0.0}) == ["m.blocks.1"]
    assert without_gradient({**norms, "m.head.weight": math.inf}) == []
    assert without_gradient({}) == []


class _Norms(Hook):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_step(self, run: Run) -> None:
        norms = run.gradients()
        assert math.hypot(*norms.values()) == pytest.approx(run.row["grad_norm"], rel=1e-5)
        if ranks.is_main() and run.last:
            (self.folder / "norms.json").write_text(json.dumps(norms))


def _learn(folder: Path, parallel: dict[str, Any]) -> None:
    learn(folder, hooks=(_Norms(folder),), parallel=parallel, what=objective())


def test_gradient_norms_are_those_of_whole_parameters_in_every_layout(tmp_path: Path) -> None:
    _learn(tmp_path, {})
    wanted = json.loads((tmp_path / "norms.json").read_text())
    for name, parallel in LAYOUTS_OF_TWO.items():
        (folder := tmp_path / name).mkdir()
        together(2, _learn, folder, parallel)
        assert json.loads((folder / "norms.json").read_text()) == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_a_loader_that_repeats_itself_is_noticed() -> None:
    rows = objective().batches
    fair, stuck = Counted(rows), Counted(Changed(lambda batch, step: rows.batch(step % 3)))
    for step in range(12):
        assert torch.equal(fair.batch(step).ids, rows.batch(step).ids)
        stuck.batch(step)
    assert stuck.repeated_share(epochs=1.0) > 0.6
    assert stuck.repeated_share(epochs=4.0) == 0
    assert fair.repeated_share(epochs=12.0) == 0


def _ids(number: int, length: int = 40) -> Tensor:
    return torch.randint(0, 200, (length,), generator=torch_stream(number, "ids"))


def test_copies_and_held_out_text_in_training_text_are_noticed(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train([], 257)
    train = [_ids(n).numpy() for n in [0, 1, 2, 3, 4, 5, 6, 0, 1, 2]] + [
        _ids(0, 5).numpy()
    ] * 20  # short ones don't count
    held_out = [_ids(n).numpy() for n in (3, 50, 51, 52)]
    for split, texts in (("train", train), ("val", held_out)):
        write_shards(tmp_path / split, texts, tokenizer)
    found = copies(*(Shards.open(tmp_path / split, tokenizer) for split in ("train", "val")))
    assert found == {"copied_share": 0.3, "leaked_share": 0.25}
