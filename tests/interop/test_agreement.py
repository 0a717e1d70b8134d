"""Programs that read one checkpoint: they agree on a trained model, and a program that differs is caught."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nestling.core.errors import UserError
from nestling.core.types import Conversation
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
    sizes = {"vocab_size": tokenizer.vocab_size, "context": 320, "d_model": 32, "n_layers": 2, "n_heads": 4}
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
    return reference_cases(found, conversations(50, chat=True, tools=True), 8)


def test_everybody_installed_agrees(folder: Path, found: Checkpoint, cases: list[Case], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    readers, absent = open_readers(found, folder, tmp_path, "f32")
    assert "transformers" not in absent
    assert len(cases) == 50
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
        reference_cases(found, conversations(3, chat=True), 319)
    with pytest.raises(UserError, match="not so many prompts"):
        conversations(51, chat=True)


def test_tools_and_thoughts_are_among_the_prompts(found: Checkpoint, cases: list[Case]) -> None:
    """What templates write differently is asked: an offer, calls, answers, a thought that is over and one that is not."""
    texts = [found.tokenizer.decode(case.prompt, control=True) for case in cases]
    assert sum("Tools: calculator, search" in text for text in texts) == 4
    call = '<tool_call>{"name": "calculator", "arguments": {"expression": "412 + 389"}}</tool_call>'
    assert sum(call in text for text in texts) == 2
    assert any('{"query": "the \\"Großer See\\" <b>", "limit": 3}' in text for text in texts)
    assert any("<|im_start|>tool\n801<|im_end|>" in text for text in texts)
    assert any("<think>Two things.</think>Both at once.<tool_call>" in text for text in texts)
    assert any("<think>" in message.content for case in cases for message in case.conversation.messages[:-2])
    assert not any(case.conversation.tools for case in cases[:46])
    assert not any(asked.tools for asked in conversations(50, chat=True))


def test_a_template_that_writes_calls_otherwise_is_caught(found: Checkpoint, cases: list[Case]) -> None:
    class Forgetful(EngineReader):
        def ids(self, conversation: Conversation) -> list[int]:
            messages = tuple(message.model_copy(update={"tool_calls": ()}) for message in conversation.messages)
            return super().ids(conversation.model_copy(update={"messages": messages}))

    assert compare(Forgetful(found), cases, 8).same_ids == len(cases) - 3


def test_the_command_says_nothing_but_its_table(folder: Path) -> None:
    pytest.importorskip("transformers")
    command = [sys.executable, "-m", "nestling", "verify-export", str(folder), "--prompts", "5", "--new-tokens", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line for line in done.stderr.splitlines() if "llama.cpp: not installed" not in line] == []
    assert "against the trainer" in done.stdout.splitlines()[0]
    assert "transformers" in done.stdout
