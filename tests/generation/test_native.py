"""The native step against the decoder that it stands for."""

from __future__ import annotations

import pytest
import torch
from toys.models import random_model

from nestling.core import native as compiler
from nestling.generation import native
from nestling.generation import packed as packed_module
from nestling.generation.engine import Engine
from nestling.generation.packed import BlockedLinear, pack, round_rows
from nestling.generation.sampling import Sampling
from nestling.generation.sequence import Request
from nestling.model.cache import KVCache
from nestling.tokenizer.bpe import Tokenizer

MODELS = {
    "llama": {"head_size": 16},
    "qwen3": {"head_size": 32, "qk_norm": True, "n_heads": 6, "n_kv_heads": 3, "d_model": 40, "d_ff": 50},
    "qwen2": {"head_size": 16, "qkv_bias": True, "tied": False},
    "gpt2": {
        "head_size": 16, "positions": "learned", "norm": "layer", "gated": False, "activation": "gelu_tanh",
        "bias": True, "qkv_bias": True, "n_kv_heads": 4,
    },
    "narrow heads": {"head_size": 8, "n_kv_heads": 1},
    "uneven heads": {"head_size": 22, "qk_norm": True},
    "gelu": {"head_size": 16, "positions": "sinusoidal", "activation": "gelu"},
    "relu": {"head_size": 16, "positions": "none", "activation": "relu_squared", "gated": False, "d_ff": 33},
}  # fmt: skip
ODD_VOCABULARY = 301

pytestmark = pytest.mark.skipif(native._library() is None, reason="no C++ compiler on this machine")


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, ODD_VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(
    ("dtype", "stored", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-4),
        (torch.float32, torch.bfloat16, 0.1),
        (torch.bfloat16, torch.float32, 0.15),
        (torch.int8, torch.float32, 0.7),
    ],
    ids=["exact", "bf16 cache", "bf16", "int8"],
)
@torch.inference_mode()
def test_logits_are_the_decoders(changes: dict, dtype: torch.dtype, stored: torch.dtype, tolerance: float) -> None:
    """A text of 30 and others of 20 and 3 tokens, continued by one token, then by 2, 5 and 1 at once."""
    model = random_model(ODD_VOCABULARY, **changes)
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    packed = pack(model, dtype)
    assert packed.native is not None
    cache = KVCache(model.config, rows=4, capacity=60, dtype=stored)
    prompt, lengths = tokens(3, 30), torch.tensor([30, 20, 3])
    packed.hidden(prompt, cache=cache, rows=torch.arange(3), counts=lengths)
    one, more, counts = tokens(3, 1, seed=1), tokens(3, 5, seed=2), torch.tensor([2, 5, 1])
    first = packed.unembed(packed.hidden(one, cache=cache, rows=slice(0, 3)))
    later = packed.unembed(packed.hidden(more, cache=cache, rows=slice(0, 3), counts=counts))
    assert cache.lengths.tolist() == [33, 26, 5, 0]
    for row in range(3):
        length, count = int(lengths[row]), int(counts[row])
        text = torch.cat([prompt[row, :length], one[row], more[row, :count]]).unsqueeze(0)
        exact = model(text)[0, length:]
        got = torch.cat([first[row], later[row, :count]])
        assert float((got - exact).abs().max()) < tolerance * float(exact.std())


@pytest.mark.parametrize("threads", [1, 3])
@torch.inference_mode()
def test_any_number_of_rows_and_threads(threads: int) -> None:
    model = random_model(ODD_VOCABULARY, head_size=16)
    packed, before = pack(model), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows in (1, 2, 3, 4, 7, 8, 9, 16, 31, 45):
            cache = KVCache(model.config, rows=rows)
            ids = tokens(rows, 3, seed=rows)
            steps = [packed.hidden(ids[:, t : t + 1], cache=cache, rows=slice(0, rows)) for t in range(3)]
            torch.testing.assert_close(torch.cat(steps, 1), model.hidden(ids), rtol=0, atol=1e-4)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("units", [False, True], ids=["vectors", "matrix units"])
@torch.inference_mode()
def test_prompts_in_any_rows_and_in_parts(units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two texts in rows out of order, more tokens than a call takes; with matrix units the matrix library gets them."""
    monkeypatch.setattr(native, "AT_ONCE", 7)
    monkeypatch.setattr(packed_module, "NATIVE_TOKENS", 20)
    model = random_model(ODD_VOCABULARY, head_size=16)
    packed, cache = pack(model), KVCache(model.config, rows=4)
    packed.matrix_units = units
    prompt, one = tokens(2, 20), tokens(2, 1, seed=1)
    outputs = packed.hidden(prompt, cache=cache, rows=torch.tensor([3, 0]), counts=torch.tensor([20, 13]))
    later = packed.hidden(one, cache=cache, rows=torch.tensor([0, 3]))
    assert cache.lengths.tolist() == [14, 0, 0, 21]
    assert bool(outputs[1, 13:].any()) == units  # the native way leaves nothing at padding
    for row, count, after in ((0, 20, 1), (1, 13, 0)):
        exact = model.hidden(torch.cat([prompt[row, :count], one[after]]).unsqueeze(0))[0]
        torch.testing.assert_close(torch.cat([outputs[row, :count], later[after]]), exact, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_nothing_is_written_behind_the_cache() -> None:
    model = random_model(ODD_VOCABULARY, head_size=16)
    cache = KVCache(model.config, rows=1, capacity=4)
    with pytest.raises(ValueError, match="full"):
        pack(model).hidden(tokens(1, 6), cache=cache, rows=slice(0, 1))


@torch.inference_mode()
def test_a_token_outside_the_vocabulary_is_refused() -> None:
    model = random_model(ODD_VOCABULARY, head_size=16)
    for unknown in (-1, ODD_VOCABULARY):
        cache = KVCache(model.config, rows=1)
        with pytest.raises(ValueError, match="unknown"):
            pack(model).hidden(torch.tensor([[5, unknown]]), cache=cache, rows=slice(0, 1))
        assert cache.lengths.tolist() == [0]


@pytest.mark.parametrize("positions", ["learned", "rope"])
@torch.inference_mode()
def test_weights_in_bfloat16_are_read_as_they_are(positions: str) -> None:
    model = random_model(ODD_VOCABULARY, head_size=16, positions=positions).bfloat16()
    ids, cache = tokens(2, 9), KVCache(model.config, rows=3)
    found = pack(model, torch.float32).hidden(ids, cache=cache, rows=slice(1, 3))
    assert cache.lengths.tolist() == [0, 9, 9]
    torch.testing.assert_close(found, model.float().hidden(ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "changes", [{"window": 8}, {"head_size": 16, "positions": "alibi"}, {"head_size": 16, "block": "post"}]
)
def test_what_it_cannot_do_is_left_to_torch(changes: dict) -> None:
    assert pack(random_model(ODD_VOCABULARY, **changes)).native is None


def test_without_a_compiler_the_text_is_the_same(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(tokenizer.vocab_size, head_size=16)
    prompts = [[5, 1], [5, 6] * 10, [7, 8, 9] * 84]  # the last is nearly as long as the context
    asked = [Request(t, Sampling(max_tokens=20, temperature=0.5 * i), i, speculate=4) for i, t in enumerate(prompts)]
    with_it = Engine(model, tokenizer, frozen=True)
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    compiler.compiled.cache_clear()
    without = Engine(model, tokenizer, frozen=True)
    try:
        texts = [[done.ids for done in without.generate(asked)]]
        assert without._slots.model.native is None
    finally:
        monkeypatch.undo()
        compiler.compiled.cache_clear()
    texts.append([done.ids for done in with_it.generate(asked)])
    assert with_it._slots.model.native is not None
    assert texts[0] == texts[1]


def test_few_numbers_of_rows_reach_the_matrix_library() -> None:
    """It compiles and keeps a kernel for each; the rows that are added change nothing."""
    assert len({round_rows(rows) for rows in range(1, 4097)}) == 80
    weight, bias, x = torch.randn(24, 16), torch.randn(24), torch.randn(3, 77, 16)
    torch.testing.assert_close(BlockedLinear(weight, bias)(x), torch.nn.functional.linear(x, weight, bias))


@torch.inference_mode()
def test_angles_of_a_prompt_follow_from_its_whole_length() -> None:
    """Dynamic scaling turns all tokens of a prompt by frequencies that follow from the whole of it."""
    scaling = {"kind": "dynamic", "factor": 4.0, "original_context": 16}
    model = random_model(ODD_VOCABULARY, head_size=16, rope_scaling=scaling)
    cache, ids = KVCache(model.config, rows=2, capacity=60, dtype=torch.float32), tokens(1, 48)
    found = pack(model).hidden(ids, cache=cache, rows=torch.tensor([1]), counts=torch.tensor([48]))
    torch.testing.assert_close(found, model.hidden(ids), atol=1e-4, rtol=1e-4)
