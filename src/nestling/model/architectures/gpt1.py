"""GPT-1 (Radford et al., 2018): the original Transformer's block, norm after each residual sum, none at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from nestling.core.config import parse
from nestling.model.architectures._conv import ConvNames
from nestling.model.config import DecoderConfig
from nestling.model.decoder import Decoder
from nestling.model.hub import activation_from_hub

REFERENCE = "OpenAIGPTLMHeadModel"
MODEL_TYPE = "openai-gpt"
NAMES = ConvNames(
    {
        "embedding.weight": "transformer.tokens_embed.weight",
        "positions.table.weight": "transformer.positions_embed.weight",
        "head.weight": "lm_head.weight",
    }
)
export_weights = NAMES.export_weights
import_weights = NAMES.import_weights
# This family's files say "gelu" for the tanh form.
_ACTIVATIONS = {"gelu_tanh": "gelu", "silu": "silu"}


class Config(DecoderConfig):
    """GPT-1's parts as defaults."""

    architecture: str = "gpt1"
    positions: Literal["learned", "rope", "sinusoidal", "alibi", "none"] = "learned"
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-5
    block: Literal["pre", "post"] = "post"
    activation: Literal["gelu", "gelu_tanh", "silu", "relu_squared"] = "gelu_tanh"
    gated: bool = False
    bias: bool = True
    qkv_bias: bool = True
    init: Literal["zero", "gpt2"] = "gpt2"


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
        "afn": _ACTIVATIONS.get(config.activation, config.activation),
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied,
        **{f"{part}_pdrop": config.dropout for part in ("attn", "embd", "resid")},
    }


def from_hub(hub: Mapping[str, Any]) -> DecoderConfig:
    """The configuration in the family's config.json.

    Raises:
        UserError: a setting that this decoder doesn't have.
    """
    named = {theirs: ours for ours, theirs in _ACTIVATIONS.items()}
    found = {
        "vocab_size": hub["vocab_size"],
        "context": hub["n_positions"],
        "d_model": hub["n_embd"],
        "n_layers": hub["n_layer"],
        "n_heads": hub["n_head"],
        "activation": activation_from_hub(hub.get("afn", "gelu"), named),
        "norm_eps": hub.get("layer_norm_epsilon", 1e-5),
        "tied": hub.get("tie_word_embeddings", True),
        "dropout": hub.get("resid_pdrop", 0.1),
    }
    return parse(Config, found, "config.json")
