"""Ways of decoding side by side: the figures against counting by hand, and what a page of them holds."""

from __future__ import annotations

import json
import math

import pytest
import torch

from nestling.core.errors import UserError
from nestling.generation import lab
from nestling.generation.engine import Engine
from nestling.model.decoder import Decoder

PROMPT = [5, 9, 200]


@pytest.fixture
def wide(model: Decoder, engine: Engine) -> Engine:
    return Engine(model, engine.tokenizer, rows=lab.rows(lab.METHODS.values(), 4))


def test_every_method_of_the_list_runs(wide: Engine) -> None:
    results = lab.compare(wide, PROMPT, list(lab.METHODS.values()), samples=4, max_tokens=12)
    by_name = {result.method.name: result for result in results}
    assert list(by_name) == list(lab.METHODS)
    assert all(len(result.texts) == 4 for result in results)
    assert by_name["exhaustive"].tokens <= lab.TREE_TOKENS
    assert len(set(by_name["greedy"].texts)) == 1
    assert len(set(by_name["pure-sampling"].texts)) == len(set(by_name["stochastic-beam"].texts)) == 4
    assert by_name["greedy"].distinct_2 < 0.3 < by_name["pure-sampling"].distinct_2
    assert by_name["top-k"].least >= by_name["pure-sampling"].least
    assert by_name["beam"].logprob > by_name["pure-sampling"].logprob


def test_likelihood_is_the_models_at_temperature_one(wide: Engine, model: Decoder) -> None:
    """Also of a text that was drawn from another distribution; the colours of the first text are the same figures."""
    result = lab.compare(wide, PROMPT, [lab.method("temperature=0.3,top_k=5")], samples=1, max_tokens=9)[0]
    ids = wide.tokenizer.encode(result.texts[0])
    with torch.no_grad():
        logits = model(torch.tensor([[*PROMPT, *ids]]))[0, len(PROMPT) - 1 : -1]
    again = logits.log_softmax(1)[range(len(ids)), ids]
    known = lab.reference(wide, PROMPT, result.texts[0])
    assert known.logprob == pytest.approx(again.mean().item(), abs=1e-4)
    assert known.least == pytest.approx(again.min().item(), abs=1e-4)
    assert result.logprob == pytest.approx(sum(p for _, p in result.scored) / len(result.scored), abs=1e-5)


def test_counting_by_hand() -> None:
    assert lab.distinct([[1, 2, 1, 2, 1]], 2) == 2 / 4
    assert lab.distinct([[1, 2], [1, 2], [3, 4]], 2) == 2 / 3
    assert lab.distinct([[1]], 2) == 1


def test_repetition_is_the_share_of_what_stood_before(wide: Engine) -> None:
    text = "the cat sat. the cat sat. the cat sat. "
    ids = wide.tokenizer.encode(text)
    runs = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    before = sum(run in runs[:place] for place, run in enumerate(runs))
    assert before > 3
    assert lab.reference(wide, PROMPT, text).repetition == pytest.approx(before / len(runs))


def test_pages_hold_every_text(wide: Engine) -> None:
    results = lab.compare(wide, PROMPT, [lab.method("greedy"), lab.method("top_p=0.5")], samples=3, max_tokens=8)
    page = lab.markdown("a | b", results)
    assert page.startswith("# a \\| b\n")
    assert page.count("\n## ") == 2
    plain = json.loads(json.dumps(lab.plain("a", results)))
    assert [entry["settings"] for entry in plain["methods"]] == [
        {"temperature": 0.0, "max_tokens": 8},
        {"top_p": 0.5, "max_tokens": 8},
    ]
    assert all(len(entry["texts"]) == 3 and math.isfinite(entry["logprob"]) for entry in plain["methods"])
    assert len(lab.lessons(results)) >= 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("gredy", "did you mean 'greedy'?"),
        ("top_p=2", "--method.top_p: must be less than or equal to 1"),
        ("strategy=beam,beam=8", "beam"),
        ("strategy=none", "none"),
    ],
)
def test_a_bad_method_is_named(words: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        lab.method(words)
    assert says in str(caught.value)
