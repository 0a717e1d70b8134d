"""What the generation tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from toys.models import random_model

from nestling.generation.engine import Engine
from nestling.model.decoder import Decoder
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.special import CHAT


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Toys are too small to share among threads: waiting for each other would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    texts = ["the cat sat on the mat and the dog sat on the log", "12 + 3 = 15", '{"name": "calculator"}'] * 3
    return Tokenizer.train(texts, vocab_size=300).with_special(CHAT)


@pytest.fixture
def model(tokenizer: Tokenizer) -> Decoder:
    return random_model(tokenizer.vocab_size)


@pytest.fixture
def engine(model: Decoder, tokenizer: Tokenizer) -> Engine:
    return Engine(model, tokenizer, rows=8)


@pytest.fixture(scope="session")
def letters() -> Tokenizer:
    """Four tokens: a b c <|endoftext|>."""
    return Tokenizer.characters(["abc"], byte_fallback=False)


@pytest.fixture
def toy(letters: Tokenizer) -> Decoder:
    return random_model(letters.vocab_size, context=16)
