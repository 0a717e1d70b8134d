"""Shards and text batches: every token once per epoch, documents apart, the order a function of (seed, step)."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from nestling.core.errors import UserError
from nestling.loading.batches import TokenBatch
from nestling.loading.packing import Pieces, best_fit
from nestling.loading.shards import Shards, encode_documents, write_shards
from nestling.loading.text import RowMode, TextLoader
from nestling.tokenizer.bpe import Tokenizer


@pytest.fixture(params=[2**28, 10], ids=["one file", "many files"])
def shards(request, tmp_path: Path, tokenizer: Tokenizer, documents: list[str]) -> Shards:  # type: ignore[no-untyped-def]
    write_shards(tmp_path / "t", encode_documents(documents, tokenizer), tokenizer, shard_tokens=request.param)
    return Shards.open(tmp_path / "t", tokenizer)


def test_shards_round_trip(shards: Shards, tokenizer: Tokenizer, documents: list[str]) -> None:
    end = tokenizer.end_of_text
    flat = [end]
    for text in documents:
        flat += [*tokenizer.encode(text), end]
    assert shards[:].tolist() == flat
    assert shards[3:31].tolist() == flat[3:31]
    assert [tokenizer.decode(shards.document(n).tolist()) for n in range(shards.documents)] == documents
    assert shards.bytes == sum(len(text.encode()) for text in documents)
    assert shards.tokens == len(flat) == shards.offsets[-1] + 1


def _learnt(batch: TokenBatch) -> Counter[tuple[int, int]]:
    on = batch.weights > 0
    return Counter(zip(batch.ids[on].tolist(), batch.targets[on].tolist(), strict=True))


def _all_pairs(shards: Shards) -> Counter[tuple[int, int]]:
    stream = shards[:].tolist()
    return Counter(pairwise(stream))


def test_documents_mode_learns_every_token_once_per_epoch(shards: Shards) -> None:
    loader = TextLoader(shards, context=12, batch_rows=1, seed=3)
    for epoch in range(2):
        steps = range(epoch * loader.row_count, (epoch + 1) * loader.row_count)
        assert sum((_learnt(loader.batch(step)) for step in steps), Counter()) == _all_pairs(shards)
    assert sum((_learnt(batch) for batch in loader.validation()), Counter()) == _all_pairs(shards)


def test_documents_mode_by_hand(tmp_path: Path, tokenizer: Tokenizer) -> None:
    e = tokenizer.end_of_text
    a, b, c, d = (tokenizer.encode(letter)[0] for letter in "abcd")
    write_shards(tmp_path / "t", encode_documents(["ab", "c", "abcd"], tokenizer), tokenizer)
    loader = TextLoader(Shards.open(tmp_path / "t"), context=6, batch_rows=3, seed=0)
    batch = next(loader.validation())
    # "abcd" (5 slots) fills the first row but one; "ab" (3) and "c" (2) share the second; the third is empty.
    assert batch.ids.tolist() == [[e, a, b, c, d, e], [e, a, b, e, c, e], [e] * 6]
    assert batch.targets.tolist() == [[a, b, c, d, e, e], [a, b, e, c, e, e], [e] * 6]
    assert batch.weights.tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0], [0] * 6]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 0], [0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
    assert batch.segments.tolist() == [[0, 0, 0, 0, 0, 1], [0, 0, 0, 1, 1, 2], [0] * 6]
    assert batch.counts == {"tokens": 10.0, "sequences": 3.0}


def test_stream_mode_by_hand(tmp_path: Path, tokenizer: Tokenizer) -> None:
    e = tokenizer.end_of_text
    a, b, c, d = (tokenizer.encode(letter)[0] for letter in "abcd")
    write_shards(tmp_path / "t", encode_documents(["ab", "cd"], tokenizer), tokenizer)
    batch = next(TextLoader(Shards.open(tmp_path / "t"), 4, 2, seed=0, mode="stream").validation())
    assert batch.ids.tolist() == [[e, a, b, e], [c, d, e, e]]  # the last slot of row 1 is padding
    assert batch.targets.tolist() == [[a, b, e, c], [d, e, e, e]]
    assert batch.weights.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.segments[0].tolist() == [1, 1, 1, 2]
    assert batch.positions[0].tolist() == [0, 1, 2, 0]
    assert batch.segments[1, 0] != batch.segments[1, 2]


@pytest.mark.parametrize("mode", ["stream", "windows"])
def test_windows_come_once_per_epoch_at_drawn_offsets(shards: Shards, mode: RowMode) -> None:
    context = 5
    loader = TextLoader(shards, context, batch_rows=1, seed=1, mode=mode)
    offsets = set()
    for epoch in range(12):
        batches = [loader.batch(epoch * loader.row_count + row) for row in range(loader.row_count)]
        found = sum((_learnt(batch) for batch in batches), Counter())
        assert found <= _all_pairs(shards)
        assert found.total() == loader.row_count * context > shards.tokens - 2 * context - 1
        offsets.add(frozenset(found.items()))
    assert len(offsets) > 1
    assert sum((_learnt(batch) for batch in loader.validation()), Counter()) == _all_pairs(shards)


def test_windows_are_one_running_text(shards: Shards) -> None:
    batch = TextLoader(shards, 8, 4, seed=0, mode="windows").batch(0)
    assert batch.positions.tolist() == [list(range(8))] * 4
    assert batch.segments.tolist() == [[0] * 8] * 4
    assert torch.equal(batch.ids[:, 1:], batch.targets[:, :-1])


@pytest.mark.parametrize("mode", ["documents", "stream", "windows"])
def test_batches_depend_on_seed_and_step_only(shards: Shards, mode: RowMode) -> None:
    one, two = (TextLoader(shards, 8, 3, seed=5, mode=mode) for _ in range(2))
    late = [two.batch(step) for step in (9, 4, 0)]  # asked for in another order, as after a resume
    for batch, step in zip(late, (9, 4, 0), strict=True):
        assert torch.equal(batch.ids, one.batch(step).ids)
    other = TextLoader(shards, 8, 3, seed=6, mode=mode)
    assert any(not torch.equal(one.batch(step).ids, other.batch(step).ids) for step in range(3))


def test_rows_slice_and_bytes(shards: Shards, tokenizer: Tokenizer, documents: list[str]) -> None:
    lengths = torch.tensor(tokenizer.byte_lengths)
    loader = TextLoader(shards, 8, 4, seed=0)
    batches = list(loader.validation())
    assert sum(batch.byte_count(lengths) for batch in batches) == sum(len(text.encode()) for text in documents)
    control = sum(int(batch.weights[lengths[batch.targets] == 0].sum()) for batch in batches)
    assert control == len(documents)  # one end-of-text target each
    halves = [batches[0].rows(0, 2), batches[0].rows(2, 4)]
    assert torch.equal(torch.cat([half.targets for half in halves]), batches[0].targets)


def test_best_fit_is_a_packing() -> None:
    lengths = np.random.default_rng(0).integers(1, 65, size=2000)
    rows = best_fit(lengths, 64)
    assert sorted(piece for row in rows for piece in row) == list(range(2000))
    assert all(lengths[row].sum() <= 64 for row in rows)
    assert lengths.sum() / (64 * len(rows)) > 0.98


def test_split_cuts_long_pieces() -> None:
    pieces = Pieces(np.array([0, 10]), np.array([9, 3])).split(4)
    assert pieces.starts.tolist() == [0, 4, 8, 10]
    assert pieces.lengths.tolist() == [4, 4, 1, 3]


def test_bad_shards_are_user_errors(shards: Shards, tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"index\.json"):
        Shards.open(tmp_path / "nothing")
    with pytest.raises(UserError, match="another tokenizer"):
        Shards.open(shards.folder, Tokenizer.train(["other text other text"], 270))
    with pytest.raises(UserError, match="no document"):
        write_shards(tmp_path / "empty", [], tokenizer)
    with pytest.raises(UserError, match="less than one row"):
        TextLoader(shards, 4096, 1, 0, mode="windows")
    file = shards.folder / "00000.bin"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(UserError, match="cut off"):
        Shards.open(shards.folder)
