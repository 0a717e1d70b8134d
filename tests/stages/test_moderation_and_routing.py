"""Moderation and routing in miniature: from the world to a verdict, and from trials to a choice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from taught import teach

from nestling.core import pipeline
from nestling.core.errors import UserError
from nestling.core.recipe import build_recipe
from nestling.core.runtime import detect
from nestling.core.types import Labelled, Message
from nestling.evaluation.classification import ThresholdSettings
from nestling.loading.labels import LabelLoader
from nestling.model import checkpoint
from nestling.model.config import DecoderConfig
from nestling.model.decoder import build
from nestling.serving.moderation import Moderator
from nestling.serving.router import Router
from nestling.stages import moderation
from nestling.stages.moderation import CATEGORIES, folds, group_of
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.conversation import render
from nestling.tokenizer.special import CHAT, THINK_END, THINK_START, TURN_END

MODEL = {"d_model": 16, "n_layers": 1, "n_heads": 2, "context": 64}
STAGES: dict[str, Any] = {
    "labels": {"sources": [{"source": "world", "settings": {"size": "tiny", "count": 300, "val_share": 0.5}}]},
    "moderation": {"model": MODEL, "training": {"steps": 6, "log_every": 1, "optimizer": "adamw", "compile": "off"}},
}


def run(out: Path, stages: dict[str, Any]) -> dict[str, dict[str, Any]]:
    recipe = build_recipe({"name": "small", "seed": 2, "stages": stages})
    return pipeline.run(recipe, out, detect("cpu", "fp32"), quiet=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train(["How can I tell you a story about a town?"], 270).save(folder)
    return folder


@pytest.fixture(scope="module")
def finished(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("moderation") / "run"
    moderation = {**STAGES["moderation"], "reads": {"tokenizer": str(tokenizer)}}
    return out, run(out, {**STAGES, "moderation": moderation})["moderation"]


def test_the_report_holds_every_category_and_the_confusion(finished: tuple[Path, dict[str, Any]]) -> None:
    report = finished[1]
    assert tuple(report["categories"]) == CATEGORIES
    assert report["never_trained"] == ["sexual/minors"]
    hate = report["categories"]["hate"]
    assert {"precision", "recall", "f1", "auc", "false_positive_rate", "calibration_error", "threshold"} <= set(hate)
    low, high = hate["auc"]["interval"]
    assert low <= hate["auc"]["value"] <= high
    assert sum(report["confusion"]["none"].values()) > 0
    assert sum(row["n"] for row in report["reliability"]) == 150 * len(CATEGORIES)
    kinds = report["flagged_by_kind"]
    assert (kinds["ordinary"]["wanted"], kinds["hate"]["wanted"]) == (0.0, 1.0)
    assert sum(row["texts"] for row in kinds.values()) == report["test_texts"]
    assert report["test_texts"] == 150 > report["test_groups"]
    assert 0 <= report["flagged_false_positive_rate"] <= 1


def test_long_texts_have_figures_of_their_own(finished: tuple[Path, dict[str, Any]]) -> None:
    """What hides in a long talk is counted where it stands, not only among all texts."""
    out, report = finished
    rows = [json.loads(line) for line in (out / "labels" / "val.jsonl").read_text().splitlines()]
    harmful = [len(row["text"]) > moderation.LONG for row in rows if row["labels"]]
    harmless = [len(row["text"]) > moderation.LONG for row in rows if not row["labels"]]
    assert report["long_flagged_recall_n"] == sum(harmful) > 0
    assert report["long_flagged_false_positive_rate_n"] == sum(harmless) > 0
    assert report["flagged_recall_n"] == len(harmful)


def test_the_moderator_is_calibrated_as_reported_and_mistakes_are_kept(finished: tuple[Path, dict[str, Any]]) -> None:
    out, report = finished
    moderator = Moderator.load(out)
    calibration = checkpoint.load_classifier(out / "moderation" / "model").provenance["calibration"]
    assert [name for name in CATEGORIES if not calibration[name]["trained"]] == report["never_trained"]
    (verdict,) = moderator.judge(["How can I steal a boat?"])
    for name, row in report["categories"].items():
        assert verdict.categories[name] == (verdict.scores[name] > row["threshold"])
    mistakes = [json.loads(line) for line in (out / "moderation" / "mistakes.jsonl").read_text().splitlines()]
    assert mistakes
    assert all(set(row["labels"]) != set(row["flagged"]) for row in mistakes)


def test_feedback_trains_the_next_round(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Rows as the store exports them, judged for one category only, beside the world's."""
    out, _ = finished
    rows = [{"text": f"you {word}", "labels": {"harassment": True}} for word in ("duck", "hen", "cow", "pig")]
    (tmp_path / "feedback.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"source": "files", "settings": {"paths": [str(tmp_path / "feedback.jsonl")]}, "weight": 3}
    stages = {"labels": {"sources": [*STAGES["labels"]["sources"], files]}}
    stages["moderation"] = {**STAGES["moderation"], "model": {}, "reads": {"start": str(out / "moderation")}}
    reports = run(tmp_path / "run", stages)
    assert reports["labels"]["sources"]["files"] == 3 * 3 + 1
    assert reports["moderation"]["train_texts"] == 309


def test_columns_of_a_foreign_file_are_categories(tmp_path: Path) -> None:
    rows = [{"comment": f"text {n}", "toxic": n % 2, "threat": int(n == 3)} for n in range(8)]
    (tmp_path / "toxic.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"toxic": "harassment", "threat": "harassment/threatening"}
    settings = {"paths": [str(tmp_path / "toxic.jsonl")], "text_field": "comment", "label_fields": fields}
    run(tmp_path / "run", {"labels": {"sources": [{"source": "files", "settings": settings}]}})
    text = (tmp_path / "run" / "labels" / "train.jsonl").read_text() + (tmp_path / "run" / "labels" / "val.jsonl").read_text()
    read = {row.text: row for row in (Labelled.from_row(json.loads(line)) for line in text.splitlines())}
    assert len(read) == 8
    assert read["text 3"].labels == ("harassment", "harassment/threatening")
    assert read["text 2"].labels == ()
    assert read["text 2"].judged == ("harassment", "harassment/threatening")


def test_other_categories_than_the_earlier_rounds_are_refused(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    stage = {**STAGES["moderation"], "reads": {"start": str(finished[0] / "moderation")}, "categories": ["hate"]}
    with pytest.raises(UserError, match="has other categories"):
        run(tmp_path / "run", {"labels": STAGES["labels"], "moderation": stage})
    with pytest.raises(UserError, match="needs a model to start from"):
        run(tmp_path / "none", {**STAGES, "moderation": {**STAGES["moderation"], "reads": {}}})


def test_folds_keep_groups_whole_and_share_out_every_label() -> None:
    rows = [
        Labelled(text=f"{label} {n} {m}", labels=(label,), meta={"group": f"{label} {n}"})
        for label in ("hate", "violence") for n in range(6) for m in range(3)
    ]  # fmt: skip
    fold = folds(rows, 3)
    assert {int(n): int((fold == n).sum()) for n in set(fold)} == {0: 12, 1: 12, 2: 12}
    by_group = {(group_of(row), int(n)) for row, n in zip(rows, fold, strict=True)}
    assert len(by_group) == 12
    for n in range(3):
        assert {row.labels for row, place in zip(rows, fold, strict=True) if place == n} == {("hate",), ("violence",)}
    with pytest.raises(UserError, match="too few groups"):
        folds(rows[:3], 2)


def test_harmless_texts_are_flagged_no_more_than_allowed(tokenizer: Path) -> None:
    """Each category keeps to its rate, and together they would flag three times as many; one is hard to tell.

    A level for all asks more certainty of the hard one only; dividing their rates by three costs it most of its recall.
    """
    names, stream = ("hate", "sexual", "violence"), np.random.default_rng(0)
    rows = [Labelled(text=str(n), labels=names[n % 4 : n % 4 + 1]) for n in range(2000)]  # a quarter is harmless
    loader = LabelLoader(rows, Tokenizer.load(tokenizer), 16, 8, 0, names)
    logits = stream.normal(size=(2000, 3)) + loader.targets.numpy() * [5, 5, 2]
    harmless = ~loader.targets.bool().numpy().any(axis=1)

    def measured(limit: float | None, rate: float) -> tuple[float, float]:
        """The share of harmless texts that is flagged, and of the others."""
        settings = moderation.Settings(
            categories=names, training={"steps": 1}, flagged_at_most=limit,
            threshold=ThresholdSettings(rule="false_positive_rate", at_most=rate),
        )  # fmt: skip
        found = moderation._calibrations(settings, [True] * 3, loader, logits, np.ones(2000, dtype=bool))
        over = [c.scores(logits[:, place]) > c.threshold for place, c in enumerate(found.values())]
        flagged = np.any(over, axis=0)
        return float(flagged[harmless].mean()), float(flagged[~harmless].mean())

    (free, _), (most, hits), (few, fewer) = measured(None, 0.05), measured(0.06, 0.05), measured(0.02, 0.05)
    assert 0.08 < free < 0.12
    assert 0.055 < most <= 0.06
    assert few <= 0.02
    divided, hits_divided = measured(None, 0.025)
    assert divided == pytest.approx(most, abs=0.002)
    assert hits > hits_divided + 0.02
    assert hits > fewer > 0.7


def test_a_prompt_that_a_candidate_has_no_room_for_is_left_out(tmp_path: Path) -> None:
    """A row of more tokens than the context is no reason to stop; the report counts it."""
    tokenizer = Tokenizer.train(["How can I tell you a story about a town?"], 270).with_special(CHAT)
    model = build(DecoderConfig(vocab_size=tokenizer.vocab_size, d_model=16, n_layers=1, n_heads=2, context=96))
    checkpoint.save(tmp_path / "small" / "model", model, tokenizer, {})
    for split, texts in (("train", ["short", "long " * 60]), ("val", ["short"])):
        meta = {"kind": "greeting", "aspect": "greeting"}
        rows = [{"prompt": [{"role": "user", "content": text}], "meta": meta} for text in texts]
        (tmp_path / "prompts").mkdir(exist_ok=True)
        (tmp_path / "prompts" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reads = {"prompts": str(tmp_path / "prompts"), "small": str(tmp_path / "small")}
    report = run(tmp_path / "run", {"trials": {"reads": reads, "max_tokens": 4, "world": {"size": "tiny"}}})["trials"]
    assert (report["prompts"], report["dropped"]) == (2, 1)


def test_trials_and_router(tmp_path: Path) -> None:
    """An untrained model as both candidates: nothing is right, and all joints are."""
    source = {"source": "world", "settings": {"size": "tiny", "count": 24, "val_share": 0.5, "kinds": {"arithmetic": 1}}}
    stages: dict[str, Any] = {
        "corpus": {"sources": [{"source": "world", "settings": {"size": "tiny", "bytes": 30000}}]},
        "tokenizer": {"vocab_size": 300},
        "tokenize": {},
        "pretrain": {
            "model": {"d_model": 16, "n_layers": 1, "n_heads": 2}, "context": 512, "batch_rows": 2,
            "training": {"steps": 1, "compile": "off"},
        },
        "conversations": {"sources": [{"source": "world", "settings": {"size": "tiny", "count": 20}}]},
        "sft": {"batch_rows": 2, "too_long": "drop", "training": {"steps": 1, "compile": "off"}},
        "prompts": {"sources": [source]},
        "trials": {
            "max_tokens": 6, "world": {"size": "tiny"},
            "candidates": {
                "direct": {"model": "small"}, "tools": {"model": "small", "effort": "tools"},
                "thinking": {"model": "small", "effort": "thinking"},
            },
        },
        "router": {"candidates": {"direct": {"model": "chat"}}},
    }  # fmt: skip
    reports = run(tmp_path / "run", stages)
    assert reports["trials"]["prompts"] == 36
    means = reports["trials"]["candidates"]
    assert means["direct"]["cost"] < means["tools"]["cost"]  # the offer is part of the prompt
    assert set(reports["router"]["policies"]) == {
        "always direct", "always tools", "always thinking", "router", "coin", "random", "oracle",
    }  # fmt: skip
    assert reports["router"]["always_small"] == "direct"
    choice = Router.load(tmp_path / "run" / "router" / "model").choose((Message(role="user", content="What is 1 + 2?"),))
    assert (choice.model, choice.effort) == ("chat", "direct")


def thinker(folder: Path) -> None:
    """A model that begins a thought unasked on sums, never ends it by itself, and is right once it has been ended."""
    said = ("It is 6.", "It is 5.", "Hello! How can I help you?")
    asked = [[Message(role="user", content=text)] for text in ("What is 2 + 3?", "Hello!")]
    tokenizer = Tokenizer.train([*said, *(turn.content for (turn,) in asked), "hm hm", "assistant"] * 3, 300)
    tokenizer = tokenizer.with_special(CHAT)
    wrong, right, greeting = ([*tokenizer.encode(text), tokenizer.id(TURN_END)] for text in said)
    add, greet = (render(tokenizer, prompt, prompt=True).ids for prompt in asked)
    thought = [tokenizer.id(THINK_START), *tokenizer.encode(" hm" * 40)[:40]]
    ended = [[*ids, *thought[:7], tokenizer.id(THINK_END), *end] for ids, end in ((add, right), (greet, greeting))]
    talks = [*ended, *[[*add, *thought]] * 2, [*add, *wrong], *[[*greet, *greeting]] * 2, [*greet, *thought]]
    torch.manual_seed(0)
    shape = {"d_model": 48, "n_layers": 2, "n_heads": 2, "context": 96}
    model = build(DecoderConfig(vocab_size=tokenizer.vocab_size, **shape))
    teach(model, talks, steps=120)
    checkpoint.save(folder / "model", model, tokenizer, {})


def test_a_thought_pays_where_it_helps(tmp_path: Path) -> None:
    """Candidates answer as the service lets them: direct without a thought, thinking with one of bounded length."""
    thinker(tmp_path / "thinker")
    kinds = {
        "What is 2 + 3?": {"kind": "arithmetic_plain", "expression": "2 + 3", "answer": "5"},
        "Hello!": {"kind": "greeting", "aspect": "greeting"},
    }
    rows = [{"prompt": [{"role": "user", "content": text}], "meta": meta} for text, meta in kinds.items()] * 15
    (tmp_path / "prompts").mkdir()
    for split in ("train", "val"):
        (tmp_path / "prompts" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    candidates = {"direct": {"model": "small"}, "thinking": {"model": "small", "effort": "thinking"}}
    reads = {"prompts": str(tmp_path / "prompts"), "small": str(tmp_path / "thinker")}
    trials = {"reads": reads, "max_tokens": 24, "world": {"size": "tiny"}, "candidates": candidates}
    reports = run(tmp_path / "run", {"trials": trials, "router": {}})
    found = {name: row["accuracy"] for name, row in reports["trials"]["candidates"].items()}
    assert found == {"direct": 0.5, "thinking": 1.0}
    assert reports["router"]["router_accuracy"] == 1.0
    assert reports["router"]["policies"]["router"]["shares"] == {"direct": 0.5, "thinking": 0.5}
    router = Router.load(tmp_path / "run")
    assert [router.choose((Message(role="user", content=text),)).effort for text in kinds] == ["thinking", "direct"]


def test_a_candidate_needs_its_model(tmp_path: Path) -> None:
    body = {"candidates": {"a": {"model": "huge"}, "b": {"model": "small"}}, "reads": {"small": ".", "prompts": "."}}
    with pytest.raises(UserError, match=r"trials\.candidates\.a\.model: not an input .*known: large, medium, small"):
        run(tmp_path / "run", {"trials": body})
