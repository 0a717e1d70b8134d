"""What looks wrong is found in runs made to go wrong, and nothing is found in one that went well."""

from __future__ import annotations

import math

import pytest

from nestling.report.checks import Finding, find_wrongs
from nestling.report.figures import MOST_POINTS, Curve, Plot, draw, thin
from nestling.report.records import Run, StageRecord, read_run
from nestling.training.health import smooth


def findings(stage: StageRecord) -> str:
    """All sentences about a run of one stage."""
    return " ".join(f"{f.weight}: {f.text}" for f in find_wrongs(Run("toy", [stage]), [], []))


def stage(kind="sft", report=None, rows=()) -> StageRecord:
    return StageRecord(kind, kind, report=report or {}, rows=list(rows), finished="2026-01-01T00:00:00+00:00")


def losses(*values) -> list[dict]:
    return [{"step": n, "loss": value} for n, value in enumerate(values, 1)]


def falling(n: int) -> float:
    return 1 + 4 * math.exp(-n / 20)


def test_nothing_stands_out_in_a_good_run(make_run):
    assert find_wrongs(read_run(make_run()), [], []) == []


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (stage(rows=losses(*map(falling, range(100)), *(1 + n / 20 for n in range(100)))), "training came apart"),
        (stage(rows=losses(3.0, 2.0, None, None)), "was not a number in 2 of 4 rows, first at step 3"),
        (stage(rows=losses(*[2.0] * 50)), "nothing was learnt"),
        (stage(rows=[{"step": n, "val_loss": v} for n, v in enumerate((2, 1.2, 1.0, 1.1, 1.3))]), "best at step 2 (1)"),
        (stage("pretrain", {"val_bpb": 1.3, "ngram_bpb": 1.2}), "not learnt more than counting"),
        (stage("reward", {"pairwise_accuracy": 0.52}), "orders 52% of held-out pairs rightly"),
        (stage("ppo", {"win_rate_vs_sft": {"value": 0.4, "n": 10}}), "only 40% of the prompts"),
        (stage("ppo", rows=[{"step": n, "entropy": 2 * 0.9**n} for n in range(60)]), "hardly varies"),
        (stage("ppo", rows=[{"step": n, "response_tokens": 10 + n} for n in range(60)]), "is length what is rewarded"),
        (stage("corpus", {"skipped_rows": 3}), "3 bad rows"),
        (stage("pretrain", {"leaked_share": 0.1}), "10% of the held-out documents stand in the training text"),
        (stage("pretrain", {"copied_share": 0.2}), "20% of the training documents are copies"),
        (stage("pretrain", {"repeated_share": 0.3, "epochs": 1.0}), "30% of the rows came more often than 1 passes"),
        (stage("pretrain", {"epochs": 6.0}), "The text was read 6.0 times"),
        (stage("pretrain", {"expected": {"chance": 7.6}}, losses(*[7.6] * 60)), "guessing gives 7.6: nothing has been"),
        (StageRecord("sft", "sft"), "begun and not completed"),
    ],
)
def test_each_fault_is_named(bad, sentence):
    assert sentence in findings(bad)


def test_every_fault_comes_with_something_to_try():
    curve = losses(*map(falling, range(100)), *(1 + n / 20 for n in range(100)))
    settings = {"training": {"learning_rate": 0.03}}
    bad = StageRecord("sft", "sft", settings=settings, rows=curve, finished="2026-01-01T00:00:00+00:00")
    assert "training came apart. Try training.learning_rate: 0.01." in findings(bad)


def test_exploiting_the_reward_model_is_noticed(over_optimised_rows):
    assert "exploits the reward model" in findings(stage("ppo", rows=over_optimised_rows))


def test_a_policy_s_loss_may_do_what_it_likes():
    assert findings(stage("ppo", rows=losses(*[0.01, 0.5] * 40))) == ""


def test_answers_that_are_all_alike_or_repeat_themselves():
    rows = [{"prompt": str(n), "base": "the the the the the", "sft": f"Answer {n}."} for n in range(5)]
    found = find_wrongs(Run("toy", []), [], rows)
    assert [f.where for f in found] == ["base", "base"]
    assert "same answer to 5 of 5" in found[0].text
    assert "one word over and over in 5" in found[1].text


def test_serious_findings_come_first():
    rows = [{"prompt": str(n), "base": "no"} for n in range(5)]
    found = find_wrongs(Run("toy", [StageRecord("sft", "sft")]), [], rows)
    assert [f.weight for f in found] == ["wrong", "note"]
    assert isinstance(found[0], Finding)


def test_smoothing_keeps_a_constant_and_the_last_step():
    assert smooth([(n, 3.0) for n in range(100)])[-1] == (99, pytest.approx(3.0))
    assert smooth([(1, 5.0)]) == [(1, pytest.approx(5.0))]
    assert smooth([]) == []


def test_thinning_keeps_the_mean_and_the_end():
    points = [(float(n), float(n % 2)) for n in range(6000)]
    thinned = thin(points)
    assert len(thinned) == MOST_POINTS
    assert thinned[-1][0] == 5999
    assert sum(v for _, v in thinned) / MOST_POINTS == pytest.approx(0.5)


def test_a_figure_survives_flat_and_strange_data():
    """One value throughout, and a name with HTML and mathematics in it."""
    svg = draw(Plot("a<b>&$x_", "T", "u", [Curve("c$", [(1, 0.0), (2, 0.0)])]), 1)
    assert svg.startswith("<svg viewBox=")
    assert "a&lt;b&gt;&amp;$x_" in svg
