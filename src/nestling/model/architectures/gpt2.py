"""GPT-2 (Radford et al., 2019): learned positions, layer norm before each sub-layer, GELU, biases everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from nestling.core.config import parse
from nestling.model.architectures._conv import ConvNames
from nestling.model.config import DecoderConfig
from nestling.model.decoder import Decoder
from nestling.model.hub import ACTIVATION_NAMES, activation_from_hub, require

REFERENCE = "GPT2LMHeadModel"
MODEL_TYPE = "gpt2"
GGUF = "gpt2"
NAMES = ConvNames(
    {
        "embedding.weight": "transformer.wte.weight",
        "positions.table.weight": "transformer.wpe.weight",
        "norm.weight": "transformer.ln_f.weight",
        "norm.bias": "transformer.ln_f.bias",
        "head.weight": "lm_head.weight",
    }
)
export_weights = NAMES.export_weights
import_weights = NAMES.import_weights


class Config(DecoderConfig):
    """GPT-2's parts as defaults."""

    architecture: str = "gpt2"
    positions: Literal["learned", "rope", "sinusoidal", "alibi", "none"] = "learned"
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-5
    activation: Literal["gelu", "gelu_tanh", "silu", "relu_squared"] = "gelu_tanh"
    gated: bool = False
    bias: bool = True
    qkv_bias: bool = True


def build(config: DecoderConfig) -> Decoder:
    """The decoder; start values are the caller's business."""
    return Decoder(config)


def tiny() -> DecoderConfig:
    """For contract tests."""
    return Config(vocab_size=97, context=32, d_model=32, n_layers=2, n_heads=4)


def to_hub(config: DecoderConfig) -> dict[str, Any]:
    """The family's config.json."""
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.context,
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.ff,
        "activation_function": ACTIVATION_NAMES[config.activation],
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied,
        **{f"{part}_pdrop": config.dropout for part in ("attn", "embd", "resid")},
    }


def from_hub(hub: Mapping[str, Any]) -> DecoderConfig:
    """The configuration in the family's config.json.

    Raises:
        UserError: a setting that this decoder doesn't have.
    """
    require(hub, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    found = {
        "vocab_size": hub["vocab_size"],
        "context": hub["n_positions"],
        "d_model": hub["n_embd"],
        "n_layers": hub["n_layer"],
        "n_heads": hub["n_head"],
        "d_ff": hub.get("n_inner"),
        "activation": activation_from_hub(hub.get("activation_function", "gelu_new")),
        "norm_eps": hub.get("layer_norm_epsilon", 1e-5),
        "tied": hub.get("tie_word_embeddings", True),
        "dropout": hub.get("resid_pdrop", 0.1),
    }
    return parse(Config, found, "config.json")
