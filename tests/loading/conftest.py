"""Toys for the loaders: a tokenizer of bytes with chat tokens, and a few documents."""

from __future__ import annotations

import pytest

from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.special import CHAT


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["a"], 257).with_special(CHAT)


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return ["abc", "de", "f" * 23, "", "ghijklm", "naïve 🦊", "xy" * 9]
