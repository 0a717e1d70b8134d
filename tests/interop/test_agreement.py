"""Programs that read one checkpoint: they agree on a trained model, and a program that differs is caught."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nestling.core.errors import UserError
from nestling.interop.agreement import Case, compare, conversations, reference_cases
from nestling.interop.readers import EngineReader, open_readers
from nestling.model import checkpoint
from nestling.model.checkpoint import Checkpoint
from nestling.model.decoder import build
from nestling.model.hub import make_config
from nestling.model.likelihood import weighted_loss_sum
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.special import CHAT

TEXT = "the cat can't sit on 12 mats and the dog sat on the log, didn't it? Voilà! "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model that has learnt one text."""
    tokenizer = Tokenizer.train([TEXT] * 4, 300).with_special(CHAT)
    sizes = {"vocab_size": tokenizer.vocab_size, "context": 192, "d_model": 32, "n_layers": 2, "n_heads": 4}
    model = build(make_config(sizes))
    ids = torch.tensor([tokenizer.encode(TEXT * 2)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        weights = torch.ones(1, ids.shape[1] - 1)
        weighted_loss_sum(model.hidden(ids[:, :-1]), model.output_weight, ids[:, 1:], weights).backward()
        optimizer.step()
    place = tmp_path_factory.mktemp("agreement") / "model"
    checkpoint.save(place, model.eval(), tokenizer)
    return place


@pytest.fixture(scope="module")
def found(folder: Path) -> Checkpoint:
    return checkpoint.load(folder)


@pytest.fixture(scope="module")
def cases(found: Checkpoint) -> list[Case]:
    return reference_cases(found, conversations(50, chat=True), 8)


def test_everybody_installed_agrees(folder: Path, found: Checkpoint, cases: list[Case], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    readers, absent = open_readers(found, folder, tmp_path, "f32")
    assert "transformers" not in absent
    assert len(cases) > 40
    for reader in readers:
        result = compare(reader, cases, 8)
        assert result.agrees, result
        assert result.same_ids == result.prompts == len(cases)
        assert result.same_replies + result.ties == len(cases)
        assert 0 < result.largest_difference < result.tolerance


def test_other_weights_are_caught(found: Checkpoint, cases: list[Case]) -> None:
    other = checkpoint.Checkpoint(build(found.model.config).eval(), found.tokenizer)
    result = compare(EngineReader(other), cases[:5], 8)
    assert not result.agrees
    assert any("differ by" in line for line in result.complaints)
    assert any("continued otherwise" in line for line in result.complaints)


def test_other_tokens_are_caught(found: Checkpoint, cases: list[Case]) -> None:
    class Stutterer(EngineReader):
        name = "stutterer"

        def ids(self, conversation: object) -> list[int]:
            return [5, *super().ids(conversation)]  # type: ignore[arg-type]

    result = compare(Stutterer(found), cases[:2], 8)
    assert result.same_ids == 0
    assert "becomes other tokens: at 0 5 instead of" in result.complaints[0]


def test_a_tie_is_no_mistake(found: Checkpoint, cases: list[Case]) -> None:
    class Coin(EngineReader):
        def greedy(self, prompts: Sequence[list[int]], count: int) -> list[list[int]]:
            return [[second, *case.reply[1:]]]

    case = cases[0]
    row = case.logprobs[len(case.prompt) - 1]
    second = int(row.topk(2).indices[1])
    even = case.logprobs.clone()
    even[len(case.prompt) - 1, second] = row.max() - 1e-4
    for logprobs, ties in ((case.logprobs, 0), (even, 1)):
        assert compare(Coin(found), [replace(case, logprobs=logprobs)], 8).ties == ties


def test_prompts_that_do_not_fit(found: Checkpoint) -> None:
    with pytest.raises(UserError, match="no prompt fits"):
        reference_cases(found, conversations(3, chat=True), 191)
    with pytest.raises(UserError, match="not so many prompts"):
        conversations(51, chat=True)
