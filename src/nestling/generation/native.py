"""A few tokens of every text in one native call (`decode.cpp`), where a CPU, a C++ compiler and the model allow it.

A small model's step takes hundreds of torch calls of a few microseconds, which cost more than its arithmetic. The source is
compiled once per machine (about two seconds) with the machine's own instructions and kept in the user's cache folder.
Where something is missing, `build` returns None and torch goes on computing; both give the same text.
"""

from __future__ import annotations

import ctypes
from ctypes import Structure, byref, c_double, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor, nn

from nestling.core.native import compiled
from nestling.model.attention import Attention
from nestling.model.block import PreNormBlock
from nestling.model.cache import KVCache
from nestling.model.decoder import Decoder
from nestling.model.feed_forward import FeedForward, GatedFeedForward
from nestling.model.norms import LayerNorm, RMSNorm
from nestling.model.positions import Positions

SOURCE = "decode.cpp"
LANES = 16
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
PAIRS = 3
"""The kind of bfloat16 on a machine that multiplies pairs of them."""
AT_ONCE = 256
"""Tokens per call: a longer prompt goes in parts, whose activations stay in the cores' caches."""
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu_squared": 3}


class _Linear(Structure):
    _fields_ = [*((name, c_void_p) for name in ("weight", "scale", "bias")), ("outputs", c_int64), ("inputs", c_int64)]


class _Norm(Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("eps", c_double)]


class _Layer(Structure):
    _fields_ = [
        *((name, _Norm) for name in ("attention_norm", "feed_forward_norm", "query_norm", "key_norm")),
        *((name, _Linear) for name in ("joint", "output", "gate", "up", "down")),
    ]


_SIZES = (
    "half", "vocabulary", "n_layers", "d_model", "heads", "kv_heads", "head", "ff", "kind", "activation", "threads",
)  # fmt: skip


class _Model(Structure):
    _fields_ = [
        ("layers", c_void_p),
        ("norm", _Norm),
        *((name, c_void_p) for name in ("embedding", "placed", "cos", "sin")),
        *((name, c_int64) for name in _SIZES),
    ]


class _Cache(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("stored", "lengths")),
        *((name, c_int64) for name in ("rows", "capacity", "half")),
    ]


class _Texts(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("count", "width", "at_once", "first")),
        *((name, c_void_p) for name in ("ids", "rows", "counts")),
    ]


class Native:
    """A decoder's weights in panels, and the call that computes with them.

    Args:
        library: decode.cpp, compiled.
        model: one that `supports` accepts; its weights are copied.
        dtype: of the panels: float32, bfloat16 or int8.
    """

    def __init__(self, library: ctypes.CDLL, model: Decoder, dtype: torch.dtype) -> None:
        config = model.config
        self._library, self._dtype = library, dtype
        library.decode.argtypes = [c_void_p] * 4
        library.project.argtypes = [c_void_p, *[c_int64] * 3, *[c_void_p] * 2]
        even = config.d_model % 2 == config.ff % 2 == 0
        self._kind = PAIRS if dtype == torch.bfloat16 and even and library.pairs() else KINDS[dtype]
        self._kept: list[object] = []  # what the pointers below point to
        layers = (_Layer * config.n_layers)(*(self._layer(block) for block in model.blocks))
        self._kept.append(layers)
        embedding = model.embedding.weight.detach().contiguous()
        half = embedding.dtype == torch.bfloat16
        embedding = embedding if half else embedding.float()
        self._kept.append(embedding)  # no copy: the memory is the model's where it can be
        sizes = (
            half, config.vocab_size, config.n_layers, config.d_model, config.n_heads, config.kv_heads, config.head,
            config.ff, self._kind, ACTIVATIONS[config.activation],
        )  # fmt: skip
        tables = embedding.data_ptr(), *self._tables(model.positions, config.context)
        self._model = _Model(ctypes.addressof(layers), self._norm(model.norm), *tables, *sizes)
        self._output = self._linear(model.output_weight, None)

    def hidden(self, ids: Tensor, rows: Tensor | slice, counts: Tensor | None, cache: KVCache) -> Tensor:
        """The next tokens of N rows of a cache: outputs [N, T, D]; those at padding are zero.

        Keys and values are stored behind those that the rows have, whose lengths grow. Angles that follow from a text's
        length are those of each token's own place, as if the tokens came one by one.

        Args:
            ids: [N, T], right-padded.
            rows: [N] of the cache, all different; or consecutive ones.
            counts: [N] valid tokens of each row; all of them when not given.
        """
        ids, outputs = ids.contiguous(), torch.empty(*ids.shape, self._model.d_model)
        self._model.threads = torch.get_num_threads()
        half = cache.stored.dtype == torch.bfloat16
        held = _Cache(cache.stored.data_ptr(), cache.lengths.data_ptr(), cache.rows, cache.capacity, half)
        first, chosen = (rows.start or 0, None) if isinstance(rows, slice) else (0, rows.data_ptr())
        valid = None if counts is None else counts.data_ptr()
        texts = _Texts(*ids.shape, AT_ONCE, first, ids.data_ptr(), chosen, valid)
        if self._library.decode(byref(self._model), byref(held), byref(texts), outputs.data_ptr()):
            raise ValueError("a row of the cache is full, or a token unknown")
        return outputs

    def unembed(self, hidden: Tensor) -> Tensor:
        """[.., D] -> logits [.., V] float32."""
        hidden, width = hidden.contiguous(), self._output.outputs
        logits = torch.empty(*hidden.shape[:-1], width)
        self._library.project(
            byref(self._output), self._kind, torch.get_num_threads(), logits.numel() // width, hidden.data_ptr(),
            logits.data_ptr(),
        )  # fmt: skip
        return logits

    def _tables(self, positions: Positions, context: int) -> list[int | None]:
        """Of every place: what is added to an embedding [D], cos and sin of the angles [head / 2]; None where there is none."""
        places = torch.arange(context).unsqueeze(1)
        cos, sin = positions.rotation(places, places[:, 0] + 1) or (None, None)
        return [self._keep(None if t is None else t.float()) for t in (positions.embed(places), cos, sin)]

    def _layer(self, block: nn.Module) -> _Layer:
        assert isinstance(block, PreNormBlock)
        attention, feed_forward = block.attention, block.feed_forward
        assert isinstance(feed_forward, (FeedForward, GatedFeedForward))
        order = torch.arange(attention.head).view(2, -1).T.flatten()
        parts = [attention.query, attention.key, attention.value]
        weights = [_heads(part.weight, order) if part is not attention.value else part.weight for part in parts]
        biases = [
            _heads(part.bias, order) if part is not attention.value else part.bias
            for part in parts
            if part.bias is not None
        ]
        gate = feed_forward.gate if isinstance(feed_forward, GatedFeedForward) else None
        return _Layer(
            self._norm(block.attention_norm), self._norm(block.feed_forward_norm),
            self._norm(attention.query_norm, order), self._norm(attention.key_norm, order),
            self._linear(torch.cat(weights), torch.cat(biases) if biases else None),
            self._linear(attention.output.weight, attention.output.bias),
            self._linear(gate.weight, gate.bias) if gate is not None else _Linear(),
            self._linear(feed_forward.up.weight, feed_forward.up.bias),
            self._linear(feed_forward.down.weight, feed_forward.down.bias),
        )  # fmt: skip

    def _norm(self, norm: nn.Module, order: Tensor | None = None) -> _Norm:
        if not isinstance(norm, (RMSNorm, LayerNorm)):
            return _Norm()
        weight = norm.weight if order is None else norm.weight[order]
        return _Norm(self._keep(weight.float()), self._keep(getattr(norm, "bias", None)), norm.eps)

    def _linear(self, weight: Tensor, bias: Tensor | None) -> _Linear:
        outputs, inputs = weight.shape
        weight = weight.detach().float()
        scale = None
        if self._dtype == torch.int8:
            scale = weight.abs().amax(1).clamp_min(1e-12) / 127
            weight = (weight / scale.unsqueeze(1)).round()
        step = 2 if self._kind == PAIRS else 1
        panels = _padded(weight).view(-1, LANES, inputs // step, step).transpose(1, 2).to(self._dtype)
        bias = None if bias is None else _padded(bias.detach().float())
        scale = None if scale is None else _padded(scale)
        return _Linear(self._keep(panels), self._keep(scale), self._keep(bias), outputs, inputs)

    def _keep(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        self._kept.append(kept := tensor.detach().clone(memory_format=torch.contiguous_format))
        return kept.data_ptr()


def build(model: Decoder, dtype: torch.dtype) -> Native | None:
    """The native form of a decoder; None where it has none, or nothing here compiles it."""
    if not supports(model) or dtype not in KINDS:
        return None
    library = _library()
    return None if library is None else Native(library, model, dtype)


def supports(model: Decoder) -> bool:
    """Whether decode.cpp computes what this decoder computes."""
    config = model.config
    plain = all(
        type(block) is PreNormBlock
        and type(block.attention) is Attention
        and type(block.feed_forward) in (FeedForward, GatedFeedForward)
        for block in model.blocks
    )
    sees_all = config.positions != "alibi" and not config.window
    return model.output_weight.device.type == "cpu" and plain and sees_all


def _library() -> ctypes.CDLL | None:
    return compiled(Path(__file__).with_name(SOURCE))


def _heads(values: Tensor, order: Tensor) -> Tensor:
    """The outputs of each head in this order."""
    return values.unflatten(0, (-1, len(order)))[:, order].flatten(0, 1)


def _padded(values: Tensor) -> Tensor:
    """Zeros behind the last output, up to a whole panel."""
    missing = -len(values) % LANES
    return torch.cat([values, values.new_zeros(missing, *values.shape[1:])]) if missing else values
