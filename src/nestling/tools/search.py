"""Looks things up in texts of yours, or wherever a searcher of yours looks.

The settings name a folder or file (text, JSON lines, Parquet, compressed or not); its index is built at the first use,
stored beside it and built anew when a file has changed. A dotted name in `searcher` puts any module with a function
`search(query, count) -> list[Passage]` in its place: a web search service, a vector store.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Protocol

from pydantic import Field

from nestling.core import registry
from nestling.core.config import Config
from nestling.core.errors import UserError
from nestling.corpus.sources import files
from nestling.tools._index import ENDING, Index, Passage, files_mark
from nestling.tools._schema import shorten

EXAMPLES = [
    ({"query": "Which animal sleeps in winter?"}, "[1] animals.txt\nIn winter the hedgehog sleeps under leaves."),
    ({"query": "湖水有多深", "count": 1}, "[1] 湖.txt\n湖水很深，最深处四十米。"),
    ({"query": "zebra"}, "nothing found"),
]
NOTHING = "nothing found"


class Settings(Config):
    """Where to look."""

    index: str = ""
    """A folder or file of texts to search in."""
    text_field: str = "text"
    """The field of a row that holds its text, where the texts are rows."""
    store: str = ""
    """The file of the index; empty: beside the texts, as <name>.search.sqlite."""
    passage: int = Field(800, ge=100)
    """Characters of a passage: longer texts are cut between paragraphs."""
    searcher: str = ""
    """A dotted module with search(query, count), in place of an index."""
    characters: int = Field(4000, ge=100)
    """Characters of an answer that are kept."""


class Searcher(Protocol):
    """Whatever finds passages: an index, a module with a function `search`."""

    def search(self, query: str, count: int) -> list[Passage]:
        """The best passages for a query, best first, at most `count`."""
        ...


def call(query: str, count: Annotated[int, Field(ge=1, le=10)] = 3, settings: Settings = Settings()) -> str:
    """Search texts and see the passages that fit best, numbered, each with its source.

    Args:
        query: what to look for, in words that may stand in the texts.
        count: how many passages to show.

    Raises:
        UserError: the settings name nothing to search in, or it can't be read.
    """
    found = open_searcher(settings).search(query, count)
    passages = (f"[{number}] {passage.source}\n{passage.text}" for number, passage in enumerate(found, start=1))
    return shorten("\n\n".join(passages), settings.characters) or NOTHING


@cache
def open_searcher(settings: Settings) -> Searcher:
    """The searcher that the settings name; an index is built where it is missing or out of date.

    Raises:
        UserError: nothing is named, no such module, texts that can't be read, an index that can't be written.
    """
    if settings.searcher:
        module = registry.find("tools", settings.searcher, where="search.searcher")
        if not hasattr(module, "search"):
            raise UserError(
                "the module has no function search", where="search.searcher", value=settings.searcher,
                fix="write search(query, count) -> list[Passage]",
            )  # fmt: skip
        return module
    if not settings.index:
        raise UserError("there is nothing to search in", where="search.index", fix="name a folder or file of texts")
    return _index(settings)


def _index(settings: Settings) -> Index:
    source = files.Settings(
        paths=(settings.index,), text_field=settings.text_field, val_share=0,
        document_characters=settings.passage, on_bad_row="skip",
    )  # fmt: skip
    found = files.files(source)
    texts = Path(settings.index)
    index = Index(Path(settings.store) if settings.store else texts.with_name(texts.name + ENDING))
    mark = files_mark(found, settings.passage, settings.text_field)
    if index.is_of(mark):
        return index
    return Index.build(index.path, files.documents(source, 0, "train", []), mark)


def toy(folder: Path) -> Settings:
    """Settings for the contract test: the texts that `EXAMPLES` speak of."""
    texts = folder / "texts"
    texts.mkdir()
    (texts / "animals.txt").write_text("In winter the hedgehog sleeps under leaves.")
    (texts / "birds.txt").write_text("The stork flies south.")
    (texts / "湖.txt").write_text("湖水很深，最深处四十米。")
    return Settings(index=str(texts))
