"""The classifier: its loss by hand, its checkpoint beside transformers, its further training."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from nestling.core.errors import UserError
from nestling.core.runtime import detect
from nestling.core.types import Labelled
from nestling.loading.labels import LabelLoader
from nestling.model import checkpoint
from nestling.model.checkpoint import Checkpoint
from nestling.model.decoder import build
from nestling.model.heads import LabelHead, Labeller
from nestling.model.hub import make_config
from nestling.objectives import _toys, classify
from nestling.objectives._materials import Materials
from nestling.training.loop import train
from nestling.training.settings import TrainSettings

LABELS = ("hate", "violence", "self-harm/intent")


def scattered(head: LabelHead) -> LabelHead:
    torch.nn.init.normal_(head.score.weight, generator=torch.Generator().manual_seed(0))
    return head


def test_the_loss_is_a_loop_over_judgements_read_at_the_last_token() -> None:
    objective = classify.toy(3)
    scattered(objective.model.head)
    (update,) = objective.updates(1)
    (batch,) = update.microbatches
    hidden = objective.model.decoder.hidden(batch.ids).detach()
    expected, count = 0.0, 0
    for row, length in enumerate(batch.lengths.tolist()):
        for place in range(3):
            if batch.judged[row, place]:
                z = float(hidden[row, length - 1] @ objective.model.head.score.weight[place].detach())
                expected += math.log1p(math.exp(-z if batch.targets[row, place] else z))
                count += 1
    (term,) = objective.terms(batch)
    assert float(term.sum.detach()) == pytest.approx(expected, rel=1e-5)
    assert update.counts[term.per] == count < 3 * len(batch)


def test_validation_by_hand() -> None:
    """All logits are zero: nothing is flagged, and each judgement costs log 2."""
    objective = classify.toy(0)
    held_out = objective.held_out
    assert held_out is not None
    found = objective.validate()
    assert found["val_loss"] == pytest.approx(math.log(2))
    right = (held_out.targets == 0)[held_out.judged].float().mean()
    assert found["val_judgement_accuracy"] == pytest.approx(float(right))
    clean = [not row.labels for row in held_out.rows]
    assert found["val_exact_accuracy"] == pytest.approx(sum(clean) / len(clean))


def test_logits_do_not_depend_on_the_batch() -> None:
    objective = classify.toy(1)
    scattered(objective.model.head)
    assert objective.held_out is not None
    whole = objective.logits(objective.held_out)
    objective.settings = classify.Settings(score_tokens=1)  # a row at a time
    torch.testing.assert_close(objective.logits(objective.held_out), whole, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gpt2"])
@pytest.mark.filterwarnings("ignore")
def test_transformers_gives_the_same_logits(architecture: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = _toys.byte_tokenizer()
    sizes = {"vocab_size": tokenizer.vocab_size, "context": 64, "d_model": 32, "n_layers": 2, "n_heads": 4}
    decoder = build(make_config({**sizes, "architecture": architecture, "init": "gpt2"})).eval()
    head = scattered(LabelHead(decoder.config, LABELS))
    checkpoint.save(tmp_path / "m", decoder, tokenizer, {"calibration": {}}, head)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    assert type(theirs).__name__.endswith("ForSequenceClassification")
    assert theirs.config.problem_type == "multi_label_classification"
    assert [theirs.config.id2label[place] for place in range(3)] == list(LABELS)
    rows = [Labelled(text=text, labels=()) for text in ("short", "a somewhat longer text", "x")]
    (batch,) = LabelLoader(rows, tokenizer, 64, 3, 0, LABELS).validation()
    padding = torch.arange(batch.ids.shape[1]) < batch.lengths.unsqueeze(1)
    expected = theirs(batch.ids, attention_mask=padding.long()).logits
    found = checkpoint.load_classifier(tmp_path / "m")
    assert found.model.head.labels == LABELS
    torch.testing.assert_close(found.model(batch.ids, batch.lengths), expected, atol=1e-5, rtol=0)


def test_a_classifier_is_no_chat_model_and_the_other_way_round(tmp_path: Path) -> None:
    tokenizer = _toys.byte_tokenizer()
    decoder = _toys.small_decoder(tokenizer, 0)
    checkpoint.save(tmp_path / "labels", decoder, tokenizer, head=LabelHead(decoder.config, LABELS))
    checkpoint.save(tmp_path / "chat", decoder, tokenizer)
    assert checkpoint.is_classifier(tmp_path / "labels")
    assert not checkpoint.is_classifier(tmp_path / "chat")
    assert not checkpoint.is_classifier(tmp_path)
    with pytest.raises(UserError, match="writes none"):
        checkpoint.load(tmp_path / "labels")
    with pytest.raises(UserError, match="does not label"):
        checkpoint.load_classifier(tmp_path / "chat")


def test_it_trains_from_materials_and_goes_on_from_a_classifier(tmp_path: Path) -> None:
    toy = classify.toy(1)
    runtime = detect("cpu", "bf16")
    found = Checkpoint(toy.model.decoder, _toys.byte_tokenizer())
    given = {"texts": toy.texts, "held_out": toy.held_out}
    stuff = Materials(runtime, 1, tmp_path, models={"model": found}, given=given)
    objective = classify.build(classify.Settings(), stuff)
    settings = TrainSettings(steps=30, optimizer="adamw", learning_rate=0.01, schedule="constant", compile="off")
    train(objective, settings, folder=tmp_path, runtime=runtime, seed=1, quiet=True)
    assert objective.validate()["val_loss"] < 0.6
    earlier = Labeller(objective.model.decoder, objective.model.head)
    again = classify.build(classify.Settings(), Materials(runtime, 1, tmp_path, given={**given, "classifier": earlier}))
    assert again.validate() == objective.validate()
