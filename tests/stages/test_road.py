"""The whole road on a tiny world: every joint between stages, the stable keys of the report, skipping.

Interruption has its own tests: tests/cli/test_interruption.py.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from nestling.core import pipeline
from nestling.core.recipe import Recipe, load_recipe
from nestling.core.runtime import detect
from nestling.core.storage import content_hash
from nestling.core.types import Ranking
from nestling.model.locate import checkpoint_folder
from nestling.report.build import build_report
from nestling.world import World

RECIPE = Path(__file__).with_name("tiny.yaml")


def road(until: str | None = None) -> Recipe:
    recipe = load_recipe(RECIPE)
    names = [spec.name for spec in recipe.stages]
    return recipe.model_copy(update={"stages": recipe.stages[: names.index(until) + 1 if until else None]})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("road") / "tiny"
    pipeline.run(road(), out, detect("cpu", "fp32"), quiet=True)
    return out


def test_the_report_has_its_stable_keys(finished: Path) -> None:
    report = build_report(finished)
    stages: dict[str, Any] = report["stages"]
    assert {"val_bpb", "ngram_bpb", "tokens", "seconds", "tokens_per_second"} <= set(stages["pretrain"])
    assert stages["pretrain"]["val_bpb"] > 0
    assert 0 <= stages["reward"]["pairwise_accuracy"] <= 1
    assert {"proxy_reward", "true_reward", "kl", "win_rate_vs_sft"} <= set(stages["ppo"])
    assert {"value", "n", "bar"} <= set(report["capabilities"]["fact_recall"])
    assert json.loads((finished / "report.json").read_text())["stages"].keys() == stages.keys()
    page = (finished / "report.html").read_text()
    assert "synthetic" in page
    assert "Who are you?" in page


def test_finished_stages_are_skipped(finished: Path) -> None:
    before = content_hash(finished / "ppo" / "model")
    started = time.perf_counter()
    pipeline.run(road(), finished, detect("cpu", "fp32"), quiet=True)
    assert time.perf_counter() - started < 10
    assert content_hash(finished / "ppo" / "model") == before


def test_a_run_folder_stands_for_its_last_chat_model(finished: Path) -> None:
    assert checkpoint_folder(finished) == finished / "ppo" / "model"


def test_provenance_names_the_parents(finished: Path) -> None:
    origin = json.loads((finished / "sft" / "model" / "nestling.json").read_text())["provenance"]
    parent = json.loads((finished / "pretrain" / "stage.json").read_text())
    assert origin["parents"]["model"] == parent["key"]
    assert origin["stage"] == "sft"


def test_samples_were_written_on_the_way(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "pretrain" / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 8]


def test_utilisation_is_a_share(finished: Path) -> None:
    """However busy the machine was when its peak was measured."""
    rows = [json.loads(line) for line in (finished / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    shares = [row["utilisation"] for row in rows] + [build_report(finished)["stages"]["pretrain"]["utilisation"]]
    assert all(0 < share <= 1 for share in shares)


def test_comparisons_hold_given_and_sampled_replies_marked_by_the_rubric(finished: Path) -> None:
    world = World.generate(seed=3, size="tiny")
    given, compared = (
        [Ranking.from_row(json.loads(line)) for line in (finished / stage / "train.jsonl").read_text().splitlines()]
        for stage in ("rankings", "comparisons")
    )
    assert len(compared) == len(given)
    sampled = 0
    for before, after in zip(given, compared, strict=True):
        texts = [response.content for response in after.responses]
        kept = list(dict.fromkeys(response.content for response in before.responses[:3]))
        assert texts[: len(kept)] == kept
        assert len(texts) == len(set(texts)) <= 5
        assert after.meta["noise_free"] == [world.score(after.meta, text).total for text in texts]
        sampled += len(texts) - len(kept)
    assert sampled == json.loads((finished / "comparisons" / "stage.json").read_text())["report"]["train_sampled"] > 0
