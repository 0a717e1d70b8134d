"""The GPT-1/GPT-2 form of checkpoints: matrices stored transposed ("Conv1D"), query, key and value in one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nestling.model.config import DecoderConfig

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")
_PARTS = {
    "attention_norm": "ln_1",
    "attention.output": "attn.c_proj",
    "feed_forward_norm": "ln_2",
    "feed_forward.up": "mlp.c_fc",
    "feed_forward.down": "mlp.c_proj",
}
_FUSED = tuple(f"attention.{part}" for part in ("query", "key", "value"))


@dataclass(frozen=True)
class ConvNames:
    """What a family calls the parts outside its blocks: our name -> theirs."""

    outer: Mapping[str, str]

    def export_weights(self, state: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
        """Our state dict under the family's names and in its form."""
        out = {theirs: state[ours] for ours, theirs in self.outer.items() if ours in state}
        for name, value in state.items():
            if (match := _BLOCK.fullmatch(name)) and match[2] in _PARTS:
                out[f"transformer.h.{match[1]}.{_PARTS[match[2]]}.{match[3]}"] = _turned(value, match[2])
        for layer in range(config.n_layers):
            for kind in ("weight", "bias"):
                parts = [state[f"blocks.{layer}.{part}.{kind}"] for part in _FUSED]
                out[f"transformer.h.{layer}.attn.c_attn.{kind}"] = _turned(torch.cat(parts), _FUSED[0])
        return out

    def import_weights(self, state: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
        """The family's state dict under our names and in our form."""
        out = {ours: state[theirs] for ours, theirs in self.outer.items() if theirs in state}
        for layer in range(config.n_layers):
            for kind in ("weight", "bias"):
                for ours, theirs in _PARTS.items():
                    value = state[f"transformer.h.{layer}.{theirs}.{kind}"]
                    out[f"blocks.{layer}.{ours}.{kind}"] = _turned(value, ours)
                fused = _turned(state[f"transformer.h.{layer}.attn.c_attn.{kind}"], _FUSED[0])
                for part, value in zip(_FUSED, fused.chunk(3), strict=True):
                    out[f"blocks.{layer}.{part}.{kind}"] = value
        return out


def _turned(value: Tensor, part: str) -> Tensor:
    return value.T if value.ndim == 2 and not part.endswith("_norm") else value
