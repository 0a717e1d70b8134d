"""llama2.c's checkpoints: what its training saves (ckpt.pt), and the binary forms that its C programs read.

    version 0   7 int32: dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size (negative: the output layer is not
                tied), max_seq_len; then float32 tensors, each kind for all layers, with tables of RoPE's angles
    version 1   a head of 256 bytes: "ak42", version, the 7 int32, 1 byte whether tied; then float32 tensors, norms first
    version 2   as 1 with the group size (int32) in the head; each matrix as int8 and a float32 scale per group (Q8_0)

Meta's Llama turns neighbouring pairs of features, the Hugging Face form turns a feature with the one half a head away;
rows of the query and key matrices are reordered for it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nestling.core.errors import UserError

MAGIC, HEAD_BYTES, VERSIONS = 0x616B3432, 256, (0, 1, 2)
EPS, THETA = 1e-5, 10_000.0
"""What the programs compute with; the files don't say."""
SIZES = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
_OUTER = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_PARTS = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_TABLES = ("freqs_cos", "freqs_sin")
Llama = tuple[dict[str, Any], dict[str, Tensor]]
"""config.json and tensors in the form of transformers' Llama."""


def read_state(state: Mapping[str, Tensor], args: Mapping[str, Any], where: Path) -> Llama:
    """What its training saves: tensors by name, and `model_args`.

    Raises:
        UserError: sizes are missing.
    """
    try:
        sizes = {name: int(args[name]) for name in ("dim", "n_layers", "n_heads", "vocab_size", "max_seq_len")}
        sizes["hidden_dim"] = len(state["layers.0.feed_forward.w1.weight"])
    except KeyError as error:
        raise UserError(
            f"{error} is missing in this llama2.c checkpoint", where=where, fix="import its ckpt.pt"
        ) from None
    sizes["n_kv_heads"] = int(args.get("n_kv_heads") or sizes["n_heads"])
    weights = {name.removesuffix(".weight"): value for name, value in state.items() if name not in _TABLES}
    return _as_llama(sizes, weights, args.get("norm_eps", EPS))


def read_binary(file: Path) -> tuple[int, Llama]:
    """The version of a .bin file, and what is in it.

    Raises:
        UserError: another kind of file, another version, or one that is cut off.
    """
    data = np.fromfile(file, np.uint8) if file.stat().st_size > HEAD_BYTES else np.zeros(HEAD_BYTES, np.uint8)
    magic, version, *numbers, tied, group = struct.unpack_from("<Ii7iBi", data[:HEAD_BYTES].tobytes())
    if magic != MAGIC:
        version, numbers = 0, list(struct.unpack_from("<7i", data[:HEAD_BYTES].tobytes()))
        tied = numbers[5] > 0
    if version not in VERSIONS:
        raise UserError(
            "this version of llama2.c's files is not known", where=file, value=version, fix="known are 0, 1, 2"
        )
    sizes = dict(zip(SIZES, map(abs, numbers), strict=True))
    if 0 in numbers or sizes["dim"] % sizes["n_heads"] or min(numbers[:5]) < 0 or sizes["n_layers"] > len(data):
        raise UserError("this is no llama2.c checkpoint", where=file, value=numbers, fix="name a .bin or .pt file")
    body = data[HEAD_BYTES:] if version else data[len(numbers) * 4 :]
    shapes = _shapes(sizes, version, bool(tied))
    found = _tensors(body, shapes, group if version == 2 else 0, file)
    if version == 0:
        _check_angles(found.pop("freqs_cos"), found.pop("freqs_sin"), file)
    return version, _as_llama(sizes, found, EPS)


def _shapes(sizes: Mapping[str, int], version: int, tied: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a file, in order."""
    dim, hidden, head = sizes["dim"], sizes["hidden_dim"], sizes["dim"] // sizes["n_heads"]
    kv = (head * sizes["n_kv_heads"], dim)
    special: dict[str, tuple[int, ...]] = {"attention.wk": kv, "attention.wv": kv, "feed_forward.w2": (dim, hidden)}
    special |= dict.fromkeys(("feed_forward.w1", "feed_forward.w3"), (hidden, dim))
    special |= dict.fromkeys(("tok_embeddings", "output"), (sizes["vocab_size"], dim))
    special |= dict.fromkeys(_TABLES, (sizes["max_seq_len"], head // 2))
    special |= dict.fromkeys(("attention_norm", "ffn_norm", "norm"), (dim,))
    matrices, norms = [name for name in _PARTS if "norm" not in name], ["attention_norm", "ffn_norm"]
    order = (
        ["tok_embeddings", *_PARTS, "norm", *_TABLES] if version == 0 else [*norms, "norm", "tok_embeddings", *matrices]
    )
    shapes: dict[str, tuple[int, ...]] = {}
    for name in order if tied else [*order, "output"]:
        places = [f"layers.{layer}.{name}" for layer in range(sizes["n_layers"])] if name in _PARTS else [name]
        shapes |= dict.fromkeys(places, special.get(name, (dim, dim)))
    return shapes


def _tensors(data: np.ndarray, shapes: Mapping[str, tuple[int, ...]], group: int, file: Path) -> dict[str, Tensor]:
    """Cut a file into tensors; matrices are int8 in groups where there is a group size.

    Raises:
        UserError: too short, too long, or scales that are none.
    """
    counts = {name: math.prod(shape) for name, shape in shapes.items()}
    packed = {name for name, shape in shapes.items() if group and len(shape) == 2}
    sizes = [counts[name] + counts[name] // group * 4 if name in packed else counts[name] * 4 for name in shapes]
    if len(data) != sum(sizes):
        what = f"{len(data):,} bytes of tensors instead of {sum(sizes):,}"
        raise UserError(what, where=file, fix="copy the file again, or name a file of llama2.c's")
    found = {}
    for name, part in zip(shapes, np.split(data, np.cumsum(sizes)[:-1]), strict=True):
        if name in packed:
            whole, scales = part[: counts[name]].view(np.int8), part[counts[name] :].view(np.float32)
            if not (np.isfinite(scales) & (scales >= 0) & (scales < 1e3)).all():
                fix = "export it again: files of an early version 2 have another order"
                raise UserError(f"the scales of {name} are no scales", where=file, fix=fix)
            part = (whole.reshape(-1, group) * scales[:, None]).astype(np.float32)
        found[name] = torch.from_numpy(part.view(np.float32).reshape(shapes[name]))
    return found


def _check_angles(cos: Tensor, sin: Tensor, file: Path) -> None:
    """The tables of a file must be the ones that we compute."""
    half = cos.shape[1]
    angles = torch.outer(torch.arange(len(cos)).double(), THETA ** (-torch.arange(half).double() / half))
    if max((cos - angles.cos()).abs().max(), (sin - angles.sin()).abs().max()) > 1e-2:
        raise UserError("RoPE with other angles than llama2.c's is not supported", where=file)


def _as_llama(sizes: Mapping[str, int], state: Mapping[str, Tensor], eps: float) -> Llama:
    """Under transformers' names and in its order of features; unknown names stay, to be complained about."""
    out = {}
    for name, value in state.items():
        part = name
        if name.startswith("layers."):
            _, layer, inner = name.split(".", 2)
            if inner in ("attention.wq", "attention.wk"):  # rows 0, 1, 2, 3, … of each head as 0, 2, …, 1, 3, …
                heads = sizes["n_heads" if inner == "attention.wq" else "n_kv_heads"]
                value = value.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
            part = f"model.layers.{layer}.{_PARTS.get(inner, inner)}"
        out[f"{_OUTER.get(part, part)}.weight"] = value
    tied = "lm_head.weight" not in out or torch.equal(out["lm_head.weight"], out["model.embed_tokens.weight"])
    if tied:
        out.pop("lm_head.weight", None)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": sizes["dim"],
        "intermediate_size": sizes["hidden_dim"],
        "num_hidden_layers": sizes["n_layers"],
        "num_attention_heads": sizes["n_heads"],
        "num_key_value_heads": sizes["n_kv_heads"],
        "vocab_size": sizes["vocab_size"],
        "max_position_embeddings": sizes["max_seq_len"],
        "rms_norm_eps": eps,
        "rope_theta": THETA,
        "tie_word_embeddings": tied,
    }
    return config, out
