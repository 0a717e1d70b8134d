"""Attention as a GPU trains it on packed rows: the same numbers as the mask written out, and when it is taken.

A CPU computes flex attention plainly, gradients included, once torch's own refusal to train with it there is set aside.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from nestling.model import attention, decoder
from nestling.model.attention import TILE, attend, block_mask, explicit_pays, flex_pays
from nestling.model.config import DecoderConfig
from nestling.model.decoder import Decoder, build
from nestling.model.hub import make_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TINY = {"vocab_size": 50, "context": 300, "d_model": 64, "n_layers": 2, "n_heads": 4}


@pytest.fixture
def trains_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch._dynamo.reset()
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(decoder, "flex_pays", lambda config, device, keys: True)
    yield
    torch._dynamo.reset()


def documents(rows: int, size: int, seed: int = 0) -> torch.Tensor:
    """[B, T] numbers of documents, of about 50 tokens each; the last row is one document."""
    starts = torch.rand(rows, size, generator=torch.Generator().manual_seed(seed)) < 0.02
    starts[-1] = False
    return starts.long().cumsum(1)


def tiles(mask: BlockMask) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, 1, n, n] which tiles are checked pair by pair, and which are taken whole."""
    n = mask.kv_indices.shape[-1]
    parts = []
    for counts, order in ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)):
        listed = torch.arange(n) < counts.unsqueeze(-1)
        parts.append(torch.zeros(order.shape, dtype=torch.bool).scatter(-1, order.long(), listed))
    return parts[0], parts[1]


@pytest.mark.parametrize("size", [TILE, 300, 1024])
@pytest.mark.parametrize(("packed", "window"), [(False, None), (True, None), (False, 1), (False, 200), (False, 129)])
def test_the_tiles_are_those_that_looking_at_every_pair_gives(size: int, packed: bool, window: int | None) -> None:
    mine = block_mask(size, CPU, documents(3, size) if packed else None, window)
    theirs = create_block_mask(mine.mask_mod, 3 if packed else 1, 1, size, size, "cpu")
    for found, wanted in zip(tiles(mine), tiles(theirs), strict=True):
        assert torch.equal(found, wanted)
    assert mine.seq_lengths == (size, size)


@pytest.mark.parametrize("rising", [True, False])
def test_no_tile_that_counts_is_skipped(rising: bool) -> None:
    """Documents in any order, under a window: what is skipped has no pair, what is taken whole has all."""
    segments = documents(4, 700) if rising else documents(4, 700) * 7 % 5
    mask = block_mask(700, CPU, segments, window=260)
    part, whole = tiles(mask)
    every = create_block_mask(mask.mask_mod, 4, 1, 700, 700, "cpu")
    some, full = tiles(every)
    assert not ((some | full) & ~(part | whole)).any()
    assert not (whole & ~full).any()
    assert not (part & whole).any()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.usefixtures("trains_on_cpu")
def test_values_and_gradients_are_those_of_the_mask_written_out(window: int | None) -> None:
    stream = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, heads, 300, 16, generator=stream, requires_grad=True) for heads in (4, 2, 2))
    mask = block_mask(300, CPU, documents(2, 300), window)
    direction = torch.randn(2, 4, 300, 16, generator=stream)
    dense = attend(q, k, v, mask)  # not compiled, so it writes the mask out
    fast = flex.flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    torch.testing.assert_close(fast, dense, rtol=1e-5, atol=1e-6)
    wanted = torch.autograd.grad(dense, (q, k, v), direction)
    for found, right in zip(torch.autograd.grad(fast, (q, k, v), direction), wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler looks at it
@pytest.mark.parametrize("changes", [{}, {"architecture": "qwen3", "n_kv_heads": 2, "window": 90}])
@pytest.mark.usefixtures("trains_on_cpu")
def test_a_compiled_decoder_learns_the_same_and_compiles_once(changes: dict[str, object]) -> None:
    model = build(make_config({**TINY, **changes})).train()
    text = torch.randint(0, 50, (2, 300), generator=torch.Generator().manual_seed(2))

    def learnt(seed: int) -> list[torch.Tensor]:
        loss = model(text, segments=documents(2, 300, seed)).square().mean()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    wanted = [learnt(seed) for seed in range(2)]
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True, dynamic=False)
    for seed, right in enumerate(wanted):
        for found, grad in zip(learnt(seed), right, strict=True):
            torch.testing.assert_close(found, grad, rtol=1e-3, atol=1e-6)
    assert counter.frame_count == 1
    assert "flex_attention" in counter.graphs[0].code


@pytest.mark.usefixtures("trains_on_cpu")
def test_only_compiled_training_builds_a_block_mask() -> None:
    model = build(make_config(TINY))
    x, segments = torch.zeros(2, 300, 64), documents(2, 300)
    assert isinstance(model._mask(x, segments, None), torch.Tensor)
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    assert isinstance(model._mask(x, segments, None), BlockMask)
    with torch.no_grad():
        assert isinstance(model._mask(x, segments, None), torch.Tensor)
    model.eval()
    assert isinstance(model._mask(x, segments, None), torch.Tensor)


def test_which_kernel_attends_where() -> None:
    config = DecoderConfig(**TINY)
    assert [explicit_pays(device, keys) for device in (CPU, CUDA) for keys in (256, 4096)] == [True, False, False, False]
    assert flex_pays(config, CUDA, 256)
    assert not flex_pays(config, CPU, 256)
    assert not flex_pays(config, torch.device("mps"), 256)
    assert not flex_pays(config, CUDA, TILE - 1), "nothing can be skipped there"
    for changes in ({"dropout": 0.1}, {"n_heads": 8}, {"positions": "alibi"}):
        assert not flex_pays(DecoderConfig(**{**TINY, **changes}), CUDA, 256), changes


def test_without_documents_the_kernel_masks_by_itself() -> None:
    model = Decoder(DecoderConfig(**{**TINY, "context": 2048}))
    assert model._mask(torch.zeros(1, attention.EXPLICIT_CPU_TOKENS + 1, 64), None, None) is None


@pytest.mark.parametrize(
    ("masked", "dtype", "heads"),
    [(True, torch.float32, 4), (False, torch.float32, 4), (False, torch.float16, 4), (False, torch.bfloat16, 2)],
)
def test_on_a_gpu_keys_are_copied_per_head_for_fast_kernels_that_know_no_groups(
    masked: bool, dtype: torch.dtype, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that knows them takes no mask and no float32, and is not there for GPUs that compute in float16 by default."""

    class OnGPU(torch.Tensor):
        device = CUDA

    stream = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, given, 9, 16, generator=stream).to(dtype) for given in (4, 2, 2))
    seen: list[int] = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def spy(*given: torch.Tensor, **how: bool) -> torch.Tensor:
        seen.append(given[1].shape[1])
        return kernel(*given, **how)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", spy)
    mask = attention.causal_mask(9, CPU)
    got = attend(q.as_subclass(OnGPU), k, v, mask if masked else None)
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.01}
    torch.testing.assert_close(got.as_subclass(torch.Tensor), attend(q, k, v, mask), **close)
    assert seen == [heads]
