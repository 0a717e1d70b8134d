"""The router: features by hand, what it learns, what it chooses, what is left of it on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nestling.core.errors import UserError
from nestling.core.types import Message
from nestling.evaluation.classification import calibration_error
from nestling.evaluation.routing import Candidate, Outcome, Table, Trial, choose
from nestling.serving.router import Learning, Router, features, fit, regress

CANDIDATES = {
    "direct": Candidate(model="small"),
    "tools": Candidate(model="small", effort="tools"),
    "large": Candidate(model="large"),
}


def user(text: str) -> tuple[Message, ...]:
    return (Message(role="user", content=text),)


def trials(count: int, seed: int) -> list[Trial]:
    """Sums need tools, poems the large model, greetings nothing."""
    stream, rows = np.random.default_rng(seed), []
    for _ in range(count):
        kind = int(stream.integers(3))
        a, b = stream.integers(100, 999, 2)
        words = stream.choice(["sea", "wind", "rain", "night"])
        text = [f"What is {a} + {b}?", f"Write a poem about the {words}.", f"Hello, nice {words} today!"][kind]
        right = {"direct": kind == 2, "tools": kind in (0, 2), "large": kind in (1, 2)}
        costs = {"direct": 1.0, "tools": 2.0, "large": 10.0}
        rows.append(Trial(prompt=user(text), outcomes={n: Outcome(score=right[n], cost=costs[n]) for n in CANDIDATES}))
    return rows


@pytest.fixture(scope="module")
def router() -> Router:
    rows = trials(300, 0)
    return fit([row.prompt for row in rows], Table.of(rows, list(CANDIDATES)), CANDIDATES, Learning(margin=0.1))


def test_it_takes_the_cheapest_that_can(router: Router) -> None:
    assert router.choose(user("What is 345 + 678?")).name == "tools"
    assert router.choose(user("Write a poem about the wind.")).name == "large"
    choice = router.choose(user("Hello, nice rain today!"))
    assert (choice.name, choice.model, choice.effort) == ("direct", "small", "direct")
    assert choice.success > 0.8


def test_it_is_almost_the_oracle_on_prompts_it_has_not_seen(router: Router) -> None:
    rows = trials(100, 1)
    table = Table.of(rows, list(CANDIDATES))
    names = list(CANDIDATES)
    chosen = np.array([names.index(router.choose(row.prompt).name) for row in rows])
    assert table.replay(chosen).accuracy > 0.97
    assert table.replay(chosen).cost < 1.1 * table.replay(table.oracle()).cost


def test_only_models_that_are_served_are_chosen(router: Router) -> None:
    assert router.choose(user("Write a poem about the sea."), served=["small"]).model == "small"
    with pytest.raises(UserError, match="none of the router's models"):
        router.choose(user("Hi"), served=["other"])


def test_it_survives_its_folder(router: Router, tmp_path: Path) -> None:
    router.save(tmp_path / "router" / "model")
    again = Router.load(tmp_path / "router" / "model")
    prompts = [row.prompt for row in trials(20, 2)]
    assert np.array_equal(again.success(prompts), router.success(prompts))
    assert [again.choose(prompt) for prompt in prompts] == [router.choose(prompt) for prompt in prompts]
    with pytest.raises(UserError, match="no router"):
        Router.load(tmp_path / "nothing")


def test_digits_are_alike_and_their_number_counts() -> None:
    same = features([user("1 + 23"), user("9 + 87")], 512)
    assert np.array_equal(same[0], same[1])
    other = features([user("1 + 2")], 512)
    assert not np.array_equal(same[0], other[0])
    assert np.linalg.norm(same[0, :-1]) == pytest.approx(1.0)
    assert same[0, -1] == 1


def test_the_last_question_and_what_came_before_are_told_apart() -> None:
    before = (Message(role="user", content="sum"), Message(role="assistant", content="yes"), *user("Hello"))
    alone, together = features([user("Hello"), before], 4096)
    assert (together > 0).sum() == (alone > 0).sum() + 2
    assert features([()], 64)[0].sum() == 1  # no message, nothing but the constant


def test_the_regression_is_the_penalised_optimum() -> None:
    """The gradient vanishes at the weights, computed here in float64 from the formula."""
    rows = trials(60, 3)
    scores = Table.of(rows, ["direct", "tools"]).scores
    inputs = features([row.prompt for row in rows], 128)
    weights = regress(inputs, scores, 0.01)
    p = 1 / (1 + np.exp(-inputs @ weights))
    penalty = 0.01 * weights
    penalty[-1] = 0
    assert np.abs(inputs.T @ (p - scores) / len(rows) + penalty).max() < 1e-4


def noisy(count: int, seed: int) -> tuple[list[tuple[Message, ...]], Table]:
    """The small model is right with a chance that one word tells; the large one always is, and costs ten times as much."""
    stream = np.random.default_rng(seed)
    chances = {"easy": 0.9, "middling": 0.6, "hard": 0.1}
    words = stream.choice([*chances], count)
    filler = stream.choice([*"bcdfghjklmnpqrstvwxyz"], (count, 4))  # words that say nothing, which are learnt by heart
    prompts = [user(f"A {word} one: {' '.join(row)}") for word, row in zip(words, filler, strict=True)]
    right = stream.random(count) < [chances[word] for word in words]
    scores = np.stack([right, np.ones(count)], axis=1)
    return prompts, Table(("direct", "large"), scores, np.tile([1.0, 10.0], (count, 1)))


def test_predictions_are_calibrated_on_prompts_it_has_not_seen() -> None:
    """Regressions alone learn by heart which prompts were answered, and are far too sure."""
    prompts, table = noisy(400, 5)
    candidates = {name: CANDIDATES[name] for name in table.names}
    router = fit(prompts, table, candidates, Learning(features=2048, penalty=1e-6))
    fresh, outcomes = noisy(600, 6)
    alone = features(fresh, 2048) @ regress(features(prompts, 2048), table.scores, 1e-6)
    truth = outcomes.scores[:, 0] > 0.5
    errors = [calibration_error(p[:, 0], truth) for p in (1 / (1 + np.exp(-alone)), router.success(fresh))]
    assert errors[1] < 0.1 < errors[0]
    assert np.all(router.success(fresh)[:, 1] > 0.97)  # what was never wrong stays a number


def test_the_margin_is_chosen_for_what_it_may_cost() -> None:
    """As accurate as the best candidate but for the loss that is allowed; the more may be lost, the cheaper."""
    prompts, table = noisy(400, 7)
    candidates = {name: CANDIDATES[name] for name in table.names}
    routers = [fit(prompts, table, candidates, Learning(loss=loss)) for loss in (0.0, 0.05, 0.3)]
    assert routers[0].margin <= routers[1].margin < routers[2].margin
    fresh, outcomes = noisy(400, 8)
    policies = [outcomes.replay(choose(r.success(fresh), r.costs, r.margin)) for r in routers]
    assert policies[2].cost < 0.7 * policies[0].cost
    assert policies[1].accuracy > 1 - 0.05 - 0.05
    assert fit(prompts, table, candidates, Learning(margin=0.25)).margin == 0.25
