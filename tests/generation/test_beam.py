"""Searches against the enumeration of all texts of a toy, and against transformers."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import transformers
from toys.texts import LENGTH, LETTERS, STOP, all_texts

from nestling.generation.engine import Engine
from nestling.generation.sampling import Sampling
from nestling.generation.sequence import Request
from nestling.model import checkpoint
from nestling.model.architectures import llama
from nestling.model.decoder import Decoder, build
from nestling.tokenizer.bpe import Tokenizer


def search(
    model: Decoder, letters: Tokenizer, prompt: list[int], beams: int, alpha: float
) -> tuple[tuple[int, ...], float]:
    sampling = Sampling(strategy="beam", max_tokens=LENGTH, options={"beams": beams, "length_penalty": alpha})
    request = Request(prompt, sampling, stop_ids=frozenset([STOP]))
    done = Engine(model, letters, rows=400).generate([request])[0]
    return tuple(done.ids), sum(done.logprobs)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("prompt", [[1], [2, 3], [0, 0, 1, 2]])
def test_a_wide_beam_finds_the_best_of_all(toy: Decoder, letters: Tokenizer, prompt: list[int], alpha: float) -> None:
    scores = all_texts(toy, prompt)
    assert sum(torch.tensor(list(scores.values())).exp().tolist()) == pytest.approx(1, abs=1e-5)
    best = max(scores, key=lambda text: scores[text] / len(text) ** alpha)
    found, score = search(toy, letters, prompt, LETTERS**LENGTH, alpha)
    assert found == best
    assert score == pytest.approx(scores[best], abs=1e-4)


def test_one_beam_is_greedy_and_more_are_likelier(toy: Decoder, letters: Tokenizer) -> None:
    gains = []
    for prompt in itertools.product(range(LETTERS), repeat=3):
        greedy = Request(list(prompt), Sampling(temperature=0, max_tokens=LENGTH), stop_ids=frozenset([STOP]))
        done = Engine(toy, letters).generate([greedy])[0]
        assert search(toy, letters, list(prompt), 1, 0.0)[0] == tuple(done.ids)
        gains.append(search(toy, letters, list(prompt), 8, 0.0)[1] - sum(done.logprobs))
    assert max(gains) > 0.01
    assert sum(gains) > 0


@torch.no_grad()
@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("beams", [1, 3, 8])
def test_texts_of_one_length_are_those_of_transformers(tmp_path: Path, beams: int, alpha: float) -> None:
    """All of them, in order. (Where texts end early, transformers keeps R live ones beside those that ended.)"""
    tokenizer = Tokenizer.train(["the cat sat on the mat"] * 3, vocab_size=270)
    model = build(llama.tiny().with_(vocab_size=tokenizer.vocab_size)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(0, 0.4, generator=torch.Generator().manual_seed(len(parameter)))
    checkpoint.save(tmp_path, model, tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    prompt = [7, 70, 170]
    sampling = Sampling(strategy="beam", max_tokens=12, options={"beams": beams, "length_penalty": alpha})
    done = Engine(model, tokenizer).generate([Request(prompt, sampling, stop_ids=frozenset())])[0]
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = theirs.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, 3), num_beams=beams, num_return_sequences=beams,
        length_penalty=alpha, **settings,
    )  # fmt: skip
    assert [c.ids for c in (done, *done.others)] == found[:, len(prompt) :].tolist()
