"""Mistral (Jiang et al., 2023): Llama's parts, each token seeing a window of the past instead of all of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nestling.core.config import parse
from nestling.model.architectures import _llama
from nestling.model.config import DecoderConfig
from nestling.model.decoder import Decoder

REFERENCE = "MistralForCausalLM"
MODEL_TYPE = "mistral"
GGUF = "llama"
export_weights = _llama.export_weights
import_weights = _llama.import_weights


class Config(DecoderConfig):
    """Mistral's parts as defaults."""

    architecture: str = "mistral"
    tied: bool = False
    window: int | None = 4096


def build(config: DecoderConfig) -> Decoder:
    """The decoder; start values are the caller's business."""
    return Decoder(config)


def tiny() -> DecoderConfig:
    """For contract tests. Two layers reach twice the window, so everything within a test's 12 tokens matters."""
    return Config(vocab_size=97, context=32, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, window=7)


def to_hub(config: DecoderConfig) -> dict[str, Any]:
    """The family's config.json."""
    shared = _llama.to_hub(config)
    del shared["attention_bias"]
    return {**shared, "sliding_window": config.window}


def from_hub(hub: Mapping[str, Any]) -> DecoderConfig:
    """The configuration in the family's config.json.

    Raises:
        UserError: a setting that this decoder doesn't have.
    """
    # The family's own default window is 4096; later models write null for none.
    return parse(Config, {**_llama.from_hub(hub), "window": hub.get("sliding_window", 4096)}, "config.json")
