"""One round of the data: people talk and report, an operator reviews, the export trains the next moderation model."""

from __future__ import annotations

import httpx
import openai
import pytest
from typer.testing import CliRunner

from nestling.cli.app import build_app
from nestling.core import pipeline
from nestling.core.recipe import build_recipe
from nestling.core.runtime import detect
from nestling.core.storage import read_rows
from nestling.core.types import Labelled
from nestling.serving.moderation import Moderator, Verdict
from nestling.serving.store.store import Store

INSULTS = [f"You are {word} {kind}!" for word in ("a silly", "a lazy") for kind in ("duck", "hen", "cow", "pig")]
PLAIN = [f"Tell me of the {word} {kind}." for word in ("blue", "old") for kind in ("lake", "road", "hill", "boat")]
MODEL = {"d_model": 32, "n_layers": 1, "n_heads": 2, "context": 64}


class Watchful(Moderator):
    """Flags one word, as hate."""

    def __init__(self) -> None:
        self.categories = ("hate",)

    def judge(self, texts):
        """As a moderator does."""
        found = ["Bother" in text for text in texts]
        return [Verdict(bad, {"hate": bad}, {"hate": float(bad)}) for bad in found]

    def recent(self, text, new):
        """It reads any text whole."""
        return text


def talk(client: httpx.Client, content: str, report: str | None) -> None:
    """A conversation of one message and its reply; the message may be reported."""
    id = client.post("/api/conversations", json={}).json()["id"]
    asked = client.post(f"/api/conversations/{id}/messages", json={"content": content}).json()["id"]
    answered = client.post(f"/api/conversations/{id}/reply", json={"sampling": {"max_tokens": 2, "temperature": 0}})
    assert '"done"' in answered.text
    if report:
        assert client.post(f"/api/messages/{asked}/flags", json={"category": report}).status_code == 201


def feedback(*words: object) -> str:
    """`nestling feedback …`"""
    return CliRunner().invoke(build_app("feedback"), ["feedback", *map(str, words)], catch_exceptions=False).output


@pytest.fixture
def told(serve, tmp_path):
    """A store in which people talked to a service; reports wait to be looked at."""
    store = Store.open(tmp_path / "store.db")
    service = serve(store=store, moderator=Watchful())
    with httpx.Client(base_url=service.url, timeout=60) as client:
        for content in INSULTS:
            talk(client, content, "harassment")
        for place, content in enumerate(PLAIN):
            talk(client, content, "harassment" if place == 0 else None)
    with pytest.raises(openai.BadRequestError, match="hate"):
        service.client().chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Bother!"}])
    yield store
    store.close()


def test_from_a_report_to_the_next_model(told, tokenizer, tmp_path):
    address = tmp_path / "store.db"
    cases = told.moderation.cases()
    assert [case.kind for case in cases] == ["report"] * (len(INSULTS) + 1) + ["verdict"]
    uphold = [word for case in cases if case.text not in PLAIN for word in ("--uphold", case.id)]
    reject = [word for case in cases if case.text in PLAIN for word in ("--reject", case.id)]
    feedback("review", address, *uphold, *reject)
    feedback("export", address, "--out", tmp_path / "data", "--clean", "9")
    rows = list(read_rows(tmp_path / "data" / "labels.jsonl", Labelled.from_row))
    said = {row.text: (row.labels, row.judged) for row in rows if row.meta["kind"] != "clean"}
    insult, harmless, bother = (("harassment",), ("harassment",)), ((), ("harassment",)), (("hate",), ("hate",))
    assert said == {**dict.fromkeys(INSULTS, insult), PLAIN[0]: harmless, "Bother!": bother}
    assert {*PLAIN[1:]} <= {row.text for row in rows if row.meta["kind"] == "clean"}

    tokenizer.save(tmp_path / "tokenizer")
    files = {"source": "files", "settings": {"paths": [str(tmp_path / "data" / "labels.jsonl")], "val_share": 0.3}}
    training = {"steps": 60, "optimizer": "adamw", "learning_rate": 0.01, "compile": "off"}
    stages = {
        "labels": {"sources": [files]},
        "moderation": {"reads": {"tokenizer": str(tmp_path / "tokenizer")}, "model": MODEL, "batch_rows": 8,
                       "folds": 2, "training": training},
    }  # fmt: skip
    recipe = build_recipe({"name": "next", "seed": 1, "stages": stages})
    reports = pipeline.run(recipe, tmp_path / "run", detect("cpu", "fp32"), quiet=True)
    assert reports["labels"]["sources"]["files"] == len(rows)
    assert reports["moderation"]["train_texts"] + reports["moderation"]["test_texts"] == len(rows)
    scores = [verdict.scores["harassment"] for verdict in Moderator.load(tmp_path / "run").judge([*INSULTS, *PLAIN])]
    assert min(scores[: len(INSULTS)]) > max(scores[len(INSULTS) :])
