"""The character-level tokenizer: a vocabulary of characters behind the same interface."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.special import CHAT


def test_vocabulary_is_the_characters_of_the_text() -> None:
    tokenizer = Tokenizer.characters(["hello world"], byte_fallback=False)
    assert tokenizer.vocab_size == len(set("hello world")) + 1
    assert tokenizer.encode("hold") == [" dehlorw".index(character) for character in "hold"]
    assert tokenizer.byte_lengths == [1] * 8 + [0]


def test_any_text_round_trips_through_byte_fallback() -> None:
    tokenizer = Tokenizer.characters(["hello wörld 中"])

    @settings(max_examples=200, deadline=None)
    @given(st.text())
    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert sum(tokenizer.byte_lengths[number] for number in ids) == len(text.encode())

    check()


@pytest.mark.parametrize("byte_fallback", [True, False])
def test_transformers_reads_it(tmp_path: Path, byte_fallback: bool) -> None:
    transformers = pytest.importorskip("transformers")
    text = "To be, or not to be:\nthat is the question — 中文."
    tokenizer = Tokenizer.characters([text], byte_fallback=byte_fallback).with_special(CHAT)
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for sample in (text, "be  not\n\n", "naïve 🦊" if byte_fallback else "to"):
        assert theirs.encode(sample, add_special_tokens=False) == tokenizer.encode(sample)
        assert theirs.decode(tokenizer.encode(sample)) == sample
    again = Tokenizer.load(tmp_path)
    assert (again.hash, again.encode(text)) == (tokenizer.hash, tokenizer.encode(text))
