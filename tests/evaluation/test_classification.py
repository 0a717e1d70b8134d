"""Figures of classifiers against enumeration, textbooks and what they promise."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from nestling.evaluation import classification as c

STREAM = np.random.default_rng(0)


def test_auc_is_the_share_of_pairs_in_the_right_order() -> None:
    scores, truth = STREAM.integers(0, 6, 40) / 5, STREAM.random(40) < 0.4
    pairs = list(itertools.product(scores[truth], scores[~truth]))
    expected = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)
    assert c.auc(scores, truth) == pytest.approx(expected)
    assert c.auc(scores, np.ones(40, dtype=bool)) is None


def test_the_interval_of_an_area_solves_its_equation_and_is_open_at_one() -> None:
    low, high = c.auc_interval(0.8, 20, 30)
    for theta in (low, high):
        spread = 1 + 24 * (1 - theta) / (2 - theta) + 24 * theta / (1 + theta)
        assert (theta - 0.8) ** 2 == pytest.approx(1.959964**2 * theta * (1 - theta) * spread / 600, rel=1e-6)
    assert low < 0.8 < high
    perfect = c.auc_interval(1.0, 20, 30)
    assert perfect.high == 1.0
    assert 0.7 < perfect.low < c.auc_interval(1.0, 200, 300).low < 1.0


def test_platt_finds_the_scale_and_shift_that_made_the_labels() -> None:
    logits = STREAM.normal(0, 2, 40_000)
    truth = STREAM.random(40_000) < c.sigmoid(0.5 * logits - 1.0)
    scale, shift = c.platt(logits, truth)
    assert (scale, shift) == (pytest.approx(0.5, abs=0.03), pytest.approx(-1.0, abs=0.05))
    raw, fitted = (c.calibration_error(c.sigmoid(z), truth) for z in (logits, scale * logits + shift))
    assert fitted < 0.02 < raw


def test_platt_is_not_certain_of_few_texts() -> None:
    """A perfect order of 6 texts: the best fit to the smoothed targets 4 / 5 and 1 / 5, where both gradients vanish."""
    logits, truth = np.array([-3.0, -2, -1, 1, 2, 3]), np.array([False] * 3 + [True] * 3)
    scale, shift = c.platt(logits, truth)
    scores = c.sigmoid(scale * logits + shift)
    miss = scores - np.where(truth, 4 / 5, 1 / 5)
    assert [miss.sum(), (miss * logits).sum()] == pytest.approx([0.0, 0.0], abs=1e-6)
    assert scores.max() < 0.95


def test_best_f1_is_the_best_of_all_cuts() -> None:
    logits, truth = STREAM.normal(0, 1, 60), STREAM.random(60) < 0.3
    logits[truth] += 1
    cut = c.choose_threshold(logits, truth, c.ThresholdSettings())

    def f1(threshold: float) -> float:
        flagged = logits > threshold
        return 2 * (flagged & truth).sum() / (flagged.sum() + truth.sum())

    assert f1(cut) == pytest.approx(max(f1(x - 1e-9) for x in logits))


def test_a_clean_gap_is_cut_in_its_middle() -> None:
    logits = np.array([-4.0, -3, 1, 2])
    assert c.choose_threshold(logits, logits > 0, c.ThresholdSettings()) == -1.0


def test_a_false_positive_rate_is_kept_and_used() -> None:
    logits = np.arange(200.0)
    truth = np.zeros(200, dtype=bool)
    truth[[150, 190, 199]] = True
    settings = c.ThresholdSettings(rule="false_positive_rate", at_most=0.05)
    flagged = logits > c.choose_threshold(logits, truth, settings)
    assert (flagged & ~truth).sum() / (~truth).sum() <= 0.05
    assert (flagged & truth).sum() == 2  # the third would let 47 of 197 through


def test_what_is_worse_than_chance_is_never_flagged() -> None:
    logits = np.linspace(-2, 2, 50)
    found = c.calibrate(logits, logits < 0, c.ThresholdSettings())
    assert not (found.scores(logits) > found.threshold).any()
    assert c.calibrate(logits, np.zeros(50, dtype=bool), c.ThresholdSettings()) == c.Calibration()
    assert c.Calibration(trained=False).scores(logits).tolist() == [0.0] * 50


def test_figures_by_hand_and_intervals_by_groups() -> None:
    # Flagged: texts 0, 1, 4. True: 0, 1, 2. So 2 of 3 flags are right, 2 of 3 true ones found, 1 of 3 others flagged.
    scores = np.array([0.9, 0.8, 0.2, 0.1, 0.7, 0.3])
    truth = np.array([True, True, True, False, False, False])
    found = c.measure(scores, scores > 0.5, truth, list("aabcde"))
    assert (found.positives, found.negatives) == (3, 3)
    for figure in (found.precision, found.recall, found.f1):
        assert figure.value == pytest.approx(2 / 3)
    assert found.false_positive_rate.value == pytest.approx(1 / 3)
    assert found.auc.value == pytest.approx(7 / 9)
    assert found.calibration_error.value == pytest.approx((0.1 + 0.2 + 0.8 + 0.1 + 0.7 + 0.3) / 6)
    assert found.recall.interval == c.wilson(2 / 3 * 2, 2)  # three texts, but they are two wordings
    alone = c.measure(scores, scores > 0.5, truth, list("abcdef"))
    assert alone.recall.interval == c.wilson(2, 3)
    assert alone.to_row()["recall"]["n"] == 3


def test_without_positives_there_is_no_recall() -> None:
    found = c.measure(np.array([0.2, 0.1]), np.zeros(2, dtype=bool), np.zeros(2, dtype=bool), ["a", "b"])
    assert (found.recall.value, found.precision.value, found.auc.value) == (None, None, None)
    assert found.false_positive_rate.value == 0.0
    assert c.macro({"x": found}, "recall") is None


def test_confusion_of_several_labels() -> None:
    truth = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0], [0, 1, 0], [1, 0, 0]], dtype=bool)
    said = np.array([[1, 0, 0], [1, 0, 1], [0, 0, 0], [0, 0, 1], [0, 0, 0], [1, 1, 0]], dtype=bool)
    assert c.confusion(truth, said, ["x", "y", "z"]) == {
        "x": {"x": 3, "y": 1},  # the last text is also taken for y
        "y": {"z": 1, "none": 1},  # once taken for z, once not seen
        "z": {},
        "none": {"z": 1, "none": 1},
    }


def test_reliability_by_hand() -> None:
    scores, truth = np.array([0.05, 0.15, 0.17, 1.0]), np.array([False, True, False, True])
    rows = c.reliability(scores, truth)
    assert [(row["share"], row["n"]) for row in rows] == [(0.0, 1), (0.5, 2), (1.0, 1)]
    assert [row["score"] for row in rows] == pytest.approx([0.05, 0.16, 1.0])
    gaps = [abs(row["score"] - row["share"]) * row["n"] for row in rows]
    assert sum(gaps) / 4 == pytest.approx(c.calibration_error(scores, truth))


def test_the_error_of_a_perfect_forecast_is_sampling_noise() -> None:
    scores = STREAM.random(50_000)
    assert c.calibration_error(scores, STREAM.random(50_000) < scores) < 0.01
    assert math.isclose(c.calibration_error(np.full(4, 0.75), np.array([True, True, True, False])), 0.0, abs_tol=1e-12)
