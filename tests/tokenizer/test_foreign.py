"""Tokenizer folders of other families: Qwen's shape (normaliser, visible control tokens) and Llama 3's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from nestling.core.errors import UserError
from nestling.core.types import Message
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.conversation import render
from nestling.tokenizer.special import CHAT

TEXT = "The quick brown fox can't jump over 1234 lazy dogs. Voilà! Ça va? 你好，世界\n\n" * 5


def _definition(digits: int) -> dict[str, Any]:
    return json.loads(json.dumps(Tokenizer.train([TEXT], 400, digits=digits).definition)) | {"added_tokens": []}


def _write(folder: Path, definition: dict[str, Any], names: tuple[str, ...], hidden: bool) -> Path:
    core = tokenizers.Tokenizer.from_str(json.dumps(definition))
    add = core.add_special_tokens if hidden else core.add_tokens
    add([tokenizers.AddedToken(name, normalized=False, special=hidden) for name in names])
    core.save(str(folder / "tokenizer.json"))
    return folder


def test_qwen_shape(tmp_path: Path) -> None:
    definition = _definition(1) | {"normalizer": {"type": "NFC"}}
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>")
    tokenizer = Tokenizer.load(_write(tmp_path, definition, names, hidden=False))
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.is_fast

    @settings(max_examples=150, deadline=None)
    @given(st.text(st.sampled_from("aé\u0301e\u0300 한1\n가ᄀ\u1161")) | st.text())
    def check(text: str) -> None:
        assert tokenizer.encode(text) == theirs.encode(text).ids

    check()
    chat = tokenizer.with_special(CHAT)
    assert chat.vocab_size == tokenizer.vocab_size + 1  # only <|pad|> was missing
    assert not set(chat.encode("<think><|im_end|>")) & set(chat.special.values())
    assert render(chat, [Message(role="user", content="hi")]).ids[0] == tokenizer.id("<|im_start|>")


def test_llama3_shape(tmp_path: Path) -> None:
    definition = _definition(3)
    definition["model"]["ignore_merges"] = True
    begin = {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|begin_of_text|>": {"id": "<|begin_of_text|>", "ids": [399], "tokens": ["<|begin_of_text|>"]}
        },
    }
    tokenizer = Tokenizer.load(_write(tmp_path, definition, ("<|begin_of_text|>", "<|end_of_text|>"), hidden=True))
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in (TEXT, "123456 fox", "quick", "🦊"):
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    assert tokenizer.end_of_text == tokenizer.id("<|end_of_text|>")


def test_a_vocabulary_that_tiktoken_would_read_otherwise_is_not_fast() -> None:
    """Merges out of id order, or a token that its own merges never reach: the slow encoder is used, ids stay right."""
    definition = _definition(1)
    definition["model"]["merges"] = definition["model"]["merges"][::-1]
    swapped = Tokenizer(definition)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(definition))
    assert not swapped.is_fast
    assert swapped.encode(TEXT) == theirs.encode(TEXT).ids == swapped.encode_batch([TEXT])[0]


def test_a_token_that_only_whole_words_reach_is_not_fast() -> None:
    """With ignore_merges a word in the vocabulary is one token though no merges lead there; tiktoken would also use
    it inside other words."""
    definition = _definition(1)
    model = definition["model"]
    size = len(model["vocab"])
    model["vocab"] |= {"zq": size, "qx": size + 1, "zqx": size + 2}
    model["merges"] += [["q", "x"], ["z", "q"], ["zq", "x"]]
    model["vocab"] |= {"qx": size, "zq": size + 1}
    model["ignore_merges"] = True
    tokenizer, theirs = Tokenizer(definition), tokenizers.Tokenizer.from_str(json.dumps(definition))
    assert not tokenizer.is_fast
    for text in ("zqx", "zqxa", "azqx zqx"):
        assert tokenizer.encode(text) == theirs.encode(text).ids


def test_other_families_are_refused(tmp_path: Path) -> None:
    definition = _definition(1)
    definition["pre_tokenizer"] = {"type": "Whitespace"}
    definition["decoder"] = {"type": "BPEDecoder", "suffix": "</w>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(UserError, match=r"can't be read back.*BPEDecoder"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition | {"decoder": None}))
    with pytest.raises(UserError, match="no decoder"):
        Tokenizer.load(tmp_path)


def test_a_definition_that_the_library_refuses_is_one_line(tmp_path: Path) -> None:
    definition = _definition(1)
    definition["model"]["merges"].append(["no", "such token"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(UserError, match="can't read it") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_blank_added_tokens_are_text(tmp_path: Path) -> None:
    """As in GPT-NeoX: runs of spaces appended to the vocabulary."""
    folder = _write(tmp_path, _definition(1), ("    ", "  "), hidden=False)
    tokenizer, theirs = Tokenizer.load(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "def f():\n    if x:\n        return  1"
    assert tokenizer.encode(text) == theirs.encode(text).ids == tokenizer.encode_batch([text])[0]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert not tokenizer.special
    assert sum(tokenizer.byte_lengths[number] for number in tokenizer.encode(text)) == len(text)
