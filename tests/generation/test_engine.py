"""The engine against the slow obvious way: the whole text through the model for every token."""

from __future__ import annotations

import pytest
import torch
from toys.models import CONTEXT, random_model

from nestling.core.errors import UserError
from nestling.generation.engine import Engine
from nestling.generation.sampling import Sampling
from nestling.generation.sequence import Completion, Request
from nestling.model.decoder import Decoder
from nestling.model.likelihood import token_logprobs
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.special import END_OF_TEXT, PAD, TURN_END, TURN_START

NO_STOP: frozenset[int] = frozenset()


def prompts(count: int, longest: int = 40, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]


def greedy_slowly(model: Decoder, ids: list[int], count: int, banned: list[int]) -> list[int]:
    ids, start = list(ids), len(ids)
    with torch.no_grad():
        for _ in range(count):
            logits = model(torch.tensor([ids]))[0, -1]
            logits[banned] = -torch.inf
            ids.append(int(logits.argmax()))
    return ids[start:]


def scored_slowly(model: Decoder, prompt: list[int], completion: Completion, temperature: float) -> list[float]:
    text = torch.tensor([prompt + completion.ids])
    with torch.no_grad():
        return token_logprobs(model, text[:, :-1], text[:, 1:], temperature=temperature)[0, len(prompt) - 1 :].tolist()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"positions": "learned", "norm": "layer", "activation": "gelu_tanh", "gated": False, "n_kv_heads": 4},
        {"positions": "alibi"},
        {"positions": "sinusoidal", "qk_norm": True},
    ],
    ids=["rope", "gpt2", "alibi", "sinusoidal"],
)
def test_greedy_equals_recomputation(tokenizer: Tokenizer, changes: dict) -> None:
    model = random_model(tokenizer.vocab_size, **changes)
    banned = [tokenizer.special[PAD], tokenizer.special[TURN_START]]
    requests = [Request(p, Sampling(temperature=0, max_tokens=15), stop_ids=NO_STOP) for p in prompts(12)]
    for request, done in zip(requests, Engine(model, tokenizer, rows=5).generate(requests), strict=True):
        assert done.ids == greedy_slowly(model, list(request.ids), 15, banned)
        assert done.finish == "length"


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_alone_or_among_others(engine: Engine, model: Decoder, tokenizer: Tokenizer, temperature: float) -> None:
    crowd = Engine(model, tokenizer, rows=32)
    sampling = Sampling(temperature=temperature, max_tokens=30, top_p=0.95, top_k=50)
    mine = Request(prompts(1, seed=9)[0], sampling, seed=11)
    others = [
        Request(p, Sampling(temperature=0.1 * i, top_k=i % 5, max_tokens=1 + i), seed=i)
        for i, p in enumerate(prompts(31, 80))
    ]
    alone = engine.generate([mine])[0]
    among = crowd.generate([*others[:15], mine, *others[15:]])[15]
    assert among.ids == alone.ids
    torch.testing.assert_close(among.logprobs, alone.logprobs, rtol=0, atol=1e-4)


def test_same_seed_same_text_and_another_seed_another(engine: Engine) -> None:
    ids = prompts(1)[0]
    one, again, other = engine.generate([Request(ids, Sampling(max_tokens=20), seed=s) for s in (1, 1, 2)])
    assert one.ids == again.ids != other.ids


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0, 1.7])
def test_logprobs_are_the_learners(engine: Engine, model: Decoder, temperature: float) -> None:
    sampling = Sampling(temperature=temperature, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.3, max_tokens=25)
    requests = [Request(p, sampling, seed=i) for i, p in enumerate(prompts(9))]
    for request, done in zip(requests, engine.generate(requests), strict=True):
        expected = scored_slowly(model, list(request.ids), done, temperature or 1.0)
        torch.testing.assert_close(done.logprobs, expected, rtol=0, atol=1e-4)


def test_top_k_one_is_greedy_and_rows_have_their_own_parameters(engine: Engine) -> None:
    ids = prompts(1)[0]
    settings = [
        {"temperature": 0},
        {"top_k": 1},
        {"strategy": "greedy"},
        {"top_p": 1e-6},
        {"min_p": 1},
        {"temperature": 3},
    ]
    done = engine.generate([Request(ids, Sampling(**s), seed=5) for s in settings])
    assert [d.ids for d in done[:5]] == [done[0].ids] * 5
    assert done[5].ids != done[0].ids


def test_sampling_follows_the_distribution(model: Decoder, tokenizer: Tokenizer) -> None:
    ids = prompts(1)[0]
    engine = Engine(model, tokenizer, rows=128)
    sampling = Sampling(max_tokens=1, top_k=4)
    done = engine.generate([Request(ids, sampling, seed=s, stop_ids=NO_STOP) for s in range(4000)])
    counts = torch.bincount(torch.tensor([d.ids[0] for d in done]), minlength=tokenizer.vocab_size)
    with torch.no_grad():
        top = model(torch.tensor([ids]))[0, -1].topk(4)
    expected = top.values.softmax(0)
    torch.testing.assert_close(counts[top.indices] / 4000, expected, rtol=0, atol=0.03)
    assert counts.sum() == counts[top.indices].sum()


def test_stop_token_is_kept_in_ids_but_not_in_text(engine: Engine, tokenizer: Tokenizer) -> None:
    script = [*tokenizer.encode("the cat"), tokenizer.id(TURN_END)]
    done = engine.generate([Request([1], scripted(script))])[0]
    assert (done.ids, done.text, done.finish) == (script, "the cat", "stop")
    other = engine.generate([Request([1], scripted(script), stop_ids=frozenset([script[1]]))])[0]
    assert other.ids == script[:2]


@pytest.mark.parametrize("stop", ["t on", " on", "sat on the mat", "é", "🙂", "n the ma"])
def test_stop_text_across_tokens(engine: Engine, tokenizer: Tokenizer, stop: str) -> None:
    text = "the cat sat on the mat and é 🙂 sat"
    script = [*tokenizer.encode(text), tokenizer.id(END_OF_TEXT)]
    request = Request([1], scripted(script, stop=("no such", stop)))
    done = engine.generate([request])[0]
    assert done.text == text[: text.index(stop)]
    assert done.finish == "stop"
    assert stop in tokenizer.decode(done.ids)
    assert stop not in tokenizer.decode(done.ids[:-1])
    assert "".join(engine.stream(request)) == done.text


def test_stream_shows_whole_characters_and_all_of_the_text(engine: Engine, tokenizer: Tokenizer) -> None:
    text = "naïve 白日依山盡 🙂🙃 the mat"
    request = Request([1], scripted([*tokenizer.encode(text), tokenizer.id(TURN_END)], stop=("mat!", "白日依水")))
    pieces = list(engine.stream(request))
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert len(pieces) > 8


def test_stream_holds_back_what_may_become_a_stop_text(engine: Engine, tokenizer: Tokenizer) -> None:
    ids = [tokenizer.encode(c)[0] for c in "abababac"]
    running = engine.submit(Request([1], scripted(ids, stop=("abac",), max_tokens=8)), stream=True)
    shown = []
    while running.completion is None:
        engine.step()
        shown.append("".join(piece.text for piece in running.take_pieces()))
    assert shown == ["", "", "", "ab", "", "ab", "", ""]
    assert running.completion.text == "abab"


def test_limits(engine: Engine) -> None:
    ids = prompts(1)[0]
    full = [1] * (CONTEXT - 3)
    asked = [(ids, Sampling(max_tokens=4)), (full, Sampling(max_tokens=50))]
    short, long = engine.generate([Request(*pair, stop_ids=NO_STOP) for pair in asked])
    assert (len(short.ids), short.finish) == (4, "length")
    assert (len(long.ids), long.finish) == (3, "length")


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request([]), "empty"),
        (Request([1] * CONTEXT), "longer than the context"),
        (Request([1, 5000]), "does not know"),
        (Request([1], Sampling(strategy="gready")), "greedy"),
        (Request([1], Sampling(strategy="beam", options={"beam": 3})), "beams"),
        (Request([1], Sampling(strategy="beam", options={"beams": 9})), "rows"),
    ],
)
def test_bad_requests_are_one_line(engine: Engine, request_: Request, words: str) -> None:
    with pytest.raises(UserError, match=words):
        engine.generate([Request([1, 2]), request_])
    engine.step()
    assert not engine.busy


def test_forced_tokens_are_marked_and_seen_by_the_model(engine: Engine, model: Decoder) -> None:
    ids, forced = prompts(1)[0], [7, 8, 9, 10]

    def interject(so_far: list[int]) -> list[int] | None:
        return forced if len(so_far) == 5 else None

    plain = [Request(p, Sampling(max_tokens=12), seed=i, stop_ids=NO_STOP) for i, p in enumerate(prompts(4, seed=3))]
    request = Request(ids, Sampling(temperature=0.8, max_tokens=12), seed=3, interject=interject, stop_ids=NO_STOP)
    done = engine.generate([*plain, request])[-1]
    assert done.ids[5:9] == forced
    assert done.sampled == [True] * 5 + [False] * 4 + [True] * 7
    expected = scored_slowly(model, ids, done, 0.8)
    for logprob, reference, sampled in zip(done.logprobs, expected, done.sampled, strict=True):
        assert logprob == (pytest.approx(reference, abs=1e-4) if sampled else 0.0)


def test_interjection_revives_a_stopped_text_and_respects_the_context(engine: Engine, tokenizer: Tokenizer) -> None:
    end = tokenizer.id(TURN_END)
    script = [5, end, 6, end]
    sampling = scripted(script)
    done = engine.generate([Request([1], sampling, interject=lambda ids: [9, 9] if ids == [5, end] else None)])[0]
    assert done.ids == [5, end, 9, 9, 6, end]
    full = engine.generate([Request([1], sampling, interject=lambda ids: [9] * CONTEXT)])[0]
    assert (full.ids, full.finish) == ([5], "length")


def test_fewer_rows_than_requests_changes_nothing(engine: Engine, model: Decoder, tokenizer: Tokenizer) -> None:
    requests = [Request(p, Sampling(max_tokens=3 + i % 17), seed=i) for i, p in enumerate(prompts(40))]
    few, many = (Engine(model, tokenizer, rows=rows).generate(requests) for rows in (3, 40))
    assert [d.ids for d in few] == [d.ids for d in many]


def test_equal_prompts_share_their_prefill(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    hidden = engine.model.hidden
    monkeypatch.setattr(engine.model, "hidden", lambda ids, **k: (seen.append(ids.numel()), hidden(ids, **k))[1])
    ids = list(range(40))
    engine.generate([Request(ids, Sampling(max_tokens=1), seed=s) for s in range(8)])
    assert seen == [39, 8]


def test_a_model_of_another_dtype_gets_another_cache(tokenizer: Tokenizer) -> None:
    model = random_model(tokenizer.vocab_size)
    engine = Engine(model, tokenizer)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        model.to(dtype)
        assert engine.generate([Request([1, 2], Sampling(max_tokens=3))])[0].ids
        assert engine._slots.cache.stored.dtype == dtype


def test_admission_while_others_decode(engine: Engine) -> None:
    first = engine.submit(Request([1, 2, 3], Sampling(max_tokens=10), seed=1, stop_ids=NO_STOP))
    for _ in range(4):
        engine.step()
    second = engine.submit(Request([4, 5], Sampling(max_tokens=3), seed=2, stop_ids=NO_STOP))
    done = [r for _ in range(10) for r in engine.step()]
    assert done == [second, first]
    assert not engine.busy
    alone = engine.generate([Request([1, 2, 3], Sampling(max_tokens=10), seed=1, stop_ids=NO_STOP)])[0]
    assert first.completion is not None
    assert first.completion.ids == alone.ids


def test_cancel_frees_the_row_within_one_step(model: Decoder, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, rows=1)
    hog = engine.submit(Request([1], Sampling(max_tokens=200), stop_ids=NO_STOP))
    waiting = engine.submit(Request([2], Sampling(max_tokens=1)))
    dropped = engine.submit(Request([3]))
    engine.step()
    engine.cancel(hog)
    engine.cancel(dropped)
    assert set(engine.step()) == {hog, dropped, waiting}
    assert hog.completion is not None
    assert (len(hog.completion.ids), hog.completion.finish) == (1, "cancelled")
    assert not engine.busy


def test_closed_stream_leaves_nothing_behind(engine: Engine) -> None:
    stream = engine.stream(Request([1], Sampling(max_tokens=100), stop_ids=NO_STOP))
    next(stream)
    stream.close()
    engine.step()
    assert not engine.busy


def test_live_weights_and_modes(engine: Engine, model: Decoder) -> None:
    model.train()
    model.blocks[0].eval()  # a frozen part keeps its mode too
    modes = [module.training for module in model.modules()]
    request = Request([1, 2, 3], Sampling(temperature=0, max_tokens=8), stop_ids=NO_STOP)
    before = engine.generate([request])[0]
    assert [module.training for module in model.modules()] == modes
    model(torch.tensor([[1, 2, 3]])).sum().backward()  # nothing of inference mode is left in the model
    with torch.no_grad():
        model.embedding.weight.add_(torch.randn(model.embedding.weight.shape))
    assert engine.generate([request])[0].ids != before.ids


def test_never_writes_padding_or_the_beginning_of_a_turn(model: Decoder, tokenizer: Tokenizer) -> None:
    banned = {tokenizer.id(PAD), tokenizer.id(TURN_START)}
    hot = [Request([i], Sampling(temperature=50, max_tokens=60), seed=i, stop_ids=NO_STOP) for i in range(32)]
    wide = random_model(tokenizer.vocab_size + 20)
    for done in Engine(wide, tokenizer, rows=32).generate(hot):
        assert max(done.ids) < tokenizer.vocab_size
        assert not banned & set(done.ids)


def test_bf16_compute(model: Decoder, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, dtype=torch.bfloat16)
    request = Request(list(range(20)), Sampling(max_tokens=10), seed=1, stop_ids=NO_STOP)
    done = engine.generate([request])[0]
    expected = scored_slowly(model, list(request.ids), done, 1.0)
    torch.testing.assert_close(done.logprobs, expected, rtol=0.1, atol=0.3)
    assert next(model.parameters()).dtype == torch.float32


def scripted(ids: list[int], **changes: object) -> Sampling:
    return Sampling(strategy="toys.scripted", options={"ids": ids}, **{"max_tokens": 100, **changes})


def test_a_row_that_has_ended_keeps_its_state(engine: Engine, model: Decoder) -> None:
    sampling = Sampling(strategy="toys.patient", max_tokens=6)
    running = engine.submit(Request([1, 2, 4], sampling, stop_ids=frozenset([3])))
    while running.completion is None:
        engine.step()
    prompt, first, *later = running.memory
    with torch.no_grad():
        ended, going = (
            model.hidden(torch.tensor([[1, 2, 4, 3]]))[0],
            model.hidden(torch.tensor([[1, 2, 4] + [5] * 5]))[0],
        )
    torch.testing.assert_close(prompt, ended[:2])
    torch.testing.assert_close(first, ended[2].expand(2, -1))
    for step, hidden in enumerate(later):
        torch.testing.assert_close(hidden, torch.stack([ended[3], going[3 + step]]))
    assert len(later) == 5
