"""The decoder as serving wants it: the same mathematics with its weights laid out for few tokens at a time.

A packed decoder is a `Decoder` whose parts were exchanged for faster ones: projections with weights in the layout that
the matrix library prefers (queries, keys and values in one), norms and rotations in fewer calls. What is not known here
stays as it is, so a new family works and is only slower. It is a copy: weights changed later do not reach it.
Where it can, a step of few tokens leaves torch altogether (`native.py`); `benchmarks/generation.py` measures both.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.core.errors import UserError
from nestling.generation import native
from nestling.model.adapters import merged
from nestling.model.attention import Attention, Scene, fused
from nestling.model.cache import KVCache, LayerMemory
from nestling.model.decoder import Decoder
from nestling.model.norms import RMSNorm

NATIVE_TOKENS = 128
"""Up to so many tokens of a text (with matrix units: of all) go the native way; for more, the matrix library pays."""
INT8_INPUTS = 16
"""torch's int8 kernel reads inputs by so many at a time, and behind the end where they are not a multiple."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
Projection = Callable[[Tensor, Tensor | None], nn.Module]
"""(weight [out, in], bias [out] or None) -> a module that maps [.., in] to [.., out]."""


def pack(model: Decoder, dtype: torch.dtype | None = None) -> PackedDecoder:
    """A copy of `model` for decoding, adapters added to its weights.

    Args:
        dtype: of the weights of all projections; theirs when not given. bfloat16 reads half of the memory, int8 (with a
            scale per output, computed with bfloat16 activations) a quarter; both round. Keys and values, norms and the
            residual stream stay float32 on a CPU.

    Raises:
        UserError: a dtype that there is no packed form for, or int8 where there is no kernel for it.
    """
    model = merged(model)
    project = _projection(dtype or model.output_weight.dtype, model.output_weight.device)
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    packed = copy.deepcopy(model, shared).eval()
    output = project(packed.output_weight, None)
    with torch.no_grad():
        for module in list(packed.modules()):
            for name, part in list(module.named_children()):
                if type(part) in _PACKED:
                    setattr(module, name, _PACKED[type(part)](part, project))
    packed.__class__ = PackedDecoder
    assert isinstance(packed, PackedDecoder)
    packed.output, packed.native = output, native.build(model, dtype or model.output_weight.dtype)
    packed.matrix_units = bool(torch.cpu.get_capabilities().get("amx_bf16"))
    return packed


class PackedDecoder(Decoder):
    """A decoder with a packed output layer, and a native call for steps and short prompts where there is one."""

    output: nn.Module
    native: native.Native | None
    matrix_units: bool

    def hidden(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: KVCache | None = None,
        rows: Tensor | slice | None = None,
        counts: Tensor | None = None,
    ) -> Tensor:
        """As `Decoder.hidden`. A few tokens of each text, for rows of a cache, go the native way."""
        few = (ids.numel() if self.matrix_units else ids.shape[1]) <= NATIVE_TOKENS
        ragged = not isinstance(rows, slice) and ids.shape[1] > 1 and self.positions.reads_lengths  # `Native.hidden`
        if self.native is None or cache is None or not few or ragged or positions is not None or segments is not None:
            return super().hidden(ids, positions=positions, segments=segments, cache=cache, rows=rows, counts=counts)
        return self.native.hidden(ids, slice(None) if rows is None else rows, counts, cache)

    def unembed(self, hidden: Tensor) -> Tensor:
        """[.., D] -> logits [.., V]"""
        if self.native is None or hidden.numel() > NATIVE_TOKENS * hidden.shape[-1]:
            return self.output(hidden)
        return self.native.unembed(hidden)


class Int8Linear(nn.Module):
    """x Wᵀ + b with W rounded to 8 bits and one scale per output: the largest weight of a row becomes ±127."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        scale = weight.detach().float().abs().amax(1).clamp_min(1e-12) / 127
        self.weight = (weight.detach() / scale.unsqueeze(1)).round().to(torch.int8).contiguous()
        self.scale = scale.to(torch.bfloat16)
        self.bias = None if bias is None else bias.detach().to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        """[.., in] -> [.., out] bfloat16"""
        flat = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        y = torch._weight_int8pack_mm(flat, self.weight, self.scale)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)


class BlockedLinear(nn.Module):
    """x Wᵀ + b with W in the blocked layout of oneDNN, which a CPU multiplies 1.5 to 3 times as fast as rows of memory.

    oneDNN compiles a kernel for each number of rows and keeps about 0.5 MB for it; so only few numbers of rows occur.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.dtype = weight.dtype
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self.bias = None if bias is None else bias.detach().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """[.., in] -> [.., out]"""
        flat = x.reshape(-1, x.shape[-1]).to(self.dtype)
        more = round_rows(len(flat)) - len(flat)
        even = F.pad(flat, (0, 0, 0, more)) if more else flat  # a pad of nothing copies too
        y = torch.ops.mkldnn._linear_pointwise(even, self.weight, self.bias, "none", [], "")
        return y[: len(flat)].view(*x.shape[:-1], y.shape[-1])


def round_rows(rows: int) -> int:
    """`rows` rounded up to one of 8 numbers per power of two: 80 kernels up to 4,096 rows, 4 % more rows on average.

    >>> [round_rows(n) for n in (1, 16, 17, 300, 4095)]
    [1, 16, 18, 320, 4096]
    """
    step = 1 << max((rows - 1).bit_length() - 4, 0)
    return -(-rows // step) * step


class PlainLinear(nn.Module):
    """x Wᵀ + b in the dtype of W, where no better layout is known."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """[.., in] -> [.., out]"""
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class PackedNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight in four calls: sqrt(|x|² + eps · D) is a hypotenuse."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        size = norm.weight.numel()
        self.weight = norm.weight.detach().float() * math.sqrt(size)
        self.floor = torch.tensor(math.sqrt(norm.eps * size), device=self.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """[.., size] -> the same shape, float32."""
        x = x.float()
        return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(self.floor) * self.weight


class PackedAttention(nn.Module):
    """Attention with one projection for queries, keys and values, which are normed and turned together.

    Pairs that are turned lie side by side (rows of the weights are permuted for it), so a turn is one multiplication of
    complex numbers. Keys in the cache are permuted like the queries, which no score sees.
    """

    def __init__(self, plain: Attention, project: Projection) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head = plain.heads, plain.kv_heads, plain.head
        order = torch.arange(self.head, device=plain.query.weight.device).view(2, -1).T.flatten()
        parts = [_permuted(plain.query, order), _permuted(plain.key, order), (plain.value.weight, plain.value.bias)]
        biases = [bias for _, bias in parts if bias is not None]
        self.joint = project(torch.cat([weight for weight, _ in parts]), torch.cat(biases) if biases else None)
        self.output = project(plain.output.weight, plain.output.bias)
        self.norm = _joint_norm(plain, order)

    def forward(self, x: Tensor, scene: Scene, memory: LayerMemory | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]. With `memory` the tokens are appended to it and see all of it."""
        b, t, _ = x.shape
        joint = self.joint(x).float().view(b, t, -1, self.head)
        turned, v = joint.split([self.heads + self.kv_heads, self.kv_heads], 2)
        turned = turned if self.norm is None else self.norm(turned)
        if scene.rotation is not None:
            pairs = torch.view_as_complex(turned.reshape(*turned.shape[:-1], -1, 2))
            turned = torch.view_as_real(pairs * torch.complex(*scene.rotation)).flatten(-2)
        q, k = turned.split([self.heads, self.kv_heads], 2)
        k, v = (k.transpose(1, 2), v.transpose(1, 2)) if memory is None else memory.extend(k, v)
        if k.device.type == "cpu":
            k, v = k.float(), v.float()  # there attention in bfloat16 takes five times as long
        mask = scene.mask if isinstance(scene.mask, Tensor) else None  # block masks are for training alone
        mixed = fused(q.transpose(1, 2).to(k.dtype), k, v, mask)
        return self.output(mixed.transpose(1, 2).reshape(b, t, -1))


def _permuted(linear: nn.Linear, order: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a projection with the outputs of each head in this order."""
    weight = linear.weight.unflatten(0, (-1, len(order)))[:, order].flatten(0, 1)
    return weight, None if linear.bias is None else linear.bias.view(-1, len(order))[:, order].flatten()


def _joint_norm(plain: Attention, order: Tensor) -> PackedNorm | None:
    """The norms of queries and keys as one, with a weight [H + H_kv, K]."""
    if not isinstance(plain.query_norm, RMSNorm) or not isinstance(plain.key_norm, RMSNorm):
        return None
    norm = PackedNorm(plain.query_norm)
    key = PackedNorm(plain.key_norm)
    norm.weight = torch.cat([norm.weight[order].expand(plain.heads, -1), key.weight[order].expand(plain.kv_heads, -1)])
    return norm


def _pack_linear(linear: nn.Linear, project: Projection) -> nn.Module:
    return project(linear.weight, linear.bias)


def _pack_norm(norm: RMSNorm, project: Projection) -> nn.Module:
    return PackedNorm(norm)


_PACKED: dict[type[nn.Module], Callable[..., nn.Module]] = {
    Attention: PackedAttention,
    RMSNorm: _pack_norm,
    nn.Linear: _pack_linear,
}


def _projection(dtype: torch.dtype, device: torch.device) -> Projection:
    """How weights are laid out for this dtype on this device."""
    if dtype not in DTYPES:
        raise UserError(
            "weights can't be packed in this dtype", value=dtype, fix="use float32, bfloat16, float16 or int8"
        )
    if dtype == torch.int8 and device.type != "cpu":
        raise UserError("int8 weights need a CPU", value=device, fix="use bfloat16 on this device")
    blocked = device.type == "cpu" and torch.backends.mkldnn.is_available() and dtype != torch.float16
    kind = BlockedLinear if blocked else PlainLinear
    wide = torch.bfloat16 if dtype == torch.int8 else dtype

    def project(weight: Tensor, bias: Tensor | None) -> nn.Module:
        if dtype == torch.int8 and weight.shape[1] % INT8_INPUTS == 0:
            return Int8Linear(weight, bias)
        return kind(weight.to(wide), None if bias is None else bias.to(wide))

    return project
