"""Qwen3-MoE (Qwen team, 2025): Qwen3 whose feed-forwards are experts, of which each token uses a few."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nestling.core.config import parse
from nestling.model.architectures import _llama, qwen3
from nestling.model.config import DecoderConfig, Experts
from nestling.model.decoder import Decoder

REFERENCE = "Qwen3MoeForCausalLM"
MODEL_TYPE = "qwen3_moe"
GGUF = "qwen3moe"
_STACKED = re.compile(r"(blocks\.\d+\.feed_forward)\.(gate|up|down)\.weight")
_EXPERT = "model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"


class Config(qwen3.Config):
    """Qwen3's parts with experts as wide as the published models' in proportion: d_ff of all that a token uses."""

    architecture: str = "qwen3_moe"
    experts: Experts | None = Experts(count=8, per_token=2, d_ff=384)


def build(config: DecoderConfig) -> Decoder:
    """The decoder; start values are the caller's business."""
    return Decoder(config)


def tiny() -> DecoderConfig:
    """For contract tests: the first layer dense, as some published models have it."""
    experts = Experts(count=4, per_token=2, d_ff=24, dense_layers=(0,))
    sizes: dict[str, Any] = {"vocab_size": 97, "context": 32, "d_model": 32, "n_layers": 3, "d_ff": 48}
    return Config(**sizes, n_heads=4, n_kv_heads=2, head_size=16, experts=experts)


def export_weights(state: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """Our state dict under the family's names: each expert's matrices apart."""
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        match = _STACKED.fullmatch(name)
        if match is None or value.ndim == 2:
            out |= _llama.export_weights({name: value}, config)
        else:
            layer = match[1].split(".")[1]
            names = (_EXPERT.format(layer=layer, expert=n, part=match[2]) for n in range(len(value)))
            out |= dict(zip(names, value, strict=True))
    return out


def import_weights(state: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """The family's state dict under our names: the experts of a layer stacked."""
    plain = {name: value for name, value in state.items() if ".mlp.experts." not in name}
    out = _llama.import_weights(plain, config)
    assert config.experts is not None
    for layer in range(config.n_layers):
        if layer not in config.experts.dense_layers:
            for part in ("gate", "up", "down"):
                names = (_EXPERT.format(layer=layer, expert=n, part=part) for n in range(config.experts.count))
                out[f"blocks.{layer}.feed_forward.{part}.weight"] = torch.stack([state[name] for name in names])
    return out


def to_hub(config: DecoderConfig) -> dict[str, Any]:
    """The family's config.json."""
    shared = qwen3.to_hub(config)
    if (experts := config.experts) is None:
        return shared
    return {
        **shared,
        "num_experts": experts.count,
        "num_local_experts": experts.count,  # transformers 5 writes this name
        "num_experts_per_tok": experts.per_token,
        "moe_intermediate_size": experts.d_ff,
        "norm_topk_prob": experts.normalised,
        "mlp_only_layers": list(experts.dense_layers),
        "decoder_sparse_step": 1,
        "router_aux_loss_coef": experts.balance,
    }


def from_hub(hub: Mapping[str, Any]) -> DecoderConfig:
    """The configuration in the family's config.json.

    Raises:
        UserError: a setting that this decoder doesn't have.
    """
    step, dense = hub.get("decoder_sparse_step", 1), set(hub.get("mlp_only_layers") or ())
    found = {
        "count": hub["num_local_experts"] if "num_local_experts" in hub else hub["num_experts"],
        "per_token": hub["num_experts_per_tok"],
        "d_ff": hub["moe_intermediate_size"],
        "normalised": hub.get("norm_topk_prob", False),
        "dense_layers": tuple(n for n in range(hub["num_hidden_layers"]) if n in dense or (n + 1) % step),
        "balance": hub.get("router_aux_loss_coef", 0.001),
    }
    return parse(Config, {**qwen3.fields_from_hub(hub), "experts": found}, "config.json")
