"""Sources joined by weight, found by name, and the world as the default source."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from nestling.core import registry
from nestling.core.errors import UserError
from nestling.corpus.mixture import Mixture, Source


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"id": f"r{n}", "text": f"text {n}"}) + "\n" for n in range(1000)))
    return path


@pytest.mark.parametrize(("weight", "expected"), [(0.5, 450), (1.0, 900), (2.0, 1800), (2.25, 2025)])
def test_weights_repeat_or_thin_out_training_only(rows: Path, weight: float, expected: int) -> None:
    source = Source(source="files", settings={"paths": [str(rows)]}, weight=weight)
    mixture = Mixture([source], seed=0)
    taken = Counter(document.id for document in mixture.read("documents", "train"))
    assert taken.total() == pytest.approx(expected, rel=0.1)
    assert mixture.tally.items == {"files": taken.total()}
    assert set(taken.values()) <= {int(weight), int(weight) + 1}
    val = Counter(document.id for document in mixture.read("documents", "val"))
    assert set(val.values()) == {1}
    assert not val.keys() & taken.keys()


def test_bad_row_policy_reaches_the_source(rows: Path) -> None:
    rows.write_text(rows.read_text() + "nonsense\n")
    source = Source(source="files", settings={"paths": [str(rows)]})
    with pytest.raises(UserError, match=":1001: broken JSON"):
        list(Mixture([source], seed=0).read("documents", "train"))
    mixture = Mixture([source], seed=0, on_bad_row="skip")
    list(mixture.read("documents", "train"))
    assert len(mixture.tally.skipped) == 1


def test_mistakes_are_named(rows: Path) -> None:
    with pytest.raises(UserError, match="files"):
        list(Mixture([Source(source="flies")], seed=0).read("documents", "train"))
    with pytest.raises(UserError, match=r"sources\.0\.settings.*paths"):
        list(Mixture([Source(source="files", settings={"path": "x"})], seed=0).read("documents", "train"))
    assert {"files", "world"} <= set(registry.names("corpus.sources"))


def test_the_world_offers_everything() -> None:
    settings = {"size": "tiny", "count": 12, "val_share": 0.5}
    mixture = Mixture([Source(settings=settings)], seed=3)
    for what in ("documents", "conversations", "rankings", "prompts", "problems"):
        train, val = (list(mixture.read(what, split)) for split in ("train", "val"))
        assert (len(train), len(val)) == (12, 6)
        assert train == list(mixture.read(what, "train"))


def test_the_world_fills_a_budget_of_bytes() -> None:
    mixture = Mixture([Source(settings={"size": "tiny", "bytes": 20_000})], seed=3)
    size = sum(len(document.text.encode()) for document in mixture.read("documents", "train"))
    assert 20_000 <= size < 30_000
