"""Search over files of one's own, against plain expectations and the BM25 formula."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nestling import tools
from nestling.core.errors import UserError
from nestling.core.types import Document
from nestling.tools import search
from nestling.tools._index import Index
from nestling.tools.search import Settings, open_searcher


def index_of(path: Path, texts: list[str]) -> Index:
    return Index.build(path, [Document(id=f"d{n}", text=text) for n, text in enumerate(texts)])


def test_scores_are_bm25(tmp_path: Path) -> None:
    """SQLite's form: idf = ln((N - n + 0.5) / (n + 0.5)), k1 = 1.2, b = 0.75."""
    texts = ["lake deep lake", "lake", "hill high", "river runs down", "boat on a river bank", "old mill"]
    words = [text.split() for text in texts]
    mean = sum(map(len, words)) / len(words)

    def score(query: list[str], document: list[str]) -> float:
        total = 0.0
        for word in query:
            holding = sum(word in other for other in words)
            idf = max(1e-6, math.log((len(words) - holding + 0.5) / (holding + 0.5)))
            count = Counter(document)[word]
            total += idf * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * len(document) / mean))
        return total

    found = index_of(tmp_path / "i", texts).search("lake deep", 5)
    expected = {f"d{n}": score(["lake", "deep"], document) for n, document in enumerate(words)}
    assert [passage.source for passage in found] == ["d0", "d1"]
    for passage in found:
        assert passage.score == pytest.approx(expected[passage.source], rel=1e-6)


@pytest.mark.parametrize(
    ("query", "source"),
    [
        ("hedgehogs sleeping", "d0"),  # stems
        ("CAFE", "d1"),  # case and accents
        ("数据库", "d2"),
        ("数据", "d2"),  # a word of two characters
        ("湖", "d3"),  # of one
        ("GPT模型", "d4"),
        ("東京タワー", "d5"),
        ('"NEAR(" OR * : -', None),  # the query language of the engine is not the user's
        ("", None),
        ("\0", None),
    ],
)
def test_words_are_found(tmp_path: Path, query: str, source: str | None) -> None:
    texts = [
        "The hedgehog sleeps.",
        "A café near here",
        "关系数据库很快",
        "湖很深",
        "GPT 是一个模型",
        "東京タワーは高い",
    ]
    found = index_of(tmp_path / "i", texts).search(query, 1)
    assert [passage.source for passage in found] == ([source] if source else []) or query.startswith('"')


def test_folders_rows_and_long_texts(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    (folder / "inner").mkdir(parents=True)
    long = "\n\n".join(f"Paragraph {n} is about nothing. " * 5 for n in range(20)) + "\n\nThe anchor is heavy."
    (folder / "inner" / "long.txt").write_text(long)
    rows = [{"id": "r1", "text": "A kite flies.", "url": "https://example.org/kite"}, {"text": 3}, {"text": "A drum."}]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {"index": str(folder), "passage": 300}
    with tools.Toolbox.open({"search": settings}) as box:
        assert box.run("search", {"query": "kite"}) == "[1] https://example.org/kite\nA kite flies."
        answer = box.run("search", {"query": "anchor", "count": 1})
    assert answer.startswith("[1] long.txt#")
    assert "The anchor is heavy." in answer
    assert len(answer) < 350


def test_index_is_built_once_and_again_when_a_file_changes(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.txt").write_text("The stork flies south.")
    settings = Settings(index=str(folder))
    assert "stork" in search.call("stork", settings=settings)
    stored = tmp_path / "docs.search.sqlite"
    first = stored.stat().st_mtime_ns
    open_searcher.cache_clear()
    assert "stork" in search.call("stork", settings=settings)
    assert stored.stat().st_mtime_ns == first
    (folder / "a.txt").write_text("The heron stays here.")
    open_searcher.cache_clear()
    assert search.call("stork", settings=settings) == "nothing found"
    stored.write_bytes(b"not a database at all" * 100)
    open_searcher.cache_clear()
    assert "heron" in search.call("heron", settings=settings)
    assert [path.name for path in tmp_path.iterdir()] in (["docs", stored.name], [stored.name, "docs"])


def test_store_elsewhere_and_errors(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.txt").write_text("word")
    search.call("word", settings=Settings(index=str(folder), store=str(tmp_path / "kept.sqlite")))
    assert (tmp_path / "kept.sqlite").exists()
    for settings, words in (
        (Settings(), "nothing to search in"),
        (Settings(index=str(tmp_path / "nope")), "no such file"),
        (Settings(index=str(folder), store=str(tmp_path / "no" / "such" / "i")), "can't be written"),
        (Settings(searcher="no_such_lab.web"), "no such module"),
        (Settings(searcher="json"), "nothing in tools has this name"),
    ):
        with pytest.raises(UserError, match=words):
            search.call("word", settings=settings)
    assert tools.run("search", {"query": "x"}).startswith("error: search.index")
    assert tools.run("search", {"query": "x", "count": 0}).startswith("error: argument count")


def test_any_searcher_takes_the_place_of_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = tmp_path / "my_searchers"
    lab.mkdir()
    (lab / "__init__.py").write_text("")
    (lab / "web.py").write_text(
        "from nestling.tools.search import Passage\n"
        "def search(query, count):\n    return [Passage(query.upper(), f'https://x/{n}', 1.0) for n in range(count)]\n"
    )
    (lab / "empty.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    with tools.Toolbox.open({"search": {"searcher": "my_searchers.web"}}) as box:
        assert box.run("search", {"query": "a", "count": 2}) == "[1] https://x/0\nA\n\n[2] https://x/1\nA"
    with pytest.raises(UserError, match="no function search"):
        search.call("a", settings=Settings(searcher="my_searchers.empty"))
    for name in [name for name in sys.modules if name.startswith("my_searchers")]:
        del sys.modules[name]


def test_many_passages_are_searched_fast_and_from_any_thread(tmp_path: Path) -> None:
    index = index_of(tmp_path / "i", [f"passage number {n} of the long book {n % 7}" for n in range(5000)])
    start = time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: index.search(f"number {n}", 1)[0].text.split()[2], range(100)))
    assert found == [str(n) for n in range(100)]
    assert time.perf_counter() - start < 5


def test_an_unfinished_build_leaves_nothing(tmp_path: Path) -> None:
    def broken():
        yield Document(id="a", text="a")
        raise UserError("broken row")

    with pytest.raises(UserError, match="broken row"):
        Index.build(tmp_path / "i", broken())
    with pytest.raises(UserError, match="no text"):
        Index.build(tmp_path / "i", [])
    assert os.listdir(tmp_path) == []
