"""The baseline: an interpolated Kneser-Ney n-gram model on the same tokens, in bits per byte."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from nestling.core.config import Config
from nestling.core.pipeline import StageContext
from nestling.lineage.ngram import KneserNey, unigram_entropy
from nestling.loading.shards import Shards
from nestling.tokenizer.bpe import Tokenizer

VERSION = 1
READS = {"tokens": "tokenize", "tokenizer": "tokenizer"}


class Settings(Config):
    """Size of the model."""

    order: int = Field(5, ge=1, le=8, description="Longest n-gram.")


def run(settings: Settings, context: StageContext) -> dict[str, Any]:
    """Count on the training split, measure on the validation split."""
    tokenizer = Tokenizer.load(context.reads["tokenizer"])
    train, val = (Shards.open(context.reads["tokens"] / split, tokenizer) for split in ("train", "val"))
    ids = np.asarray(train[:])
    end = tokenizer.end_of_text
    model = KneserNey.train(ids, end_of_text=end, vocab_size=tokenizer.vocab_size, order=settings.order)
    entropy = unigram_entropy(ids, tokenizer.vocab_size)
    return {
        "order": settings.order,
        "val_bpb": round(model.bits_per_byte(np.asarray(val[:]), tokenizer.byte_lengths), 5),
        "unigram_bits_per_token": round(entropy, 4),
        "unigram_bpb": round(entropy * val.tokens / max(1, val.bytes), 4),
    }
