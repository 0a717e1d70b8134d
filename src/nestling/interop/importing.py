"""Checkpoints of other programs, read into ours: GPT-2's naming, nanoGPT, and llama2.c (its binary forms: `llama2c.py`).

Every form is brought to the names of a family of architectures/ and goes through the same strict check as a Hugging Face
folder: no tensor missing, none left over, every shape as the configuration says. A file of torch's is read without
executing anything in it (`weights_only`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestling.core import registry
from nestling.core.errors import UserError
from nestling.core.storage import read_json
from nestling.interop import llama2c
from nestling.interop.foreign_tokenizer import find_tokenizer
from nestling.model import hub
from nestling.model.checkpoint import Checkpoint
from nestling.model.decoder import Decoder

USUAL = ("ckpt.pt", "pytorch_model.bin.index.json", "pytorch_model.bin", "model.bin", "model.pt")
"""Names of files by which a folder is recognised, the surest first."""
COMPILED = "_orig_mod."
GPT2_HEAD = 64  # the size of a head in every GPT-2 that was published
TURNED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
MASKS = (".attn.bias", ".attn.masked_bias")


@dataclass(frozen=True)
class Source:
    """What was found: the family's config.json, the tensors under the family's names, and words about it."""

    kind: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    remarks: tuple[str, ...] = ()


def import_checkpoint(path: Path, tokenizer: Path | None = None, activation: str = "") -> tuple[Checkpoint, Source]:
    """Read a checkpoint of another program.

    Args:
        path: its file, or the folder that holds it.
        tokenizer: file or folder of its tokenizer, where that does not lie beside it.
        activation: of a nanoGPT, which doesn't say: gelu, or gelu_new for checkpoints of its first months.

    Raises:
        UserError: an unknown or refused file, tensors that don't fit, or no tokenizer.
    """
    file = _file(path)
    source = _read(file, activation)
    model = assemble(source, file)
    found = find_tokenizer(tokenizer or file.parent)
    if found.vocab_size > model.config.vocab_size:
        what = f"this tokenizer has {found.vocab_size} ids and the model {model.config.vocab_size}"
        raise UserError(what, where=tokenizer or file.parent, fix="name the model's own tokenizer with --tokenizer")
    return Checkpoint(model, found, provenance={"imported": source.kind, "source": str(file)}), source


def assemble(source: Source, where: Path) -> Decoder:
    """The decoder of a source, strictly checked."""
    config, _ = hub.from_hub(source.config, str(where))
    with torch.device("meta"):
        expected = registry.find(hub.FOLDER, config.architecture).build(config).state_dict()
    state = hub.import_weights(source.tensors, hub.export_weights(expected, config), config, str(where))
    model: Decoder = registry.find(hub.FOLDER, config.architecture).build(config)
    model.load_state_dict({name: value.float().clone() for name, value in state.items()}, strict=True)
    return model.eval()


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError("no such file or folder", where=path)
    known = [path / name for name in USUAL if (path / name).is_file()]
    others = [
        file for pattern in ("*.pt", "*.pth", "*.bin") for file in path.glob(pattern) if file.name != "tokenizer.bin"
    ]
    if known or len(others) == 1:
        return (known or others)[0]
    if (path / "config.json").exists() and any(path.glob("*.safetensors")):
        raise UserError("this is a Hugging Face folder already", where=path, fix="every command takes it as it is")
    if any(path.glob("*.ckpt.data-*")):
        fix = "convert it with transformers (transformers.models.gpt2.convert_gpt2_original_tf_checkpoint_to_pytorch)"
        raise UserError("TensorFlow checkpoints are not read", where=path, fix=fix)
    what = "several checkpoints are here" if others else "no checkpoint is here"
    raise UserError(what, where=path, fix=f"name the file; known are {', '.join(USUAL)}, .pt and .bin")


def _read(file: Path, activation: str) -> Source:
    if file.suffix == ".json":
        parts = sorted(set(read_json(file)["weight_map"].values()))
        return _hugging_face(file, {name: t for part in parts for name, t in _loaded(file.with_name(part)).items()})
    with file.open("rb") as stream:
        start = stream.read(4)
    if not start.startswith((b"PK", b"\x80")):  # neither torch's archive nor its older form
        version, (config, tensors) = llama2c.read_binary(file)
        remarks = ("its 8-bit matrices are written as float32",) if version == 2 else ()
        return Source(f"llama2.c file, version {version}", config, tensors, remarks)
    saved = _loaded(file)
    state = saved.get("model", saved)
    state = {name.removeprefix(COMPILED): value for name, value in state.items()}
    if "tok_embeddings.weight" in state:
        return Source("llama2.c checkpoint", *llama2c.read_state(state, saved.get("model_args") or {}, file))
    if "model_args" in saved:
        return _nanogpt(state, saved["model_args"], activation, file)
    return _hugging_face(file, state)


def _loaded(file: Path) -> dict[str, Any]:
    """The content of a file of torch's: tensors and plain values, nothing that would have to be executed."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except torch.serialization.pickle.UnpicklingError as error:
        reason = re.search(r"GLOBAL ([\w.]+)|type ([\w.]+)", str(error))
        what = (
            f"holds more than tensors and plain values ({reason[1] or reason[2]})" if reason else "can't be read safely"
        )
        fix = "save the model's state_dict() alone with torch.save, and import that file"
        raise UserError(what, where=file, fix=fix) from None
    except (OSError, EOFError, RuntimeError) as error:
        raise UserError(f"damaged: {str(error).splitlines()[0]}", where=file, fix="copy the file again") from None
    if not isinstance(found, dict):
        fix = "save the model's state_dict() with torch.save"
        raise UserError("holds no tensors by name", where=file, value=type(found).__name__, fix=fix)
    return found


def _hugging_face(file: Path, state: Mapping[str, Tensor]) -> Source:
    """Tensors under the names of transformers, with config.json beside them; GPT-2's also without."""
    if (file.parent / "config.json").exists():
        config = read_json(file.parent / "config.json")
        return Source(f"{config.get('model_type')} checkpoint of transformers", config, dict(state))
    state = {name.removeprefix("transformer."): value for name, value in state.items()}
    if "wte.weight" not in state:
        known = "GPT-2, nanoGPT and llama2.c"
        raise UserError("unknown names of tensors", where=file, value=next(iter(state), None), fix=f"known are {known}")
    (vocab, width), context = state["wte.weight"].shape, len(state["wpe.weight"])
    if width % GPT2_HEAD:
        fix = "put the model's config.json beside it"
        raise UserError("the number of heads is not known", where=file, value=f"n_embd {width}", fix=fix)
    sizes = {"vocab_size": vocab, "n_positions": context, "n_embd": width, "n_layer": _layers(state)}
    config = {**_gpt2(sizes), "n_head": width // GPT2_HEAD, "activation_function": "gelu_new"}
    return _with_gpt2_form("GPT-2 weights", config, state, [f"{width // GPT2_HEAD} heads of {GPT2_HEAD}, as in GPT-2"])


def _nanogpt(state: Mapping[str, Tensor], args: Mapping[str, Any], activation: str, file: Path) -> Source:
    wanted = ("vocab_size", "block_size", "n_embd", "n_layer", "n_head")
    if absent := [name for name in wanted if name not in args]:
        raise UserError(f"its model_args lack {absent[0]}", where=file, fix="this is not nanoGPT's form")
    state = {name.removeprefix("transformer."): value for name, value in state.items()}
    sizes = {name: args[name] for name in ("vocab_size", "n_embd", "n_layer", "n_head")}
    chosen = activation or "gelu"
    config = {**_gpt2({**sizes, "n_positions": args["block_size"]}), "activation_function": chosen}
    config |= {f"{part}_pdrop": args.get("dropout", 0.0) for part in ("attn", "embd", "resid")}
    older = "" if activation else " (--activation gelu_new for files from before March 2023)"
    remarks = [f"activation {chosen}{older}"]
    if args.get("bias", True):
        return _with_gpt2_form("nanoGPT checkpoint", config, state, remarks)
    zeros = {
        name.removesuffix("weight") + "bias": torch.zeros(len(value))
        for name, value in state.items()
        if name.endswith(".weight") and name.startswith(("h.", "ln_f."))
    }
    remarks.append("it has no biases: they are written as zeros")
    return _with_gpt2_form("nanoGPT checkpoint", config, {**zeros, **state}, remarks)


def _gpt2(sizes: Mapping[str, int]) -> dict[str, Any]:
    fixed = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "layer_norm_epsilon": 1e-5}
    return {**fixed, **sizes, **{f"{part}_pdrop": 0.0 for part in ("attn", "embd", "resid")}}


def _with_gpt2_form(kind: str, config: dict[str, Any], state: Mapping[str, Tensor], remarks: Sequence[str]) -> Source:
    """Matrices stored [in, out], no masks, an output layer of its own only where it is one."""
    width = config["n_embd"]
    fused = state.get("h.0.attn.c_attn.weight")
    turned = fused is not None and tuple(fused.shape) == (3 * width, width)
    out = {}
    for name, value in state.items():
        if not name.endswith(MASKS):
            out[f"transformer.{name}"] = value.T if turned and name.endswith(TURNED) else value
    head = out.pop("transformer.lm_head.weight", None)
    tied = head is None or torch.equal(head, state["wte.weight"])
    if not tied and head is not None:
        out["lm_head.weight"] = head
    return Source(kind, {**config, "tie_word_embeddings": tied}, out, tuple(remarks))


def _layers(state: Mapping[str, Tensor]) -> int:
    return 1 + max((int(match[1]) for name in state if (match := re.match(r"h\.(\d+)\.", name))), default=-1)
