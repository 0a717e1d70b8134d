"""A full-text index in one SQLite file: passages of documents, found by BM25 over their words.

The words are FTS5's, stemmed for English and blind to accents. Chinese and Japanese are written without spaces, so every
character is a word of its own there, and a query asks for pairs of neighbours: two characters are what most words have.
Not covered: meaning (a synonym is another word), Thai and other scripts without spaces.
BM25: Robertson & Zaragoza, 2009, The Probabilistic Relevance Framework; k1 = 1.2, b = 0.75 are SQLite's.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from nestling.core.errors import UserError
from nestling.core.types import Document

FORM = "1"  # of the file; another one is built anew
MAX_TERMS = 64  # of a query
ENDING = ".search.sqlite"

_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_CHARACTER = re.compile(f"([{_UNSPACED}])")
_TERM = re.compile(f"[{_UNSPACED}]+|[^\\W{_UNSPACED}]+")


class Passage(NamedTuple):
    """A piece of a document that answers a query, where it is from, and how well it fits (higher is better)."""

    text: str
    source: str
    score: float


class Index:
    """Passages that can be searched.

    >>> index = Index(Path("docs.search.sqlite"))               # doctest: +SKIP
    >>> index.search("how deep is the lake", 3)                 # doctest: +SKIP
    [Passage(text='The lake is 40 m deep …', source='lakes.txt', score=3.1), …]
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def search(self, query: str, count: int) -> list[Passage]:
        """The passages that fit best, in order; any of the query's words counts."""
        terms = _terms(query)
        if not terms:
            return []
        with _open(self.path) as database:
            rows = database.execute(
                "SELECT text, source, -bm25(words) FROM words JOIN passages ON passages.rowid = words.rowid"
                " WHERE words MATCH ? ORDER BY bm25(words), words.rowid LIMIT ?",
                (" OR ".join(terms), count),
            ).fetchall()
        return [Passage(*row) for row in rows]

    @classmethod
    def build(cls, path: Path, documents: Iterable[Document], mark: str = "") -> Index:
        """Write the index of these documents, all of it or nothing.

        Args:
            mark: what the documents are known by; `is_of` asks for it.

        Raises:
            UserError: the file can't be written, or there is no document.
        """
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with _open(unfinished, write=True) as database:
                if not _fill(database, documents, mark):
                    raise UserError("there is no text to search in", where=path)
            unfinished.replace(path)
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"can't be written: {error}", where=path, fix="choose another place (store)") from None
        finally:
            unfinished.unlink(missing_ok=True)
        return cls(path)

    def is_of(self, mark: str) -> bool:
        """Whether the file exists, was finished, and was built from what `mark` stands for."""
        if not self.path.exists():
            return False
        try:
            with _open(self.path) as database:
                return database.execute("SELECT form, mark FROM about").fetchone() == (FORM, mark)
        except sqlite3.DatabaseError:
            return False


def files_mark(paths: Iterable[Path], *more: object) -> str:
    """A short text that changes when a file of these is changed, added or removed."""
    digest = hashlib.blake2b(repr(more).encode(), digest_size=16)
    for path in paths:
        about = path.stat()
        digest.update(f"{path}\0{about.st_size}\0{about.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _fill(database: sqlite3.Connection, documents: Iterable[Document], mark: str) -> int:
    """Write all tables; returns the number of passages."""
    database.executescript(
        "CREATE TABLE about(form TEXT, mark TEXT); CREATE TABLE passages(text TEXT, source TEXT);"
        "CREATE VIRTUAL TABLE words USING"
        " fts5(body, content='', tokenize='porter unicode61 remove_diacritics 2')"
    )
    number = 0
    for number, document in enumerate(documents, start=1):
        source = document.url or document.id
        database.execute("INSERT INTO passages(rowid, text, source) VALUES (?, ?, ?)", (number, document.text, source))
        database.execute("INSERT INTO words(rowid, body) VALUES (?, ?)", (number, _spaced(document.text)))
    database.execute("INSERT INTO words(words) VALUES ('optimize')")
    database.execute("INSERT INTO about VALUES (?, ?)", (FORM, mark))
    database.commit()
    return number


@contextlib.contextmanager
def _open(path: Path, write: bool = False) -> Iterator[sqlite3.Connection]:
    """A connection of its own for each use, so that any thread may search."""
    database = sqlite3.connect(path if write else f"{path.absolute().as_uri()}?mode=ro", uri=not write)
    try:
        yield database
    finally:
        database.close()


def _spaced(text: str) -> str:
    """Each character of a script without spaces stands alone."""
    return _CHARACTER.sub(r" \1 ", text)


def _terms(query: str) -> list[str]:
    """The query's words as FTS5 strings; a run of unspaced characters becomes its pairs of neighbours.

    >>> _terms("AI 数据库")
    ['"AI"', '"数 据"', '"据 库"']
    """
    found: dict[str, None] = {}
    for word in _TERM.findall(query):
        unspaced = _CHARACTER.match(word) and len(word) > 1
        pieces = [f"{first} {second}" for first, second in pairwise(word)] if unspaced else [word]
        found.update((f'"{piece}"', None) for piece in pieces)
    return list(found)[:MAX_TERMS]
