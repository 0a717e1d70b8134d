"""Causal self-attention: query heads in groups that share keys and values, optional norm and rotation of q and k."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.model.cache import LayerMemory
from nestling.model.config import DecoderConfig
from nestling.model.norms import RMSNorm
from nestling.model.positions import Rotation, rotate

EXPLICIT_CPU_TOKENS = 1024
"""Up to this many keys, a CPU trains faster with attention written out in strips of queries than with the fused kernel.

Forward and backward in ms, compiled / eager, 8192 tokens, 4 heads of 64, bf16, 2 cores of an AMD EPYC (Zen 5) that others
used too, `python tests/model/measure_attention.py`, torch 2.13, November 2026:

       T     square     strips of 64    strips of 128      fused
     128    20 /  47      15 /  22        19 /  46       49 /  65
     256    89 /  95      48 /  34        57 /  47       83 /  54
     512   113 / 214      42 /  80        47 /  81       84 /  99
    1024   243 / 410      80 / 135        81 / 139      108 / 108
    2048   537 / 731     173 / 294       149 / 239      196 / 181
"""
SHORTEST_STRIP, MOST_STRIPS = 128, 8
"""128 although 64 wins above: in a whole compiled model (4 layers, d_model 256, T 256, one thread's CPU time) forward and
backward took 361 ms with the square, 373 in strips of 64, 337 in strips of 128, and 452 with the fused kernel."""


class Scene(NamedTuple):
    """What all layers of one forward pass share: who sees whom, and by how much queries and keys are turned."""

    mask: Tensor | None
    """Added to scores, [B or 1, 1 or H, T, S]: 0 where seen, -inf where not. None: all of the past and itself."""
    rotation: Rotation | None


class Attention(nn.Module):
    """softmax(Q Kᵀ / √K) V over the visible past, per head (Vaswani et al., 2017; groups: Ainslie et al., 2023)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head = config.n_heads, config.kv_heads, config.head
        self.dropout = config.dropout
        self.query = nn.Linear(config.d_model, self.heads * self.head, bias=config.qkv_bias)
        self.key = nn.Linear(config.d_model, self.kv_heads * self.head, bias=config.qkv_bias)
        self.value = nn.Linear(config.d_model, self.kv_heads * self.head, bias=config.qkv_bias)
        self.output = nn.Linear(self.heads * self.head, config.d_model, bias=config.bias)
        self.query_norm = RMSNorm(self.head, config.norm_eps) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(self.head, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, scene: Scene, memory: LayerMemory | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]. With `memory` the tokens are appended to it and see all of it."""
        b, t, _ = x.shape
        q, k, v = self.project(x)
        if scene.rotation is not None:
            q, k = rotate(q, scene.rotation), rotate(k, scene.rotation)
        if memory is None:
            k, v = k.transpose(1, 2), v.transpose(1, 2)  # [B, H_kv, S, K]
        else:
            k, v = memory.extend(k, v)
        dropout = self.dropout if self.training else 0.0
        mixed = attend(q.transpose(1, 2), k, v, scene.mask, dropout, aligned=memory is None)
        return self.output(mixed.transpose(1, 2).reshape(b, t, self.heads * self.head).to(x.dtype))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, D] -> queries [B, T, H, K], keys and values [B, T, H_kv, K], not yet rotated."""
        b, t, _ = x.shape
        q = self.query_norm(self.query(x).view(b, t, self.heads, self.head))
        k = self.key_norm(self.key(x).view(b, t, self.kv_heads, self.head))
        return q, k, self.value(x).view(b, t, self.kv_heads, self.head)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0, *, aligned: bool = True
) -> Tensor:
    """Each query's weighted mean of the values it may see: q [B, H, T, K], k and v [B, H_kv, S, K] -> [B, H, T, K].

    Args:
        aligned: query i and key i are the same token, so that no query sees a key of a higher index.
    """
    if not explicit_pays(q.device, k.shape[-2]):
        bias = None if mask is None else mask.to(k.dtype)
        return F.scaled_dot_product_attention(q.to(k.dtype), k, v, bias, dropout, mask is None, enable_gqa=True)
    mask = causal_mask(q.shape[2], q.device) if mask is None else mask
    if not aligned:
        return _explicit(q, k, v, mask, dropout)
    return in_strips(q, k, v, mask, dropout, max(SHORTEST_STRIP, -(-q.shape[2] // MOST_STRIPS)))


def in_strips(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float, strip: int) -> Tensor:
    """Attention written out for `strip` queries at a time: they need no keys to their right, and scores stay in cache."""
    if q.shape[2] <= strip:
        return _explicit(q, k, v, mask, dropout)
    done = []
    for start in range(0, q.shape[2], strip):
        rows, seen = slice(start, start + strip), slice(0, start + strip)
        done.append(_explicit(q[:, :, rows], k[:, :, seen], v[:, :, seen], mask[:, :, rows, seen], dropout))
    return torch.cat(done, 2)


def explicit_pays(device: torch.device, keys: int) -> bool:
    """Whether to write attention out instead of calling the fused kernel."""
    return device.type == "cpu" and keys <= EXPLICIT_CPU_TOKENS


def _explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float) -> Tensor:
    """Attention in four lines. The queries of a group are stacked along T, so that keys are never copied per head."""
    b, h, t, size = q.shape
    groups, s = k.shape[1], k.shape[2]
    q = (q * size**-0.5).to(k.dtype).reshape(b, groups, h // groups * t, size)
    scores = (q @ k.transpose(-1, -2)).view(b, groups, h // groups, t, s)
    if mask.shape[1] == 1:
        scores = scores + mask.unsqueeze(2)
    else:
        scores = scores + mask.unflatten(1, (groups, h // groups))
    weights = F.dropout(scores.float().softmax(-1), dropout).to(v.dtype)
    return (weights.view(b, groups, h // groups * t, s) @ v).view(b, h, t, size)


def causal_mask(size: int, device: torch.device) -> Tensor:
    """[1, 1, T, T]: 0 on and below the diagonal, -inf above."""
    return torch.full((size, size), -torch.inf, device=device).triu(1).view(1, 1, size, size)


def additive(visible: Tensor) -> Tensor:
    """A boolean [.., T, S] as float32: 0 where true, -inf where false."""
    return torch.zeros((), device=visible.device).masked_fill(~visible, -torch.inf)
