"""What every file of corpus/sources promises, run over whatever stands in that folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from nestling.core import registry
from nestling.core.config import Config
from nestling.core.types import Conversation, Document, Labelled, Problem, PromptRow, Ranking

KINDS = {
    "documents": Document, "conversations": Conversation, "rankings": Ranking, "prompts": PromptRow, "problems": Problem,
    "labels": Labelled,
}  # fmt: skip
OFFERS = [
    (name, what)
    for name in registry.names("corpus.sources")
    for what in KINDS
    if hasattr(registry.find("corpus.sources", name), what)
]


@pytest.mark.parametrize(("name", "what"), OFFERS)
def test_splits_share_nothing_and_never_change(name: str, what: str, tmp_path: Path) -> None:
    source = registry.find("corpus.sources", name)
    settings = source.toy(tmp_path, what)
    assert issubclass(source.Settings, Config)
    assert isinstance(settings, source.Settings)
    train, val, again = (list(getattr(source, what)(settings, 5, split, [])) for split in ("train", "val", "train"))
    assert train
    assert val
    assert train == again
    assert all(type(item) is KINDS[what] for item in train + val)
    assert not {item.model_dump_json() for item in train} & {item.model_dump_json() for item in val}


@pytest.mark.parametrize("name", registry.names("corpus.sources"))
def test_every_setting_is_explained(name: str) -> None:
    fields = registry.find("corpus.sources", name).Settings.model_fields
    assert [key for key, field in fields.items() if not field.description] == []
    assert any(offer == name for offer, _ in OFFERS)
