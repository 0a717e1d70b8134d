"""Qwen2 and Qwen2.5 (Qwen team, 2024): Llama's parts with biases on queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nestling.core.config import parse
from nestling.model.architectures import _llama
from nestling.model.config import DecoderConfig
from nestling.model.decoder import Decoder

REFERENCE = "Qwen2ForCausalLM"
MODEL_TYPE = "qwen2"
GGUF = "qwen2"
export_weights = _llama.export_weights
import_weights = _llama.import_weights


class Config(DecoderConfig):
    """Qwen2's parts as defaults."""

    architecture: str = "qwen2"
    qkv_bias: bool = True


def build(config: DecoderConfig) -> Decoder:
    """The decoder; start values are the caller's business."""
    return Decoder(config)


def tiny() -> DecoderConfig:
    """For contract tests."""
    return Config(vocab_size=97, context=32, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48)


def to_hub(config: DecoderConfig) -> dict[str, Any]:
    """The family's config.json. It can't name a head size: queries have d_model features in all."""
    shared = _llama.to_hub(config)
    del shared["head_dim"], shared["attention_bias"]
    return {**shared, "use_sliding_window": False}


def from_hub(hub: Mapping[str, Any]) -> DecoderConfig:
    """The configuration in the family's config.json.

    Raises:
        UserError: a setting that this decoder doesn't have.
    """
    return parse(Config, _llama.from_hub(hub), "config.json")
