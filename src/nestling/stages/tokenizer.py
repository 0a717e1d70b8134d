"""Learn a vocabulary from the corpus: byte-level BPE, characters, or GPT-2's ready-made one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from nestling.core.config import Config
from nestling.core.errors import UserError
from nestling.core.pipeline import StageContext
from nestling.core.storage import read_rows
from nestling.core.types import Document
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.patterns import Pattern

VERSION = 1
READS = {"corpus": "corpus"}


class Settings(Config):
    """How text is cut into tokens."""

    kind: Literal["bpe", "characters", "gpt2"] = Field("bpe", description="Learn BPE, use characters, or read GPT-2's.")
    vocab_size: int = Field(4096, ge=257, description="Tokens in all, 256 bytes and the end-of-text token included (bpe).")
    pattern: Pattern = Field("gpt4", description="How text is split before merging: gpt4 or gpt2 (bpe).")
    digits: int = Field(1, ge=1, le=3, description="Longest run of digits in one token (bpe); 1 helps tiny models copy.")
    megabytes: float = Field(20.0, gt=0, description="How much of the corpus is read to learn the vocabulary.")
    folder: str = Field("", description="Folder with GPT-2's vocab.json and merges.txt (gpt2).")

    @model_validator(mode="after")
    def _gpt2_needs_files(self) -> Settings:
        if self.kind == "gpt2" and not self.folder:
            raise UserError("kind gpt2 reads two files", fix="give their folder")
        return self


def run(settings: Settings, context: StageContext) -> dict[str, Any]:
    """Train or read the tokenizer and save it in the form that every Hugging Face reader opens."""
    texts = _texts(context.reads["corpus"] / "train.jsonl", int(settings.megabytes * 1e6))
    if settings.kind == "gpt2":
        folder = Path(settings.folder)
        tokenizer = Tokenizer.from_gpt2(folder / "vocab.json", folder / "merges.txt")
    elif settings.kind == "characters":
        tokenizer = Tokenizer.characters(texts)
    else:
        tokenizer = Tokenizer.train(texts, settings.vocab_size, pattern=settings.pattern, digits=settings.digits)
    tokenizer.save(context.folder)
    held_out = list(_texts(context.reads["corpus"] / "val.jsonl", 1_000_000))
    tokens = sum(len(ids) for ids in tokenizer.encode_batch(held_out))
    size = sum(len(text.encode()) for text in held_out)
    return {"vocab_size": tokenizer.vocab_size, "bytes_per_token": round(size / max(1, tokens), 3)}


def _texts(path: Path, most_bytes: int) -> Iterator[str]:
    """Texts of a document file until their size reaches the limit."""
    size = 0
    for document in read_rows(path, Document.from_row):
        yield document.text
        size += len(document.text.encode())
        if size >= most_bytes:
            return
