from __future__ import annotations

import pytest
import torch

from nestling.core.errors import UserError
from nestling.model.cache import KVCache
from nestling.model.decoder import Decoder, build
from nestling.model.hub import make_config


@pytest.fixture
def model() -> Decoder:
    sizes = {"vocab_size": 50, "context": 24, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
    return build(make_config({**sizes, "init": "gpt2"})).eval()


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_beams_copy_rows_all_at_once(model: Decoder) -> None:
    texts, cache = ids(3, 6), KVCache(model.config, rows=3)
    model(texts, cache=cache)
    parents = torch.tensor([2, 2, 0])  # row 0 is read as a parent and written as a child in the same call
    cache.copy(parents, torch.arange(3))
    new = ids(3, 1)
    got = model(new, cache=cache)
    want = model(torch.cat([texts[parents], new], 1))[:, -1:]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_reset_row_serves_a_new_text_beside_running_ones(model: Decoder) -> None:
    texts, cache = ids(3, 12), KVCache(model.config, rows=3)
    model(texts[:, :8], cache=cache)
    cache.reset(torch.tensor([1]))
    assert cache.lengths.tolist() == [8, 0, 8]
    fresh = ids(1, 5) + 0
    got = model(fresh, cache=cache, rows=torch.tensor([1]))
    torch.testing.assert_close(got, model(fresh), rtol=0, atol=1e-5)
    got = model(texts[[0, 2], 8:9], cache=cache, rows=torch.tensor([0, 2]))
    torch.testing.assert_close(got, model(texts[[0, 2], :9])[:, -1:], rtol=0, atol=1e-5)


@torch.no_grad()
def test_rejected_tokens_are_truncated(model: Decoder) -> None:
    texts, cache = ids(2, 12), KVCache(model.config, rows=2)
    model(texts, cache=cache)
    cache.truncate(torch.tensor([0, 1]), torch.tensor([4, 20]))
    assert cache.lengths.tolist() == [4, 12]
    got = model(texts[:1, 4:5], cache=cache, rows=torch.tensor([0]))
    torch.testing.assert_close(got, model(texts[:1, :5])[:, -1:], rtol=0, atol=1e-5)


@torch.no_grad()
def test_padding_of_a_full_row_does_not_overwrite_its_last_token(model: Decoder) -> None:
    texts, cache = ids(2, 8), KVCache(model.config, rows=2, capacity=8)
    model(texts[:, :7], cache=cache, counts=torch.tensor([7, 3]))
    got = model(texts[:, 3:7], cache=cache, counts=torch.tensor([1, 4]))
    want = model(torch.cat([texts[:1, :7], texts[:1, 3:4]], 1))[:, -1]
    torch.testing.assert_close(got[:1, 0], want, rtol=0, atol=1e-5)
    assert cache.lengths.tolist() == [8, 7]


@torch.no_grad()
def test_too_many_tokens_name_the_limit_and_leave_the_cache_as_it_was(model: Decoder) -> None:
    cache = KVCache(model.config, rows=2, capacity=8)
    model(ids(2, 6), cache=cache)
    with pytest.raises(UserError, match="6 tokens can't grow by 3: the cache holds 8"):
        model(ids(2, 3), cache=cache)
    assert cache.lengths.tolist() == [6, 6]
    with pytest.raises(UserError, match="longer than the model's context"):
        KVCache(model.config, rows=2, capacity=25)
    with pytest.raises(UserError, match="longer than the model's context"):
        model(ids(1, 25))


@torch.no_grad()
def test_a_bf16_cache_is_close(model: Decoder) -> None:
    texts, cache = ids(2, 12), KVCache(model.config, rows=2, dtype=torch.bfloat16)
    model(texts[:, :11], cache=cache)
    got = model(texts[:, 11:], cache=cache)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, model(texts)[:, -1:], rtol=0, atol=0.02)
