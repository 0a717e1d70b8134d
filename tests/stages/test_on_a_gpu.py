"""The road, the engine and the server's readings on a GPU, pretended where none is: whatever lies on the wrong device fails.

Kernels, compilation, 8-bit products and several GPUs need a real one.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended import pretended_gpu
from toys.models import random_model

from nestling.core import pipeline
from nestling.core.errors import Interrupted
from nestling.core.recipe import Recipe, load_recipe
from nestling.core.runtime import Runtime, detect
from nestling.core.storage import read_json
from nestling.generation.engine import Engine
from nestling.generation.sampling import Sampling
from nestling.generation.sequence import Request
from nestling.model.cache import KVCache
from nestling.planning import activations
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.special import CHAT
from nestling.training import loop

TINY = Path(__file__).with_name("tiny.yaml")
MOE = "pretrain.model={architecture: qwen3_moe, d_model: 32, n_layers: 2, n_heads: 2, experts: {count: 4, per_token: 2, d_ff: 32}}"
ADAPTED = [f"{stage}.adapters={{rank: 4, alpha: 8}}" for stage in ("sft", "reward", "ppo")]
WAYS: dict[str, tuple[tuple[int, int], str, list[str]]] = {
    "bf16": ((9, 0), "evaluate", []),
    "fp16": ((7, 5), "ppo", ["pretrain.training.optimizer=muon", "pretrain.training.recompute=blocks"]),
    "adapters": ((9, 0), "ppo", ADAPTED),
    "experts": ((9, 0), "sft", [MOE]),
}
"""Capability of the GPU, how far the road is gone, settings."""


def test_the_pretended_gpu_refuses_what_cuda_refuses() -> None:
    with pretended_gpu():
        there, here = torch.ones(3, 3, device="cuda"), torch.ones(3, 3)
        assert there.device.type == (there @ there)[0].device.type == here.to(there).device.type == "cuda"
        assert here.device.type == there.cpu().device.type == "cpu"
        assert (there * torch.tensor(2.0))[torch.tensor([1])].sum().item() == 6.0
        for wrong in (
            lambda: there + here,
            lambda: here[torch.tensor([1], device="cuda")],
            lambda: torch.nn.functional.embedding(torch.tensor([1]), there),
            lambda: there.where(there > 0, here),
            lambda: there.uniform_(generator=torch.Generator()),
        ):
            with pytest.raises(RuntimeError, match="one device"):
                wrong()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()


def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    """The pretended device, of which nothing can be measured."""
    monkeypatch.setattr(loop, "measured_peak", lambda runtime: 1e11)
    rehearse = activations._rehearse
    monkeypatch.setattr(
        activations,
        "_rehearse",
        lambda config, batch, *rest: rehearse(config, dataclasses.replace(batch, device="cpu"), *rest),
    )
    found = detect("auto")
    assert found.device.type == "cuda"
    return found


def road(*settings: str) -> Recipe:
    return load_recipe(TINY, list(settings))


@pytest.mark.parametrize("way", WAYS)
def test_the_road(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    capability, until, settings = WAYS[way]
    with pretended_gpu(capability):
        runtime = on_a_gpu(monkeypatch)
        assert runtime.dtype == (torch.float16 if way == "fp16" else torch.bfloat16)
        reports = pipeline.run(road(*settings), tmp_path / "run", runtime, until, quiet=True)
    assert list(reports)[-1] == until
    assert reports["sft"]["steps"] == 4


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_gpu():
        runtime = on_a_gpu(monkeypatch)
        whole = pipeline.run(road(), tmp_path / "whole", runtime, "pretrain", quiet=True)["pretrain"]
        finish = loop._Loop.finish

        def stopping(self: Any, step: int, *rest: Any) -> None:
            finish(self, step, *rest)
            if step == 3:
                self.asked.append("Ctrl-C")

        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(loop._Loop, "finish", stopping)
            pipeline.run(road(), tmp_path / "parts", runtime, "pretrain", quiet=True)
        parts = pipeline.run(road(), tmp_path / "parts", runtime, "pretrain", quiet=True)["pretrain"]
    assert parts["val_bpb"] == whole["val_bpb"]
    assert read_json(tmp_path / "parts" / "pretrain" / "stage.json")["report"]["steps"] == 8


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat sat on the mat and the dog sat on the log", "12 + 3 = 15"] * 3, 290).with_special(
        CHAT
    )


def requests(tokenizer: Tokenizer) -> list[Request]:
    """Every strategy, and everything that moves or forbids a token."""
    prompts = [
        tokenizer.encode(text) for text in ("the cat sat on the", "12 + 3", "the dog sat on the log and the cat")
    ]
    beams = {name: {"strategy": name, "options": {"beams": 4}} for name in ("beam", "diverse_beam", "stochastic_beam")}
    asked: list[dict[str, Any]] = [
        {"strategy": "greedy"},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95, "top_logprobs": 3},
        {
            "temperature": 1.3,
            "epsilon_cutoff": 1e-4,
            "eta_cutoff": 1e-3,
            "repetition_penalty": 1.2,
            "logit_bias": {40: 3.0},
        },
        {"frequency_penalty": 0.5, "presence_penalty": 0.5, "min_tokens": 6, "stop": ["zzz"]},
        {"constraint": {"regex": "[0-9]{3} [a-z]+"}},
        {"strategy": "contrastive"},
        {"strategy": "exhaustive", "top_k": 3, "options": {"rows": 9}, "max_tokens": 3},
        *beams.values(),
    ]
    found = [
        Request(prompt, Sampling(**{"max_tokens": 8, **fields}), seed=seed)
        for seed, (prompt, fields) in enumerate((prompt, fields) for prompt in prompts for fields in asked)
    ]
    return [
        *found,
        *(Request(prompt, Sampling(temperature=0.7, max_tokens=12), seed=9, speculate=3) for prompt in prompts),
    ]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", ["grouped", "learned", "alibi"])
def test_the_engine_writes_what_it_writes_on_a_cpu(kind: str, frozen: bool, tokenizer: Tokenizer) -> None:
    family: dict[str, dict[str, Any]] = {
        "grouped": {"n_heads": 4, "n_kv_heads": 2, "qk_norm": True},
        "learned": {"positions": "learned", "norm": "layer", "gated": False},
        "alibi": {"positions": "alibi"},
    }
    model = random_model(tokenizer.vocab_size, context=64, **family[kind])
    wanted = Engine(model, tokenizer, rows=12).generate(requests(tokenizer))
    with pretended_gpu():
        engine = Engine(model.to("cuda"), tokenizer, rows=12, frozen=frozen)
        found = engine.generate(requests(tokenizer))
    assert [one.ids for one in found] == [one.ids for one in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keys_are_copied_per_head_where_no_fast_kernel_knows_groups(
    dtype: torch.dtype, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server decodes with a mask; of torch's fast kernels only the one that takes no mask knows groups."""
    seen: list[tuple[int, int]] = []
    usual = torch.nn.functional.scaled_dot_product_attention

    def watched(q: torch.Tensor, k: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        seen.append((q.shape[1], k.shape[1]))
        return usual(q, k, *rest, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    model = random_model(tokenizer.vocab_size, n_heads=4, n_kv_heads=2)
    with pretended_gpu():
        engine = Engine(model.to("cuda"), tokenizer, rows=2, dtype=dtype, frozen=True)
        engine.generate([Request(tokenizer.encode("the cat"), Sampling(max_tokens=3))])
    assert set(seen) == {(4, 4)}


def test_counting_what_the_cache_holds_waits_for_no_gpu(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(tokenizer.vocab_size)
    with pretended_gpu():
        model.to("cuda")
        cache = KVCache(model.config, 3, 16, "cuda")
        step = cache.begin(4, torch.tensor([2, 0]), torch.tensor([4, 1]))
        assert step.rows.device.type == "cuda"
        monkeypatch.setattr(torch.Tensor, "cpu", None)
        step.commit()
    assert cache.lengths.tolist() == [1, 0, 4]
