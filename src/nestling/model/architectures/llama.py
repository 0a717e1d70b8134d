"""Llama (Touvron et al., 2023): RoPE, RMS norm, SwiGLU, grouped keys and values, no biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nestling.core.config import parse
from nestling.core.errors import UserError
from nestling.model.architectures import _llama
from nestling.model.config import DecoderConfig
from nestling.model.decoder import Decoder

REFERENCE = "LlamaForCausalLM"
MODEL_TYPE = "llama"
GGUF = "llama"
export_weights = _llama.export_weights
import_weights = _llama.import_weights


class Config(DecoderConfig):
    """Llama's parts as defaults."""

    architecture: str = "llama"
    tied: bool = False


def build(config: DecoderConfig) -> Decoder:
    """The decoder; start values are the caller's business."""
    return Decoder(config)


def tiny() -> DecoderConfig:
    """For contract tests."""
    return Config(vocab_size=97, context=32, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48)


def to_hub(config: DecoderConfig) -> dict[str, Any]:
    """The family's config.json."""
    return {**_llama.to_hub(config), "mlp_bias": config.bias}


def from_hub(hub: Mapping[str, Any]) -> DecoderConfig:
    """The configuration in the family's config.json.

    Raises:
        UserError: a setting that this decoder doesn't have.
    """
    bias = hub.get("attention_bias", False)
    if bias != hub.get("mlp_bias", False):
        raise UserError("attention_bias and mlp_bias differ, which is not supported", where="config.json", value=bias)
    return parse(Config, {**_llama.from_hub(hub), "bias": bias, "qkv_bias": bias}, "config.json")
