"""Export to GGUF, llama.cpp's one-file format: weights, sizes, tokenizer and chat template.

llama.cpp computes a fixed list of graphs; an architecture file says by `GGUF` which one is its family's. What the graph
doesn't compute (another norm, a sliding window, …) is refused here, never dropped.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from nestling.core import registry
from nestling.core.errors import UserError
from nestling.core.storage import disk_error
from nestling.interop.gguf_tokenizer import write_tokenizer
from nestling.model.checkpoint import Checkpoint
from nestling.model.config import DecoderConfig
from nestling.model.hub import FOLDER
from nestling.model.rope import DynamicScaling, Llama3Scaling, YarnScaling, plain_frequencies, yarn_amplitude

Precision = Literal["f32", "f16", "bf16", "q8_0"]
_OUTER = {"embedding": "token_embd", "positions.table": "position_embd", "norm": "output_norm", "head": "output"}
_PARTS = {
    "attention_norm": "attn_norm",
    "attention.query": "attn_q",
    "attention.key": "attn_k",
    "attention.value": "attn_v",
    "attention.output": "attn_output",
    "attention.query_norm": "attn_q_norm",
    "attention.key_norm": "attn_k_norm",
    "feed_forward_norm": "ffn_norm",
    "feed_forward.gate": "ffn_gate",
    "feed_forward.up": "ffn_up",
    "feed_forward.down": "ffn_down",
    "feed_forward.router": "ffn_gate_inp",
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")
_EXACT = ("ffn_gate_inp", "position_embd", "rope_freqs")  # kept in float32: small, or read by rows


@dataclass(frozen=True)
class Graph:
    """What one of llama.cpp's graphs computes."""

    norm: str = "rms"
    positions: str = "rope"
    activation: str = "silu"
    gated: bool = True
    biases: tuple[bool, ...] = (False,)
    """Values of (attention output and feed-forward) bias that it takes."""
    qkv_biases: tuple[bool, ...] = (False,)
    qk_norm: bool = False
    experts: bool = False
    interleaved: bool = False
    """Rotated pairs are neighbours (x[2i], x[2i + 1]) instead of halves."""
    reads_frequencies: bool = False
    """Takes a factor per pair of RoPE, by which Llama 3's stretching is said."""


GRAPHS = {
    "llama": Graph(biases=(False, True), qkv_biases=(False, True), interleaved=True, reads_frequencies=True),
    "qwen2": Graph(qkv_biases=(False, True)),
    "qwen3": Graph(qk_norm=True),
    "qwen3moe": Graph(qk_norm=True, experts=True),
    "gpt2": Graph("layer", "learned", "gelu_tanh", gated=False, biases=(True,), qkv_biases=(True,)),
}


def export_gguf(checkpoint: Checkpoint, path: Path, precision: Precision = "f16", name: str = "nestling") -> None:
    """Write a model with its tokenizer and chat template as one GGUF file; it appears whole or not at all.

    Args:
        precision: of the matrices; norms and biases stay float32. q8_0 (8 bits and a scale per 32 weights) needs rows
            of a multiple of 32; other matrices are then f16.
        name: what llama.cpp shows as the model's name.

    Raises:
        UserError: llama.cpp has no graph for this model or no splitting for its tokenizer, the `gguf` package is
            missing, or the disk is full.
    """
    if precision not in get_args(Precision):
        raise UserError("unknown precision", where="--type", value=precision, fix=f"use {', '.join(get_args(Precision))}")
    library = _library()
    config = checkpoint.model.config
    graph = graph_name(config)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = library.GGUFWriter(temporary, graph)
        writer.add_name(name)
        writer.add_file_type(getattr(library.LlamaFileType, f"{'ALL' if precision == 'f32' else 'MOSTLY'}_{precision.upper()}"))
        _write_sizes(writer, config, library)
        write_tokenizer(writer, checkpoint.tokenizer, config.vocab_size)
        for tensor_name, value in _tensors(checkpoint.model.state_dict(), config, GRAPHS[graph]):
            _add(writer, library, tensor_name, value, precision)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(temporary, path)
    except OSError as error:
        raise disk_error(error, path) from None
    finally:
        temporary.unlink(missing_ok=True)


def graph_name(config: DecoderConfig) -> str:
    """The graph of llama.cpp that computes this model.

    Raises:
        UserError: none does; names the part that it lacks.
    """
    name: str = getattr(registry.find(FOLDER, config.architecture), "GGUF", "")
    if not name:
        _refuse(f"the architecture {config.architecture}")
    graph, wrong = GRAPHS[name], []
    for part in ("norm", "positions", "activation", "gated", "qk_norm"):
        if getattr(config, part) != getattr(graph, part):
            wrong.append(f"{part} {getattr(config, part)}")
    wrong += [] if config.bias in graph.biases else [f"bias {config.bias}"]
    wrong += [] if config.qkv_bias in graph.qkv_biases else [f"qkv_bias {config.qkv_bias}"]
    wrong += [] if config.block == "pre" else ["norms after the sums"]
    wrong += _wrong_past(config, graph) + _wrong_experts(config, graph)
    if wrong:
        _refuse(f"{', '.join(wrong)} in the graph {name}")
    return name


def _wrong_past(config: DecoderConfig, graph: Graph) -> list[str]:
    """What of window and stretched RoPE the graph lacks."""
    scaling, wrong = config.rope_scaling, []
    if config.window is not None and config.window < config.context:
        wrong.append(f"a window of {config.window} in a context of {config.context}")
    if isinstance(scaling, DynamicScaling):
        wrong.append("dynamic RoPE scaling")
    if isinstance(scaling, Llama3Scaling) and not graph.reads_frequencies:
        wrong.append("Llama 3's RoPE scaling")
    if isinstance(scaling, YarnScaling) and not scaling.truncate:
        wrong.append("YaRN without truncation")
    return wrong


def _wrong_experts(config: DecoderConfig, graph: Graph) -> list[str]:
    experts = config.experts
    if (experts is not None) != graph.experts:
        return ["a feed-forward of experts" if experts else "a feed-forward without experts"]
    if experts is None:
        return []
    wrong = ["dense layers among those with experts"] if experts.dense_layers else []
    return wrong + ([] if experts.normalised else ["expert weights that don't sum to one"])


def _refuse(what: str) -> None:
    raise UserError(f"llama.cpp can't compute {what}", where="gguf", fix="serve this model with nestling, or with vLLM")


def _library() -> Any:
    try:
        import gguf
    except ModuleNotFoundError:
        fix = "pip install 'nestling[gguf]'"
        raise UserError("the package gguf is not installed", where="gguf", fix=fix) from None
    return gguf


def _write_sizes(writer: Any, config: DecoderConfig, library: Any) -> None:
    """The hyperparameters, under the graph's prefix."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.ff)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head)
    writer.add_value_length(config.head)
    (writer.add_layer_norm_eps if config.norm == "layer" else writer.add_layer_norm_rms_eps)(config.norm_eps)
    if (experts := config.experts) is not None:
        writer.add_expert_count(experts.count)
        writer.add_expert_used_count(experts.per_token)
        writer.add_expert_feed_forward_length(experts.d_ff)
    if config.positions == "rope":
        writer.add_rope_dimension_count(config.head)
        writer.add_rope_freq_base(config.rope_theta)
        _write_scaling(writer, config, library)


def _write_scaling(writer: Any, config: DecoderConfig, library: Any) -> None:
    """How RoPE is stretched; Llama 3's way is a tensor instead."""
    scaling = config.rope_scaling
    if scaling is None or isinstance(scaling, Llama3Scaling):
        return
    writer.add_rope_scaling_type(library.RopeScalingType(scaling.kind))
    writer.add_rope_scaling_factor(scaling.factor)
    if isinstance(scaling, YarnScaling):
        writer.add_rope_scaling_orig_ctx_len(scaling.original_context)
        writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(scaling.beta_slow)
        # llama.cpp multiplies this with the paper's amplitude.
        writer.add_rope_scaling_attn_factors(scaling.amplitude / yarn_amplitude(scaling.factor))


def _tensors(state: Mapping[str, Tensor], config: DecoderConfig, graph: Graph) -> Iterator[tuple[str, Tensor]]:
    """(llama.cpp's name, tensor) of every weight."""
    turn: Callable[[Tensor], Tensor] = _interleave if graph.interleaved else _same
    for name, value in state.items():
        match = _BLOCK.fullmatch(name)
        if match is None:
            part, _, kind = name.rpartition(".")
            yield f"{_OUTER[part]}.{kind}", value
        elif match[2] in ("attention.query", "attention.key"):
            if config.norm == "rms":
                turned = turn(value.unflatten(0, (-1, config.head))).flatten(0, 1)
                yield f"blk.{match[1]}.{_PARTS[match[2]]}.{match[3]}", turned
        elif match[2] != "attention.value" or config.norm == "rms":
            stacked = "_exps" if value.ndim == 3 else ""
            yield f"blk.{match[1]}.{_PARTS[match[2]]}{stacked}.{match[3]}", value
    if config.norm == "layer":
        yield from _fused(state, config)
    if isinstance(config.rope_scaling, Llama3Scaling):
        stretched = config.rope_scaling.frequencies(config.rope_theta, config.head)
        yield "rope_freqs.weight", plain_frequencies(config.rope_theta, config.head) / stretched


def _fused(state: Mapping[str, Tensor], config: DecoderConfig) -> Iterator[tuple[str, Tensor]]:
    """Query, key and value in one, as GPT-2's graph reads them."""
    for layer in range(config.n_layers):
        for kind in ("weight", "bias"):
            parts = [state[f"blocks.{layer}.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            yield f"blk.{layer}.attn_qkv.{kind}", torch.cat(parts)


def _interleave(heads: Tensor) -> Tensor:
    """[H, K, ..]: the order of features from two halves to neighbouring pairs."""
    return heads.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def _same(heads: Tensor) -> Tensor:
    return heads


def _add(writer: Any, library: Any, name: str, value: Tensor, precision: Precision) -> None:
    """One tensor, rounded where it is a matrix."""
    data: np.ndarray = value.detach().float().cpu().contiguous().numpy()
    kinds = library.GGMLQuantizationType
    if data.ndim == 1 or name.startswith(_EXACT) or any(f".{part}." in name for part in _EXACT):
        kind = kinds.F32
    elif precision == "q8_0" and data.shape[-1] % library.GGML_QUANT_SIZES[kinds.Q8_0][0]:
        kind = kinds.F16
    else:
        kind = kinds[precision.upper()]
    writer.add_tensor(name, library.quants.quantize(data, kind), raw_dtype=kind)
