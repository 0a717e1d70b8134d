"""Write the corpus as token shards, ready to be memory-mapped."""

from __future__ import annotations

from typing import Any

from nestling.core.config import Config
from nestling.core.pipeline import StageContext
from nestling.core.storage import read_rows
from nestling.core.types import Document
from nestling.loading.shards import encode_documents, write_shards
from nestling.tokenizer.bpe import Tokenizer

VERSION = 1
READS = {"corpus": "corpus", "tokenizer": "tokenizer"}
SPLITS = ("train", "val")


class Settings(Config):
    """Nothing to set: the tokenizer and the corpus say it all."""


def run(settings: Settings, context: StageContext) -> dict[str, Any]:
    """Encode both splits."""
    tokenizer = Tokenizer.load(context.reads["tokenizer"])
    report: dict[str, Any] = {}
    for split in SPLITS:
        documents = read_rows(context.reads["corpus"] / f"{split}.jsonl", Document.from_row)
        texts = (document.text for document in documents)
        index = write_shards(context.folder / split, encode_documents(texts, tokenizer), tokenizer)
        report |= {f"{split}_{name}": index[name] for name in ("documents", "tokens", "bytes")}
    return report
