"""The moderation model at work: texts in, verdicts out, before and after the chat model speaks.

A text longer than the model's context is read in windows that overlap by a quarter, and scores what its worst window
scores. What people make of a verdict goes back as rows `{"text", "labels": {category: true or false}}` of the
categories they spoke of (`core.types.Labelled`), and `nestling moderation` learns from them: never from the model's own
verdicts, which would only confirm what it believes already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from nestling.core.errors import UserError
from nestling.core.native import release_threads
from nestling.evaluation.classification import Calibration
from nestling.loading.labels import FRAME, framed
from nestling.model import checkpoint
from nestling.model.checkpoint import Classifier
from nestling.model.locate import places
from nestling.objectives._scoring import length_groups, pad_ids

OVERLAP = 4  # a window shares one part in so many with the next one
TOKENS = 4096  # padded tokens per forward pass


@dataclass(frozen=True)
class Verdict:
    """What the model says of one text, in the words of OpenAI's endpoint.

    ``Verdict(flagged=True, categories={"hate": True, "violence": False}, scores={"hate": 0.93, "violence": 0.02})``
    """

    flagged: bool
    categories: dict[str, bool]
    scores: dict[str, float]


class Moderator:
    """A classifier with its calibration. `judge` may be called from several threads."""

    def __init__(self, classifier: Classifier) -> None:
        self._model, self._tokenizer = classifier.model.eval(), classifier.tokenizer
        self.categories = classifier.model.head.labels
        rows = classifier.provenance.get("calibration", {})
        self._calibrations = [Calibration(**rows.get(name, {})) for name in self.categories]
        self._room = classifier.model.decoder.config.context - FRAME

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu") -> Moderator:
        """The moderation model of a checkpoint folder, a stage folder, or a run folder that has one.

        Raises:
            UserError: there is none.
        """
        place = next(filter(checkpoint.is_classifier, places(folder)), None)
        if place is None:
            fix = "name the folder that `nestling moderation` wrote"
            raise UserError("no moderation model here", where=folder, fix=fix)
        return cls(checkpoint.load_classifier(place, device))

    def judge(self, texts: Sequence[str]) -> list[Verdict]:
        """The verdict on each text."""
        if not texts:
            return []
        encoded = self._tokenizer.encode_batch(list(texts))
        windows = [(place, part) for place, ids in enumerate(encoded) for part in _windows(ids, self._room)]
        logits = self._logits([framed(self._tokenizer, part) for _, part in windows])
        release_threads()
        columns = [calibration.scores(logits[:, n]) for n, calibration in enumerate(self._calibrations)]
        scores = np.zeros((len(texts), len(self.categories)))
        np.maximum.at(scores, [place for place, _ in windows], np.stack(columns, axis=1))
        return [self._verdict(row) for row in scores]

    def recent(self, text: str, new: int) -> str:
        """The end of a text that tells what its last `new` characters say: one window, more where they are longer."""
        spans = self._tokenizer.spans(text)
        first = sum(end <= len(text) - new for _, end in spans) - self._room // OVERLAP
        start = max(0, min(first, len(spans) - self._room))
        return text[spans[start][0] :] if start else text

    @torch.inference_mode()
    def _logits(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """[N, L] float64; rows of similar length are read together."""
        ids, lengths = pad_ids(rows, self._tokenizer.filler)
        device = next(self._model.parameters()).device
        logits = np.zeros((len(rows), len(self.categories)))
        for group in length_groups(lengths, TOKENS):
            part = ids[group, : int(lengths[group].max())].to(device)
            logits[group.numpy()] = self._model(part, lengths[group].to(device)).double().cpu().numpy()
        return logits

    def _verdict(self, scores: np.ndarray) -> Verdict:
        named = dict(zip(self.categories, scores.tolist(), strict=True))
        over = (scores > [calibration.threshold for calibration in self._calibrations]).tolist()
        return Verdict(any(over), dict(zip(self.categories, over, strict=True)), named)


class Growing:
    """A text that is judged while it is written: each part with as much before it as one window holds."""

    def __init__(self, moderator: Moderator) -> None:
        self._moderator = moderator
        self._scores: dict[str, float] = {}
        self.text = self.window = ""
        """All so far, and the end of it that is read again with what comes."""

    def add(self, new: str) -> Verdict:
        """What is to be said of the text now that `new` has come: flags of what is new, the highest scores of all of it."""
        self.text += new
        self.window = self._moderator.recent(self.window + new, len(new))
        [verdict] = self._moderator.judge([self.window])
        self._scores = {name: max(score, self._scores.get(name, 0.0)) for name, score in verdict.scores.items()}
        return replace(verdict, scores=self._scores)


def _windows(ids: Sequence[int], room: int) -> list[Sequence[int]]:
    """Parts of at most ``room`` tokens that cover a text, each overlapping the one before.

    >>> _windows(range(10), 4)
    [range(0, 4), range(3, 7), range(6, 10)]
    """
    stride = room - room // OVERLAP
    last = max(0, len(ids) - room)
    return [ids[start : start + room] for start in [*range(0, last, stride), last]]
