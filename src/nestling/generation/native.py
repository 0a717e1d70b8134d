"""A few tokens of every text in one native call (`decode.cpp`), where a CPU, a C++ compiler and the model allow it.

A small model's step takes hundreds of torch calls of a few microseconds, which cost more than its arithmetic. The source is
compiled once per machine (about two seconds) with the machine's own instructions and kept in the user's cache folder.
Where something is missing, `build` returns None and torch goes on computing; both give the same text.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from ctypes import Structure, byref, c_double, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from nestling.model.attention import Attention
from nestling.model.block import PreNormBlock
from nestling.model.cache import KVCache
from nestling.model.decoder import Decoder
from nestling.model.feed_forward import FeedForward, GatedFeedForward
from nestling.model.norms import LayerNorm, RMSNorm
from nestling.model.positions import RotaryPositions

SOURCE = "decode.cpp"
# Not -ffast-math: linked with it, a library turns off subnormal numbers for the whole process when it is loaded.
OPTIONS = (
    "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math",
    "-freciprocal-math", "-fopenmp", "-shared", "-fPIC",
)  # fmt: skip
COMPILERS = ("g++", "clang++", "c++")
LANES = 16
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
PAIRS = 3
"""The kind of bfloat16 on a machine that multiplies pairs of them."""
AT_ONCE = 256
"""Tokens per call: a longer prompt goes in parts, whose activations stay in the cores' caches."""
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu_squared": 3}


class _Linear(Structure):
    _fields_ = [
        ("weight", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
        ("outputs", c_int64),
        ("inputs", c_int64),
    ]


class _Norm(Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("eps", c_double)]


class _Layer(Structure):
    _fields_ = [
        *((name, _Norm) for name in ("attention_norm", "feed_forward_norm", "query_norm", "key_norm")),
        *((name, _Linear) for name in ("joint", "output", "gate", "up", "down")),
    ]


_SIZES = ("n_layers", "d_model", "heads", "kv_heads", "head", "ff", "kind", "activation", "threads")


class _Model(Structure):
    _fields_ = [("layers", c_void_p), ("norm", _Norm), *((name, c_int64) for name in _SIZES)]


class _Cache(Structure):
    _fields_ = [
        ("stored", c_void_p),
        *((name, c_int64) for name in ("layer", "value", "row", "head", "half", "capacity")),
    ]


class _Tokens(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("count", "several", "tables")),
        *((name, c_void_p) for name in ("rows", "places", "cos", "sin")),
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
        self._library, self._dtype, self._source = library, dtype, model
        even = config.d_model % 2 == config.ff % 2 == 0
        self._kind = PAIRS if dtype == torch.bfloat16 and even and library.pairs() else KINDS[dtype]
        self._kept: list[object] = []  # what the pointers below point to
        layers = (_Layer * config.n_layers)(*(self._layer(block) for block in model.blocks))
        self._kept.append(layers)
        width = (config.n_heads + 2 * config.kv_heads) * config.head
        self._space = width + config.n_heads * config.head + 2 * (config.ff + LANES)
        sizes = (
            config.n_layers, config.d_model, config.n_heads, config.kv_heads, config.head, config.ff,
            self._kind, ACTIVATIONS[config.activation], torch.get_num_threads(),
        )  # fmt: skip
        self._model = _Model(ctypes.addressof(layers), self._norm(model.norm), *sizes)
        self._output = self._linear(model.output_weight, None)

    def hidden(self, ids: Tensor, rows: Tensor, counts: Tensor | None, cache: KVCache) -> Tensor:
        """The next tokens of N rows of a cache: outputs [N, T, D]; those at padding are zero.

        Keys and values are stored behind those that the rows have; the cache's lengths are left to the caller. Angles that
        follow from a text's length are those of each token's own place, as if the tokens came one by one.

        Args:
            ids: [N, T], right-padded.
            rows: [N] of the cache, all different.
            counts: [N] valid tokens of each row; all of them when not given.
        """
        n, t = ids.shape
        places = cache.lengths[rows]
        if t == 1:
            return self._walk(ids.view(n), rows, places, cache).view(n, 1, -1)
        every = torch.arange(t).expand(n, t)
        valid = torch.ones_like(every, dtype=torch.bool) if counts is None else every < counts.unsqueeze(1)
        outputs = torch.zeros(n, t, self._source.config.d_model)
        rows, places = rows.unsqueeze(1).expand(n, t)[valid], (places.unsqueeze(1) + every)[valid]
        parts = zip(ids[valid].split(AT_ONCE), rows.split(AT_ONCE), places.split(AT_ONCE), strict=True)
        outputs[valid] = torch.cat([self._walk(*part, cache, several=True) for part in parts])
        return outputs

    def _walk(self, ids: Tensor, rows: Tensor, places: Tensor, cache: KVCache, several: bool = False) -> Tensor:
        """Tokens, M ids in the order of their texts, at these rows and places [M] of the cache: outputs [M, D].

        Args:
            several: a text may have more than one.
        """
        model, count = self._source, len(places)
        x = model.embedding(ids).float()
        if not isinstance(model.positions, RotaryPositions) and (placed := model.positions.embed(places)) is not None:
            x = x + placed
        space = torch.empty(count * self._space)
        layer, value, row, head, _, _ = cache.stored.stride()
        half, capacity = int(cache.stored.dtype == torch.bfloat16), cache.stored.shape[4]
        held = _Cache(cache.stored.data_ptr(), layer, value, row, head, half, capacity)
        tables, cos, sin = self._angles(places)
        tokens = _Tokens(count, int(several), tables, rows.data_ptr(), places.data_ptr(), _pointer(cos), _pointer(sin))
        self._model.threads = torch.get_num_threads()
        pointers = c_void_p(x.data_ptr()), c_void_p(space.data_ptr())
        if self._library.decode(byref(self._model), byref(held), byref(tokens), *pointers):
            raise ValueError("a row of the cache is full")
        return x

    def _angles(self, places: Tensor) -> tuple[int, Tensor | None, Tensor | None]:
        """(1, cos, sin) of every place, where the model keeps them, or (0, cos, sin) of these."""
        positions = self._source.positions
        if isinstance(positions, RotaryPositions):
            return 1, positions.cos, positions.sin
        rotation = positions.rotation(places.unsqueeze(1), places + 1)
        if rotation is None:
            return 0, None, None
        cos, sin = (part.expand(len(places), 1, 1, -1).contiguous() for part in rotation)
        return 0, cos, sin

    def unembed(self, hidden: Tensor) -> Tensor:
        """[N, D] -> logits [N, V] float32."""
        hidden = hidden.contiguous()
        logits = torch.empty(len(hidden), self._output.outputs)
        self._library.project(
            byref(self._output), c_int64(self._kind), c_int64(torch.get_num_threads()), c_int64(len(hidden)),
            c_void_p(hidden.data_ptr()), c_void_p(logits.data_ptr()),
        )  # fmt: skip
        return logits

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


@cache
def _library() -> ctypes.CDLL | None:
    """decode.cpp compiled for this machine; None when there is no compiler or it fails."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        return None
    source = Path(__file__).with_name(SOURCE)
    try:
        macros = subprocess.run(
            [compiler, "-march=native", "-E", "-dM", "-x", "c++", os.devnull], capture_output=True, check=True
        ).stdout  # name the compiler's version and the machine's instructions
        key = hashlib.sha256(macros + source.read_bytes() + repr(OPTIONS).encode()).hexdigest()[:16]
        path = Path.home() / ".cache" / "nestling" / f"decode-{key}.so"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            subprocess.run([compiler, *OPTIONS, str(source), "-o", str(temporary)], capture_output=True, check=True)
            temporary.replace(path)
        return ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.CalledProcessError):
        return None


def _heads(values: Tensor, order: Tensor) -> Tensor:
    """The outputs of each head in this order."""
    return values.unflatten(0, (-1, len(order)))[:, order].flatten(0, 1)


def _padded(values: Tensor) -> Tensor:
    """Zeros behind the last output, up to a whole panel."""
    missing = -len(values) % LANES
    return torch.cat([values, values.new_zeros(missing, *values.shape[1:])]) if missing else values


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
