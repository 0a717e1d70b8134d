"""Every file of tasks/: reference replies get full marks, empty and random ones none, rows are many and repeatable."""

from __future__ import annotations

import pytest

from nestling.core.registry import find, names
from nestling.world import World

COUNT = 60
WORLD = World.generate(3)


@pytest.fixture(params=names("tasks"))
def task(request):
    return find("tasks", request.param)


def turns(row):
    """How many replies a row asks for: one to the prompt, one to each further turn of the user."""
    return 1 + len(row.meta.get("turns", ()))


def test_reference_replies_get_full_marks(task):
    best = 1.0 if task.HIGHER_IS_BETTER else 0.0
    for row in task.problems(WORLD, 1, COUNT):
        assert len(row.meta["reference"]) == turns(row)
        assert task.check(row, row.meta["reference"]) == best, (row.prompt, row.meta["reference"])


def test_silence_gets_no_marks(task):
    worst = 0.0 if task.HIGHER_IS_BETTER else 1.0
    for row in task.problems(WORLD, 1, COUNT):
        assert task.check(row, [""] * turns(row)) == worst


def test_nonsense_gets_no_marks(task):
    if not task.HIGHER_IS_BETTER:
        pytest.skip("nonsense is not the fault that this task counts")
    for row in task.problems(WORLD, 1, COUNT):
        assert task.check(row, ["xq zzk 7 vv"] * turns(row)) == 0.0


def test_a_missing_reply_is_not_a_right_one(task):
    if not task.HIGHER_IS_BETTER:
        pytest.skip("counts a fault")
    for row in task.problems(WORLD, 1, COUNT):
        if turns(row) > 1:
            assert task.check(row, row.meta["reference"][:-1]) == 0.0


def test_rows_are_repeatable_and_different(task):
    rows = task.problems(WORLD, 1, COUNT)
    assert rows == task.problems(WORLD, 1, COUNT)
    assert rows != task.problems(WORLD, 2, COUNT)
    assert len(rows) == COUNT == len({str(row) for row in rows})
