"""Causal self-attention: query heads in groups that share keys and values, optional norm and rotation of q and k."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_mask, flex_attention

from nestling.model import kernels
from nestling.model.cache import LayerMemory
from nestling.model.config import DecoderConfig
from nestling.model.norms import RMSNorm
from nestling.model.positions import Rotation, rotate

EXPLICIT_CPU_TOKENS = 1024
"""Up to this many keys, a CPU trains faster with attention written out in strips of queries than with the fused kernel,
where native code does not do it (`kernels.py`, three to four times as fast as either).

Forward and backward in ms, compiled / eager, 8192 tokens, 4 heads of 64, bf16, 2 cores of an AMD EPYC (Zen 5) that others
used too, `python tests/model/measure_attention.py`, torch 2.13, November 2026:

       T     square     strips of 64    strips of 128      fused
     128    20 /  47      15 /  22        19 /  46       49 /  65
     256    89 /  95      48 /  34        57 /  47       83 /  54
     512   113 / 214      42 /  80        47 /  81       84 /  99
    1024   243 / 410      80 / 135        81 / 139      108 / 108
    2048   537 / 731     173 / 294       149 / 239      196 / 181
"""
TILE = 128
"""Queries, and keys, that flex attention skips or computes together."""
SHORTEST_STRIP, MOST_STRIPS = 128, 8
"""128 although 64 wins above: in a whole compiled model (4 layers, d_model 256, T 256, one thread's CPU time) forward and
backward took 361 ms with the square, 373 in strips of 64, 337 in strips of 128, and 452 with the fused kernel."""


Mask = Tensor | BlockMask | kernels.Sight | None


class Scene(NamedTuple):
    """What all layers of one forward pass share: who sees whom, and by how much queries and keys are turned."""

    mask: Mask
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
        if isinstance(scene.mask, kernels.Sight):
            mixed = kernels.attend(q, k, v, scene.mask)
        else:
            k, v = (k.transpose(1, 2), v.transpose(1, 2)) if memory is None else memory.extend(k, v)  # [B, H_kv, S, K]
            dropout = self.dropout if self.training else 0.0
            mixed = attend(q.transpose(1, 2), k, v, scene.mask, dropout, aligned=memory is None).transpose(1, 2)
        return self.output(mixed.reshape(b, t, self.heads * self.head).to(x.dtype))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, D] -> queries [B, T, H, K], keys and values [B, T, H_kv, K], not yet rotated."""
        b, t, _ = x.shape
        q = self.query_norm(self.query(x).view(b, t, self.heads, self.head))
        k = self.key_norm(self.key(x).view(b, t, self.kv_heads, self.head))
        return q, k, self.value(x).view(b, t, self.kv_heads, self.head)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None, dropout: float = 0.0, *, aligned: bool = True
) -> Tensor:
    """Each query's weighted mean of the values it may see: q [B, H, T, K], k and v [B, H_kv, S, K] -> [B, H, T, K].

    Args:
        aligned: query i and key i are the same token, so that no query sees a key of a higher index.
    """
    if isinstance(mask, BlockMask):
        if torch.compiler.is_compiling():
            mixed: Tensor = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
            return mixed
        mask = _dense(mask, len(q), q.device)  # the compiler gave up: without it flex attention writes all scores down
    if not explicit_pays(q.device, k.shape[-2]):
        return fused(q.to(k.dtype), k, v, mask, dropout)
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


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product with `x` would be computed in at this place."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def flex_pays(config: DecoderConfig, device: torch.device, keys: int) -> bool:
    """Whether compiled flex attention takes a mask's place: on a GPU the fused kernel loses its fast form to any mask,
    and a mask takes memory with the square of the context. Flex attention knows no dropout and no heads under 16."""
    able = not config.dropout and config.head >= 16 and config.positions != "alibi"
    return device.type == "cuda" and keys >= TILE and able


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Torch's kernel. On a GPU its one fast form that knows groups takes no mask and no float32, and is missing where
    float16 is the dtype of choice: there keys are copied per head."""
    copies = q.shape[1] // k.shape[1]
    if copies > 1 and q.device.type == "cuda" and (mask is not None or k.dtype != torch.bfloat16):
        k, v = k.repeat_interleave(copies, 1), v.repeat_interleave(copies, 1)
    bias = None if mask is None else mask.to(k.dtype)
    return F.scaled_dot_product_attention(q, k, v, bias, dropout, mask is None, enable_gqa=True)


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


def block_mask(size: int, device: torch.device, segments: Tensor | None = None, window: int | None = None) -> BlockMask:
    """Who sees whom among `size` tokens, as flex attention reads it: tiles to skip, to check and to take whole.

    Torch's own function looks at all T² pairs. Here the smallest and largest segment of each tile decide, which never
    skips a tile that counts; numbers of segments that rise along a row make it exact.

    Args:
        segments: [B, T] document of each token; one document when not given.
        window: how many tokens are seen, a token itself among them; all when not given.
    """

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = q >= k
        if window is not None:
            seen = seen & (q - k < window)
        return seen if segments is None else seen & (segments[b, q] == segments[b, k])

    tiles = torch.arange(-(-size // TILE), device=device)
    ahead = tiles.unsqueeze(1) - tiles  # [n, n] tiles between a query's and a key's
    some, whole = ahead >= 0, (ahead > 0) & (tiles < size // TILE).unsqueeze(1)
    if window is not None:
        some, whole = some & ((ahead - 1) * TILE + 1 < window), whole & ((ahead + 1) * TILE - 1 < window)
    if segments is None:
        some, whole = some.unsqueeze(0), whole.unsqueeze(0)
    else:
        filled = segments[:, torch.arange(len(tiles) * TILE, device=device).clamp_max(size - 1)]
        low, high = filled.unflatten(1, (-1, TILE)).aminmax(dim=-1)  # [B, n]
        some = some & (low.unsqueeze(2) <= high.unsqueeze(1)) & (high.unsqueeze(2) >= low.unsqueeze(1))
        alone = low == high  # tiles of one document
        whole = whole & (high.unsqueeze(2) == low.unsqueeze(1)) & alone.unsqueeze(2) & alone.unsqueeze(1)
    part = _listed(some & ~whole)
    return BlockMask.from_kv_blocks(*part, *_listed(whole), TILE, sees, (size, size))


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """A boolean [B, n, n] as flex attention wants it: how many of each row [B, 1, n], and which first [B, 1, n, n]."""
    order = tiles.int().argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32).unsqueeze(1), order.int().unsqueeze(1)


def _dense(mask: BlockMask, rows: int, device: torch.device) -> Tensor:
    """The additive mask [B, 1, T, T] of a block mask."""
    return additive(create_mask(mask.mask_mod, rows, 1, *mask.seq_lengths, device))
