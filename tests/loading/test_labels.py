"""Labelled texts become batches: framed, padded, with what nobody judged marked."""

from __future__ import annotations

import pytest
import torch

from nestling.core.errors import UserError
from nestling.core.types import Labelled
from nestling.loading.labels import LabelLoader
from nestling.tokenizer.bpe import Tokenizer

ROWS = [
    Labelled(text="ab", labels=("hate",)),
    Labelled(text="c", labels=(), judged=("violence",)),
    Labelled(text="defgh", labels=("hate", "violence")),
]


def loader(tokenizer: Tokenizer, rows: list[Labelled] = ROWS, context: int = 16, **options: str) -> LabelLoader:
    return LabelLoader(rows, tokenizer, context, 2, 0, ("violence", "hate"), **options)


def test_a_batch_by_hand(tokenizer: Tokenizer) -> None:
    first, second = loader(tokenizer).validation()
    end, pad = tokenizer.end_of_text, tokenizer.id("<|pad|>")
    assert first.ids[0, :5].tolist() == [end, *tokenizer.encode("ab"), end, pad]
    assert first.lengths.tolist() == [4, 3]
    assert first.targets.tolist() == [[0, 1], [0, 0]]  # the columns are violence, hate
    assert first.judged.tolist() == [[True, True], [True, False]]
    assert second.targets.tolist() == [[1, 1]]
    assert second.ids.shape == (1, 16)


def test_every_text_once_per_epoch(tokenizer: Tokenizer) -> None:
    batches = [loader(tokenizer).batch(step) for step in range(3)]  # two epochs of three texts
    lengths = torch.cat([batch.lengths for batch in batches])
    assert sorted(lengths[:3].tolist()) == sorted(lengths[3:].tolist()) == [3, 4, 7]
    again = loader(tokenizer).batch(1)
    assert torch.equal(again.ids, batches[1].ids)


def test_long_texts_are_cut_dropped_or_refused(tokenizer: Tokenizer) -> None:
    cut = loader(tokenizer, context=6)
    assert (cut.cut, cut.dropped) == (1, 0)
    assert next(iter(list(cut.validation())[1:])).ids[0].tolist()[1:5] == tokenizer.encode("defg")
    dropped = loader(tokenizer, context=6, too_long="drop")
    assert (dropped.dropped, len(dropped.rows), len(dropped.targets)) == (1, 2, 2)
    with pytest.raises(UserError, match="text 2 has 5 tokens"):
        loader(tokenizer, context=6, too_long="error")


def test_a_label_must_be_a_category(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="did you mean 'violence'"):
        loader(tokenizer, [Labelled(text="x", labels=("violense",))])
    with pytest.raises(UserError, match="no text"):
        loader(tokenizer, [])


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["hate"], (("hate",), None)),
        ([], ((), None)),
        ({"hate": True, "violence": 0, "sexual": None}, (("hate",), ("hate", "violence"))),
    ],
)
def test_labels_are_a_list_or_say_what_was_looked_at(labels: object, expected: tuple[object, object]) -> None:
    row = Labelled.from_row({"text": "x", "labels": labels})
    assert (row.labels, row.judged) == expected
    assert Labelled.from_row(row.to_row()) == row


@pytest.mark.parametrize("row", [{"labels": {"hate": 0.5}}, {"labels": ["hate"], "judged": ["violence"]}, {}])
def test_a_bad_row_is_refused(row: dict[str, object]) -> None:
    with pytest.raises(UserError, match="labels"):
        Labelled.from_row({"text": "x", **row})
