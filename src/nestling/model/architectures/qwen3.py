"""Qwen3 (Qwen team, 2025): Llama's parts with RMS norm on each head's queries and keys, which keeps runs stable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nestling.core.config import parse
from nestling.model.architectures import _llama
from nestling.model.config import DecoderConfig
from nestling.model.decoder import Decoder
from nestling.model.hub import require

REFERENCE = "Qwen3ForCausalLM"
MODEL_TYPE = "qwen3"
GGUF = "qwen3"
export_weights = _llama.export_weights
import_weights = _llama.import_weights


class Config(DecoderConfig):
    """Qwen3's parts as defaults."""

    architecture: str = "qwen3"
    qk_norm: bool = True


def build(config: DecoderConfig) -> Decoder:
    """The decoder; start values are the caller's business."""
    return Decoder(config)


def tiny() -> DecoderConfig:
    """For contract tests. The heads are wider than d_model / n_heads, as in the published models."""
    return Config(vocab_size=97, context=32, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_size=16, d_ff=48)


def to_hub(config: DecoderConfig) -> dict[str, Any]:
    """The family's config.json."""
    return {**_llama.to_hub(config), "use_sliding_window": False}


def from_hub(hub: Mapping[str, Any]) -> DecoderConfig:
    """The configuration in the family's config.json.

    Raises:
        UserError: a setting that this decoder doesn't have.
    """
    return parse(Config, fields_from_hub(hub), "config.json")


def fields_from_hub(hub: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the configuration, shared with the family that has experts.

    Raises:
        UserError: a setting that this decoder doesn't have.
    """
    require(hub, attention_bias=False)
    # The family's own default head size is 128, not d_model / n_heads.
    return {**_llama.from_hub(hub), "head_size": hub.get("head_dim", 128)}
