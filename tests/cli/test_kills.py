"""kill -9 in training, in saving and at the hand-over of stages: whoever goes on from there ends in the same weights.

Every kill has a run of its own, which is then taken up once and must end as the run that nobody disturbed. Times and
instants follow from a seed: half are drawn from the whole duration, half fall shortly after something began to be written.

    NESTLING_KILLS=50 pytest tests/cli/test_kills.py        fifty kills; `make test` does six
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from calls import CALM, TINY, CommandLine

from nestling.core.storage import content_hash

KILLS, SEED = int(os.environ.get("NESTLING_KILLS", "6")), int(os.environ.get("NESTLING_KILL_SEED", "1"))
STAGES = ("pretrain", "sft")
OFTEN = [word for stage in STAGES for word in ("--set", f"{stage}.training.save_every=0")]  # saves in every step
WORDS = ("run", TINY, *CALM, "--until", "sft", *OFTEN)
INSTANTS = (
    "pretrain/started.json",
    "pretrain/resume/.step-*",
    "pretrain/resume/step-00000005",
    "pretrain/samples.jsonl",
    "pretrain/.model.*",
    "pretrain/model",
    "pretrain/stage.json",
    "conversations/.*.jsonl.*",
    "conversations/stage.json",
    "sft/started.json",
    "sft/resume/.step-*",
    "sft/metrics.jsonl",
    "sft/.model.*",
    "sft/model",
)
DELAY = 0.03  # seconds at most from an instant to the kill


@dataclass(frozen=True)
class Whole:
    """A run that nobody disturbed, the same run before its training, and how long the rest takes."""

    data: Path
    hashes: tuple[str, ...]
    seconds: float


def weights(run: Path) -> tuple[str, ...]:
    return tuple(content_hash(run / stage / "model" / "model.safetensors") for stage in STAGES)


@pytest.fixture(scope="module")
def whole(nestling: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    place = tmp_path_factory.mktemp("whole")
    assert nestling(*WORDS, "--until", "ngram", "--out", place / "data").code == 0
    shutil.copytree(place / "data", place / "run")
    started = time.monotonic()
    done = nestling(*WORDS, "--out", place / "run")
    assert done.code == 0, done.err
    return Whole(place / "data", weights(place / "run"), time.monotonic() - started)


@pytest.fixture(scope="module")
def deaths() -> Iterator[Counter[str]]:
    """What was going on at each kill; shown by pytest -s."""
    found: Counter[str] = Counter()
    yield found
    print(f"\n{found.total()} kills: {dict(found.most_common())}")


def at_work(out: Path) -> str:
    """What a killed run was doing, as far as its files tell."""
    stage = next((stage for stage in reversed(STAGES) if (out / stage / "started.json").exists()), None)
    if stage is None or (out / stage / "stage.json").exists():
        return "hand-over"
    folder = out / stage
    if list(folder.glob("resume/.step-*")) or list(folder.glob(".model.*")):
        return f"{stage}: saving"
    if (folder / "model").exists():
        return "hand-over"
    return f"{stage}: {'training' if (folder / 'metrics.jsonl').exists() else 'starting'}"


def kill(nestling: CommandLine, whole: Whole, out: Path, number: int) -> None:
    """Run until the moment with this number; one that came too late is drawn again."""
    for attempt in range(20):
        draw = random.Random(f"{SEED} {number} {attempt}")
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(whole.data, out)
        if number % 2:
            order = {"after": draw.uniform(0.02, whole.seconds)}
        else:
            order = {"when": out / draw.choice(INSTANTS), "delay": draw.uniform(0, DELAY)}
        if nestling(*WORDS, "--out", out, signal=signal.SIGKILL, **order).code == -signal.SIGKILL:
            return
    pytest.fail("twenty times the run had ended before it could be killed")


@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_run_ends_in_the_same_weights(
    nestling: CommandLine, whole: Whole, deaths: Counter[str], tmp_path: Path, number: int
) -> None:
    out = tmp_path / "run"
    kill(nestling, whole, out, number)
    deaths[at_work(out)] += 1
    done = nestling(*WORDS, "--out", out)
    assert done.code == 0, done.err
    assert weights(out) == whole.hashes
    assert [path for stage in STAGES for path in (out / stage).glob("**/.*")] == []
