"""The Llama form of checkpoints, shared by the families that keep its names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nestling.model.architectures._rope import rope_from_hub, rope_to_hub
from nestling.model.config import DecoderConfig
from nestling.model.hub import ACTIVATION_NAMES, activation_from_hub, require

_OUTER = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_PARTS = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
    "feed_forward.router": "mlp.gate",
}
_OURS = {theirs: ours for ours, theirs in {**_OUTER, **_PARTS}.items()}


def export_weights(state: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """Our state dict under Llama's names."""
    return {_their_name(name): value for name, value in state.items()}


def import_weights(state: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """A state dict with Llama's names under ours."""
    return {_our_name(name): value for name, value in state.items()}


def to_hub(config: DecoderConfig) -> dict[str, Any]:
    """The part of config.json that the families share."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head,
        "intermediate_size": config.ff,
        "hidden_act": ACTIVATION_NAMES[config.activation],
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.qkv_bias,
        "attention_dropout": config.dropout,
        "tie_word_embeddings": config.tied,
        **rope_to_hub(config),
    }


def from_hub(hub: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of our configuration from the shared part of config.json.

    Raises:
        UserError: a setting that this decoder doesn't have.
    """
    require(hub, use_sliding_window=False, pretraining_tp=1)
    return {
        "vocab_size": hub["vocab_size"],
        "d_model": hub["hidden_size"],
        "n_layers": hub["num_hidden_layers"],
        "n_heads": hub["num_attention_heads"],
        "n_kv_heads": hub.get("num_key_value_heads"),
        "head_size": hub.get("head_dim"),
        "d_ff": hub["intermediate_size"],
        "activation": activation_from_hub(hub.get("hidden_act", "silu")),
        "norm_eps": hub.get("rms_norm_eps", 1e-6),
        "tied": hub.get("tie_word_embeddings", False),
        "dropout": hub.get("attention_dropout", 0.0),
        **rope_from_hub(hub),
    }


def _their_name(name: str) -> str:
    part, kind = name.rsplit(".", 1)
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", part):
        return f"model.layers.{match[1]}.{_PARTS[match[2]]}.{kind}"
    return f"{_OUTER[part]}.{kind}"


def _our_name(name: str) -> str:
    part, kind = name.rsplit(".", 1)
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", part):
        return f"blocks.{match[1]}.{_OURS[match[2]]}.{kind}"
    return f"{_OURS[part]}.{kind}"
