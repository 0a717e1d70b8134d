"""Shared beginnings, prompts in parts, packed weights: what is faster gives the same text."""

from __future__ import annotations

import pytest
import torch
from toys.models import random_model

from nestling.generation.engine import Engine
from nestling.generation.packed import PackedDecoder, pack
from nestling.generation.prefixes import BLOCK, Prefixes
from nestling.generation.sampling import Sampling
from nestling.generation.sequence import Completion, Request
from nestling.generation.slots import Limits
from nestling.model.cache import KVCache
from nestling.model.decoder import Decoder
from nestling.tokenizer.bpe import Tokenizer

NO_STOP: frozenset[int] = frozenset()
SYSTEM = [(7 * i) % 251 for i in range(100)]
FAMILIES = {
    "qwen3": {"qk_norm": True, "head_size": 16},
    "gpt2": {
        "head_size": 16, "positions": "learned", "norm": "layer", "activation": "gelu_tanh", "gated": False,
        "bias": True, "qkv_bias": True,
    },
    "alibi": {"positions": "alibi", "n_kv_heads": 4},
}  # fmt: skip


def request(tail: list[int], seed: int = 0, **changes: object) -> Request:
    sampling = Sampling(**{"temperature": 0, "max_tokens": 12, "top_logprobs": 5, **changes})
    return Request([*SYSTEM, *tail], sampling, seed, stop_ids=NO_STOP)


def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each call of a model, from now on."""
    seen: list[int] = []

    def watch(kind: type[Decoder]) -> None:
        hidden = kind.hidden

        def counting(self: Decoder, ids: torch.Tensor, **others: object) -> torch.Tensor:
            seen.extend([ids.numel()] if type(self) is kind else [])
            return hidden(self, ids, **others)

        monkeypatch.setattr(kind, "hidden", counting)

    watch(Decoder)
    watch(PackedDecoder)
    return seen


def assert_as_from_full_logits(model: Decoder, asked: Request, done: Completion) -> None:
    """Every reported log-probability is that of the whole text computed at once."""
    with torch.no_grad():
        logits = model(torch.tensor([[*asked.ids, *done.ids]]))[0, len(asked.ids) - 1 : -1]
    temperature = asked.sampling.scoring_temperature
    exact = (logits / temperature).log_softmax(1)
    for row, top, token, logprob in zip(exact, done.top_logprobs, done.ids, done.logprobs, strict=True):
        assert logprob == pytest.approx(float(row[token]), abs=1e-4)
        for other, value in top:
            assert value == pytest.approx(float(row[other]), abs=1e-4)


@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
@pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize(
    "limits", [Limits(), Limits(prefill=7), Limits(prefill=7, prefixes=0), Limits(prefixes=5 * BLOCK)]
)
def test_sharing_and_parts_change_nothing(tokenizer: Tokenizer, changes: dict, limits: Limits, frozen: bool) -> None:
    model = random_model(tokenizer.vocab_size, **changes)
    engine = Engine(model, tokenizer, rows=6, frozen=frozen, limits=limits)
    asked = [request([i % 5, *range(i)], seed=i, temperature=0.7 * (i % 2)) for i in range(9)]
    asked += [Request(list(range(200, 200 + i)), asked[0].sampling, stop_ids=NO_STOP) for i in range(1, 30, 9)]
    plain = Engine(model, tokenizer, rows=1, limits=Limits(prefixes=0))
    for one, done in zip(asked * 2, engine.generate(asked) + engine.generate(asked), strict=True):
        assert done.ids == plain.generate([one])[0].ids
        assert_as_from_full_logits(model, one, done)


def test_greedy_alone_and_among_64_others(model: Decoder, tokenizer: Tokenizer) -> None:
    mine = request([3, 1, 4], max_tokens=30)
    alone = Engine(model, tokenizer, limits=Limits(prefixes=0)).generate([mine])[0]
    others = [request([i, *range(i % 40)], seed=i, temperature=i / 20, max_tokens=1 + i % 50) for i in range(64)]
    for limits in (Limits(), Limits(prefill=16)):
        for place in (0, 30, 64):
            crowd = [*others[:place], mine, *others[place:]]
            done = Engine(model, tokenizer, rows=65, frozen=True, limits=limits).generate(crowd)[place]
            assert done.ids == alone.ids
            assert_as_from_full_logits(model, mine, done)


def test_many_samples_of_one_prompt_compute_it_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = computed(monkeypatch)
    done = engine.generate([request([1], seed=s, temperature=1, max_tokens=1) for s in range(8)])
    assert seen == [100, 8]
    assert len({d.ids[0] for d in done}) > 1


def test_samples_share_the_prompt_and_have_their_own_randomness(
    model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model, tokenizer)
    alone = engine.generate([request([1], seed=4, temperature=1)])[0]
    seen = computed(monkeypatch)
    running = [engine.submit(request([1], seed=seed, temperature=1), stream=True) for seed in range(4, 9)]
    while engine.busy:
        engine.step()
    texts = [r.completion.ids for r in running if r.completion is not None]
    assert texts[0] == alone.ids
    assert len({tuple(text) for text in texts}) == 5
    assert seen[0] == len(SYSTEM)
    assert max(seen[1:]) == 5


def test_a_system_prompt_is_computed_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = computed(monkeypatch)
    engine.generate([request([50 + i, 1], max_tokens=1) for i in range(8)])
    kept = 96  # whole blocks of the 100
    assert seen == [101, 7 * (101 - kept), 8]


def test_frozen_remembers_between_requests_and_live_forgets(
    model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen, live = Engine(model, tokenizer, frozen=True), Engine(model, tokenizer)
    seen = computed(monkeypatch)
    for engine, second in ((frozen, 101 - 96), (live, 101)):
        seen.clear()
        engine.generate([request([1, 2], max_tokens=1)])
        engine.generate([request([3, 4], max_tokens=1)])
        assert seen == [101, 1, second, 1]


def test_the_next_turn_computes_only_what_is_new(
    model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model, tokenizer, frozen=True)
    first = request([], max_tokens=40)
    done = engine.generate([first])[0]
    seen = computed(monkeypatch)
    again = Request([*first.ids, *done.ids, 9, 9, 9], first.sampling, stop_ids=NO_STOP)
    engine.generate([again])
    assert seen[0] < 3 + BLOCK


@pytest.mark.parametrize("past_the_counters", [False, True])
def test_frozen_notices_a_training_step(model: Decoder, tokenizer: Tokenizer, past_the_counters: bool) -> None:
    engine = Engine(model, tokenizer, frozen=True)
    before = engine.generate([request([1])])[0]
    again = engine._slots.model
    engine.generate([request([1])])
    assert engine._slots.model is again
    for weight in model.parameters():
        change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 0.3
        with torch.no_grad():
            (weight.data if past_the_counters else weight).add_(change)
    after = engine.generate([request([1])])[0]
    assert after.ids != before.ids
    assert_as_from_full_logits(model, request([1]), after)


def test_a_compiled_model_can_be_packed(model: Decoder, tokenizer: Tokenizer) -> None:
    plain = Engine(model, tokenizer).generate([request([1])])[0]
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True, dynamic=False)
    model.train()
    assert Engine(model, tokenizer, frozen=True).generate([request([1])])[0].ids == plain.ids
    assert all(module.training for module in model.modules())


def test_a_long_prompt_does_not_stall_who_decodes(
    model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model, tokenizer, limits=Limits(prefill=20))
    writer = engine.submit(Request([1, 2], Sampling(max_tokens=100), stop_ids=NO_STOP))
    engine.step()
    seen = computed(monkeypatch)
    late = engine.submit(Request(list(range(200)), Sampling(max_tokens=3), stop_ids=NO_STOP))
    for step in range(9):
        engine.step()
        assert len(writer.rows[0].ids) == 2 + step
        assert late.rows[0].ids == []
    assert max(seen) == 20
    while late.completion is None:
        engine.step()
    assert len(writer.rows[0].ids) == 1 + 9 + 3


def test_a_prompt_in_parts_can_be_cancelled(model: Decoder, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, rows=2, limits=Limits(prefill=10))
    writer = engine.submit(Request([1, 2], Sampling(max_tokens=9), stop_ids=NO_STOP))
    engine.step()
    long = engine.submit(Request(list(range(200)), Sampling(max_tokens=3)))
    engine.step()
    engine.cancel(long)
    waiting = engine.submit(request([5], max_tokens=2))
    assert engine.step() == [long]
    assert long.completion is not None
    assert long.completion.finish == "cancelled"
    while engine.busy:
        engine.step()
    assert waiting.completion is not None
    assert_as_from_full_logits(model, waiting.request, waiting.completion)
    assert writer.completion is not None


def test_memory_for_beginnings_is_bounded_and_old_ones_go_first(model: Decoder) -> None:
    cache = KVCache(model.config, rows=1)
    cache.stored.normal_(generator=torch.Generator().manual_seed(0))
    prefixes = Prefixes(cache, tokens=6 * BLOCK)
    texts = [[10 * n + i % 7 for i in range(3 * BLOCK + 5)] for n in range(3)]
    prefixes.store(texts[0], 0)
    prefixes.store(texts[1], 0)
    assert [prefixes.known(text) for text in texts] == [3 * BLOCK, 3 * BLOCK, 0]
    prefixes.load(texts[0], 0)
    prefixes.store(texts[2][: 2 * BLOCK], 0)
    assert [prefixes.known(text) for text in texts] == [3 * BLOCK, BLOCK, 2 * BLOCK]
    prefixes.store(list(range(20 * BLOCK)), 0)
    assert len(prefixes) == 6


def test_blocks_come_back_as_they_were(model: Decoder) -> None:
    cache = KVCache(model.config, rows=2)
    cache.stored.normal_(generator=torch.Generator().manual_seed(0))
    prefixes = Prefixes(cache, tokens=200)
    text = list(range(70))
    prefixes.store(text[:40], 0)
    prefixes.store(text, 0)
    assert prefixes.load([*text[:50], 99, *text[51:]], 1) == 48
    assert torch.equal(cache.stored[:, :, 1, :, :48], cache.stored[:, :, 0, :, :48])
    assert not torch.equal(cache.stored[:, :, 1, :, 48], cache.stored[:, :, 0, :, 48])


@pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "divergence"), [(None, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3), (torch.int8, 3e-2)]
)
def test_packed_weights_give_the_same_distribution(
    tokenizer: Tokenizer, changes: dict, dtype: torch.dtype | None, divergence: float
) -> None:
    model = random_model(tokenizer.vocab_size, **changes)
    ids = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        exact, packed = (each(ids).float().log_softmax(-1) for each in (model, pack(model, dtype)))
    assert (exact.exp() * (exact - packed)).sum(-1).mean() < divergence
    if dtype is None:
        torch.testing.assert_close(packed, exact, rtol=0, atol=1e-4)
