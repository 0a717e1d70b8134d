"""Models in other families' forms: engine, transformers and llama.cpp read our export of them as the trainer does."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import FORMS, make
from toys.models import random_model

from nestling.interop.agreement import compare, conversations, reference_cases
from nestling.interop.readers import open_readers
from nestling.model.checkpoint import Checkpoint, save
from nestling.tokenizer.bpe import Tokenizer


@pytest.mark.parametrize("family", ["llama3", "mistral", "gemma", "zephyr"])
def test_everybody_agrees(family: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    tokenizer = Tokenizer.load(make(tmp_path / "made", FORMS[family]))
    found = Checkpoint(random_model(tokenizer.vocab_size, context=512), tokenizer)
    save(tmp_path / "saved", found.model, tokenizer)
    asked = conversations(50, chat=True)
    asked = asked[:8] + asked[25:30] + asked[11:13]
    cases = reference_cases(found, asked, 4)
    roles = {message.role for case in cases for message in case.conversation.messages}
    assert ("system" in roles) == (family not in ("mistral", "gemma"))  # whose templates have no form for it
    readers, _ = open_readers(found, tmp_path / "saved", tmp_path, "f32")
    for reader in readers:
        result = compare(reader, cases, 4)
        assert result.agrees, result.complaints[:3]


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen"])
def test_everybody_agrees_on_tools(family: str, tmp_path: Path) -> None:
    """Definitions, calls, answers and thoughts, in templates that write each in a way of its own."""
    pytest.importorskip("transformers")
    tokenizer = Tokenizer.load(make(tmp_path / "made", FORMS[family]))
    found = Checkpoint(random_model(tokenizer.vocab_size, context=1024), tokenizer)
    save(tmp_path / "saved", found.model, tokenizer)
    cases = reference_cases(found, conversations(4, chat=True, tools=True), 2)
    assert len(cases) == 4
    assert all("Finds “texts”" in tokenizer.decode(case.prompt) for case in cases)
    readers, _ = open_readers(found, tmp_path / "saved", tmp_path, "f32")
    for reader in readers:
        result = compare(reader, cases, 2)
        assert result.agrees, result.complaints[:3]


def test_tool_calls_are_left_out_where_the_template_has_no_form_for_them(tmp_path: Path) -> None:
    source = "{{ bos_token }}{% if tools %}{{ raise_exception('no tools') }}{% endif %}{{ messages[0]['content'] }}"
    tokenizer = Tokenizer.load(make(tmp_path / "made", {**FORMS["llama3"], "template": source}))
    found = Checkpoint(random_model(tokenizer.vocab_size, context=512), tokenizer)
    assert tokenizer.takes_tools
    assert len(reference_cases(found, conversations(6, chat=True, tools=True), 2)) == 2
