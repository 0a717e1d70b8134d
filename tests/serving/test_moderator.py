"""The moderation model at work: windows, thresholds, categories never trained, folders."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from nestling.core.errors import UserError
from nestling.model import checkpoint
from nestling.model.heads import LabelHead
from nestling.objectives import _toys
from nestling.serving.moderation import Growing, Moderator, Verdict, _windows

LABELS = ("hate", "sexual/minors", "violence")
CALIBRATION = {
    "hate": {"scale": 2.0, "shift": 0.1, "threshold": 0.12, "trained": True},
    "sexual/minors": {"scale": 1.0, "shift": 0.0, "threshold": 1.0, "trained": False},
    "violence": {"scale": 0.5, "shift": -0.2, "threshold": 0.9, "trained": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, which are enough: what matters is what is made of the logits."""
    tokenizer = _toys.byte_tokenizer()
    decoder = _toys.small_decoder(tokenizer, 1, context=32)
    head = LabelHead(decoder.config, LABELS)
    torch.nn.init.normal_(head.score.weight, generator=torch.Generator().manual_seed(0))
    out = tmp_path_factory.mktemp("moderation") / "model"
    checkpoint.save(out, decoder, tokenizer, {"calibration": CALIBRATION}, head)
    return out


@pytest.fixture(scope="module")
def moderator(folder: Path) -> Moderator:
    return Moderator.load(folder)


def score(folder: Path, text: str) -> dict[str, float]:
    """What a verdict's scores should be, one text at a time."""
    found = checkpoint.load_classifier(folder)
    end = found.tokenizer.end_of_text
    ids = torch.tensor([[end, *found.tokenizer.encode(text), end]])
    logits = found.model(ids, torch.tensor([ids.shape[1]]))[0]
    z = torch.tensor([2.0, 0.0, 0.5]) * logits + torch.tensor([0.1, 0.0, -0.2])
    return dict(zip(LABELS, (torch.sigmoid(z) * torch.tensor([1.0, 0.0, 1.0])).tolist(), strict=True))


def test_scores_are_calibrated_and_flags_are_scores_above_the_threshold(folder: Path, moderator: Moderator) -> None:
    texts = ["hello", "a somewhat longer text", "x", "", *("abcdefgh"[n] * (n + 1) for n in range(8))]
    for text, verdict in zip(texts, moderator.judge(texts), strict=True):
        assert verdict.scores == pytest.approx(score(folder, text), abs=1e-5)
        assert verdict.categories["hate"] == (verdict.scores["hate"] > 0.12)
        assert verdict.categories["violence"] == (verdict.scores["violence"] > 0.9)
        assert verdict.flagged == any(verdict.categories.values())
    assert {verdict.flagged for verdict in moderator.judge(texts)} == {True, False}


def test_what_was_never_trained_scores_zero(moderator: Moderator) -> None:
    assert all(verdict.scores["sexual/minors"] == 0.0 for verdict in moderator.judge(["a", "b" * 90]))


def test_a_long_text_scores_what_its_worst_window_scores(folder: Path, moderator: Moderator) -> None:
    text = "".join(chr(97 + (7 * n * n) % 26) for n in range(100))
    parts = ["".join(part) for part in _windows(text, 30)]
    scores = [score(folder, part) for part in parts]
    (verdict,) = moderator.judge([text])
    assert verdict.scores == pytest.approx({name: max(row[name] for row in scores) for name in LABELS}, abs=1e-5)


def test_a_text_that_grows_is_read_in_windows_up_to_each_part(folder: Path, moderator: Moderator) -> None:
    """A token is a character here. Of a part longer than a window all is read, and what stands before it."""
    text = "".join(chr(97 + (7 * n * n) % 26) for n in range(200))
    growing, start, worst = Growing(moderator), 0, dict.fromkeys(LABELS, 0.0)
    for stop in (3, 20, 40, 47, 100, 104, 190, 200):
        verdict = growing.add(text[start:stop])
        seen = text[max(0, min(stop - 30, start - 7)) : stop]
        parts = ["".join(part) for part in _windows(seen, 30)]
        found = {name: max(score(folder, part)[name] for part in parts) for name in LABELS}
        worst = {name: max(worst[name], found[name]) for name in LABELS}
        assert growing.window == seen
        assert verdict.scores == pytest.approx(worst, abs=1e-5)
        assert verdict.categories == {"hate": found["hate"] > 0.12, "sexual/minors": False, "violence": found["violence"] > 0.9}
        assert verdict.flagged == any(verdict.categories.values())
        start = stop
    assert growing.text == text


def test_windows_cover_a_text_and_overlap() -> None:
    for length in range(90):
        parts = _windows(range(length), 20)
        assert all(len(part) <= 20 for part in parts)
        assert {n for part in parts for n in part} == set(range(length))
        assert all(len(set(a) & set(b)) >= 5 for a, b in itertools.pairwise(parts))


def test_many_texts_are_judged_as_one_alone(moderator: Moderator) -> None:
    texts = ["ab" * n for n in range(40)]
    together, alone = moderator.judge(texts), [moderator.judge([text])[0] for text in texts]
    for one, other in zip(together, alone, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-5)
    assert moderator.judge([]) == []
    assert isinstance(together[0], Verdict)


def test_a_stage_or_run_folder_stands_for_its_moderation_model(folder: Path, tmp_path: Path) -> None:
    assert Moderator.load(folder.parent).categories == LABELS
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.json").write_text(json.dumps({"stages": [{"name": "moderation"}, {"name": "evaluate"}]}))
    (run / "moderation").symlink_to(folder.parent)
    assert Moderator.load(run).categories == LABELS
    with pytest.raises(UserError, match="no moderation model"):
        Moderator.load(tmp_path)
