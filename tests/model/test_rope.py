"""Stretched RoPE and windows against transformers, in both generations of config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nestling.core.errors import UserError
from nestling.model import checkpoint, hub
from nestling.model.cache import KVCache
from nestling.model.decoder import Decoder

transformers = pytest.importorskip("transformers")

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS: dict[str, tuple[dict[str, Any], int]] = {
    "linear": ({"rope_type": "linear", "factor": 3.0}, 64),
    "dynamic": ({"rope_type": "dynamic", "factor": 4.0}, 16),
    "llama3": ({**LLAMA3, "original_max_position_embeddings": 16}, 64),
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
    "yarn, untruncated": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False, "beta_fast": 8.0},
        64,
    ),
    "yarn, mscale": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 0.5},
        64,
    ),
}
SIZES = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(params=SCALINGS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Decoder, Any, Path]:
    """Our model read from their folder, and theirs."""
    rope, longest = SCALINGS[request.param]
    torch.manual_seed(0)
    rope = {**rope, "rope_theta": 500.0}
    config = transformers.LlamaConfig(**SIZES, **HEADS, max_position_embeddings=longest, rope_parameters=rope)
    theirs = transformers.LlamaForCausalLM(config).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    return checkpoint.load_model(tmp_path)[0], theirs, tmp_path


def some_ids(length: int) -> torch.Tensor:
    return torch.randint(0, 97, (2, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def test_logits_within_and_beyond_the_original_context(pair: tuple[Decoder, Any, Path]) -> None:
    ours, theirs, _ = pair
    assert ours.config.context == 64
    for length in (9, 16, 40, 64):
        torch.testing.assert_close(ours(some_ids(length)), theirs(some_ids(length)).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_stretching_does_something(pair: tuple[Decoder, Any, Path]) -> None:
    ours, _, _ = pair
    plain = Decoder(ours.config.with_(rope_scaling=None)).eval()
    plain.load_state_dict(ours.state_dict())
    assert (plain(some_ids(40)) - ours(some_ids(40))).abs().max() > 1e-3


@torch.no_grad()
def test_older_files_say_rope_scaling(pair: tuple[Decoder, Any, Path]) -> None:
    ours, _, folder = pair
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    path.write_text(json.dumps({**config, "rope_scaling": rope}))
    assert checkpoint.load_model(folder)[0].config == ours.config


def test_our_config_json_is_read_alike_by_both(pair: tuple[Decoder, Any, Path]) -> None:
    ours, theirs, _ = pair
    written = hub.to_hub(ours.config)
    assert hub.from_hub(written)[0] == ours.config
    read = transformers.LlamaConfig(**written)
    assert read.max_position_embeddings == theirs.config.max_position_embeddings
    skipped = {"mscale", "mscale_all_dim"}  # written as the amplitude that follows from them
    for name, value in theirs.config.rope_parameters.items():
        assert name in skipped or read.rope_parameters[name] == value


@torch.no_grad()
def test_token_by_token_with_a_cache(pair: tuple[Decoder, Any, Path]) -> None:
    """Also beyond the original context, where dynamic scaling turns new keys by other angles than the cached ones."""
    ours, theirs, _ = pair
    ids = some_ids(40)
    cache = KVCache(ours.config, rows=2, capacity=64)
    past = transformers.DynamicCache()
    for start, stop in ((0, 12), (12, 13), (13, 20), *((n, n + 1) for n in range(20, 40))):
        got = ours(ids[:, start:stop], cache=cache)
        expected = theirs(ids[:, start:stop], past_key_values=past, use_cache=True).logits
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_row_of_another_length_does_not_change_dynamic_angles() -> None:
    config = hub.from_hub({"model_type": "llama", **SIZES, **HEADS, "max_position_embeddings": 16,
                           "rope_scaling": {"type": "dynamic", "factor": 4.0}})[0]  # fmt: skip
    model = Decoder(config).eval()
    ids = some_ids(40)
    cache = KVCache(config, rows=2, capacity=64)
    got = model(ids, cache=cache, counts=torch.tensor([40, 10]))
    torch.testing.assert_close(got[1, :10], model(ids[1:, :10])[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_window_longer_than_the_text_is_none_and_a_shorter_one_forgets() -> None:
    torch.manual_seed(0)
    config = transformers.MistralConfig(**SIZES, **HEADS, max_position_embeddings=64, sliding_window=5)
    model = Decoder(hub.from_hub(config.to_dict())[0].with_(n_layers=1)).eval()
    ids = some_ids(20)
    changed = ids.clone()
    changed[:, 3] += 1
    before, after = model(ids), model(changed % 97)
    assert (before - after).abs().amax((0, 2))[3:8].min() > 1e-4  # tokens 3 to 7 see token 3
    torch.testing.assert_close(before[:, 8:], after[:, 8:], rtol=0, atol=0)
    wide = Decoder(model.config.with_(window=None)).eval()
    wide.load_state_dict(model.state_dict())
    torch.testing.assert_close(wide(ids)[:, :5], before[:, :5], rtol=0, atol=1e-6)


def test_ways_that_we_lack_are_refused() -> None:
    shared = {"model_type": "llama", **SIZES, **HEADS, "max_position_embeddings": 16}
    with pytest.raises(UserError, match="unknown way of scaling RoPE"):
        hub.from_hub({**shared, "rope_scaling": {"rope_type": "longrope", "factor": 2.0}})
    with pytest.raises(UserError, match="only a part of each head"):
        hub.from_hub({**shared, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}})
    with pytest.raises(UserError, match="greater than or equal to 1"):
        hub.from_hub({**shared, "rope_scaling": {"rope_type": "linear", "factor": 0.5}})
