"""The router: features by hand, what it learns, what it chooses, what is left of it on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nestling.core.errors import UserError
from nestling.core.types import Message
from nestling.evaluation.routing import Candidate, Outcome, Table, Trial
from nestling.serving.router import Router, features, fit

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
    return fit([row.prompt for row in rows], Table.of(rows, list(CANDIDATES)), CANDIDATES, margin=0.1)


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


def test_the_fit_is_the_penalised_optimum() -> None:
    """The gradient vanishes at the weights, computed here in float64 from the formula."""
    rows = trials(60, 3)
    table = Table.of(rows, ["direct"])
    prompts = [row.prompt for row in rows]
    found = fit(prompts, table, {"direct": CANDIDATES["direct"]}, margin=0.0, size=128, penalty=0.01)
    inputs = features(prompts, 128).astype(np.float64)
    p = 1 / (1 + np.exp(-inputs @ found.weights.astype(np.float64)))
    penalty = 0.01 * found.weights.astype(np.float64)
    penalty[-1] = 0
    assert np.abs(inputs.T @ (p - table.scores) / len(rows) + penalty).max() < 1e-4
