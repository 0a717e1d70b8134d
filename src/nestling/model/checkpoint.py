"""One checkpoint format: the Hugging Face folder, which transformers, vLLM and llama.cpp's converter read as it is.

config.json  model.safetensors (in parts above 4 GB)  tokenizer.json  tokenizer_config.json  generation_config.json
nestling.json: where it comes from (provenance), versions, the tokenizer's hash

A model with adapters is a folder of PEFT's instead, beside the tokenizer; it names the folder of its base model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import nestling
from nestling.core.errors import UserError
from nestling.core.storage import atomic_folder, read_json, write_json
from nestling.model import adapters, hub, peft
from nestling.model.decoder import Decoder, build
from nestling.model.heads import LabelHead, Labeller, ScalarHead
from nestling.tokenizer.bpe import Tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 4 * 10**9
HEAD_WEIGHT = "score.weight"


@dataclass
class Checkpoint:
    """A model with the tokenizer it was trained with."""

    model: Decoder
    tokenizer: Tokenizer
    head: ScalarHead | None = None
    """Of a reward or value model."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Recipe, data keys, metrics, parent: what nestling.json tells; empty for a folder made elsewhere."""


@dataclass
class Classifier:
    """A model that labels texts, with the tokenizer it was trained with; its labels are `model.head.labels`."""

    model: Labeller
    tokenizer: Tokenizer
    provenance: dict[str, Any] = field(default_factory=dict)
    """As a checkpoint's; of a moderation model also its calibration and thresholds."""


def save(
    folder: str | Path,
    model: Decoder,
    tokenizer: Tokenizer,
    provenance: Mapping[str, Any] | None = None,
    head: ScalarHead | LabelHead | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the checkpoint folder; it appears whole or not at all, and replaces a checkpoint that stood there.

    Of a model with adapters only what was learnt is written; its base stays where it is.

    Raises:
        UserError: tokenizer and model of different size, a full or read-only disk, or a folder that holds other things.
    """
    folder = Path(folder)
    if tokenizer.vocab_size > model.config.vocab_size:  # published models pad theirs
        raise _mismatch(folder, tokenizer, model.config.vocab_size)
    held = (folder / "config.json").exists() or peft.is_adapter(folder)
    if folder.exists() and not held and any(folder.iterdir()):
        raise UserError("holds other things than a checkpoint", where=folder, fix="choose an empty or new folder")
    with atomic_folder(folder) as place:
        origin: dict[str, Any] = {}
        if (adapted := adapters.adaptation(model)) is not None:
            peft.write(place, model, adapted, None if head is None else head.score.weight)
            origin["base"] = peft.base_record(adapted, folder)
        else:
            _save_whole(place, model, tokenizer, head, shard_bytes)
        write_json(place / "generation_config.json", tokenizer.generation_config)
        tokenizer.save(place, context=model.config.context)
        versions = {"nestling": nestling.__version__, "torch": torch.__version__}
        origin |= {"versions": versions, "tokenizer_hash": tokenizer.hash, "parameters": model.parameter_count()}
        write_json(place / "nestling.json", {**origin, "provenance": dict(provenance or {})})


def _save_whole(
    place: Path, model: Decoder, tokenizer: Tokenizer, head: ScalarHead | LabelHead | None, shard_bytes: int
) -> None:
    _save_weights(place, _tensors(model, head), shard_bytes)
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    config = {**_hub_config(model, head), **tokenizer.roles, "dtype": dtype}
    write_json(place / "config.json", {**config, "torch_dtype": dtype})  # "torch_dtype": transformers before 5


def _hub_config(model: Decoder, head: ScalarHead | LabelHead | None) -> dict[str, Any]:
    if isinstance(head, LabelHead):
        return hub.to_hub(model.config, labels=head.labels)
    return hub.to_hub(model.config, scalar_head=head is not None)


def load(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    *,
    merge: bool = True,
) -> Checkpoint:
    """Read a checkpoint folder, Nestling's or any of a supported family, or the folder of an adapter.

    Args:
        dtype: of the weights in memory; None keeps the file's.
        merge: add an adapter to the weights of its base; otherwise it stays beside them, to be trained further.

    Raises:
        UserError: not a checkpoint, unknown model_type, tensors missing, unexpected or mis-shaped, another tokenizer,
            a classifier, or an adapter without its base.
    """
    folder = Path(folder)
    model, head = load_model(folder, device, dtype, merge=merge)
    if isinstance(head, LabelHead):
        raise UserError("this model labels texts, it writes none", where=folder, fix="name a chat model, or its run")
    tokenizer, provenance = _companions(folder, model)
    return Checkpoint(model, tokenizer, head, provenance)


def load_classifier(
    folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = torch.float32
) -> Classifier:
    """Read the checkpoint folder of a multi-label classifier; arguments and errors as in `load`.

    Raises:
        UserError: the model there is no such classifier.
    """
    folder = Path(folder)
    model, head = load_model(folder, device, dtype)
    if not isinstance(head, LabelHead):
        raise UserError("this model does not label texts", where=folder, fix="name a moderation model")
    tokenizer, provenance = _companions(folder, model)
    return Classifier(Labeller(model, head), tokenizer, provenance)


def is_classifier(folder: str | Path) -> bool:
    """Whether the checkpoint in a folder is a multi-label classifier."""
    path = Path(folder) / "config.json"
    return path.exists() and bool(hub.labels_of(read_json(path)))


def _companions(folder: Path, model: Decoder) -> tuple[Tokenizer, dict[str, Any]]:
    """(tokenizer, provenance) beside a model.

    Raises:
        UserError: the tokenizer is not the model's.
    """
    holder = folder
    while not (holder / "tokenizer.json").exists() and peft.is_adapter(holder):
        holder = peft.base_folder(holder)
    tokenizer = Tokenizer.load(holder)
    origin = read_json(folder / "nestling.json") if (folder / "nestling.json").exists() else {}
    expected = origin.get("tokenizer_hash", tokenizer.hash)
    # Published models pad their vocabulary, so only a tokenizer with more ids than the model is certainly another one.
    if tokenizer.vocab_size > model.config.vocab_size or tokenizer.hash != expected:
        raise _mismatch(folder, tokenizer, model.config.vocab_size)
    return tokenizer, dict(origin.get("provenance", {}))


def load_model(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    *,
    merge: bool = True,
) -> tuple[Decoder, ScalarHead | LabelHead | None]:
    """The model (in evaluation mode) and its head, without the tokenizer; arguments and errors as in `load`."""
    folder = Path(folder)
    if peft.is_adapter(folder):
        return _load_adapted(folder, device, dtype, merge)
    if not (folder / "config.json").exists():
        raise UserError("not a checkpoint: it has no config.json", where=folder, fix="name a run or checkpoint folder")
    described = read_json(folder / "config.json")
    config, has_head = hub.from_hub(described, str(folder / "config.json"))
    found = dict(_read_weights(folder))
    model = build(config)
    labels = hub.labels_of(described)
    head = LabelHead(config, labels) if labels else ScalarHead(config) if has_head else None
    if head is not None:
        _fill_head(head, found.pop(HEAD_WEIGHT, None), folder)
    state = hub.import_weights(found, hub.export_weights(model.state_dict(), config), config, str(folder))
    # Cloned: a view into the file is not aligned as fresh memory is, which changes the last bits of matrix products.
    fresh = {name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    model.load_state_dict(fresh, strict=True, assign=True)
    target = dtype or model.embedding.weight.dtype
    model = _trainable(model.to(device=device, dtype=target))
    return model.eval(), head if head is None else head.to(device)


def _load_adapted(
    folder: Path, device: torch.device | str, dtype: torch.dtype | None, merge: bool
) -> tuple[Decoder, ScalarHead | LabelHead | None]:
    """The base model with the adapter of a folder, added to its weights or beside them."""
    base = peft.base_folder(folder)
    model, head = load_model(base, device, dtype)
    score = peft.read(folder, base, model)
    if score is not None:
        head = ScalarHead(model.config)
        _fill_head(head, score, folder)
        head = head.to(device)
    if merge:
        adapters.merge(model).requires_grad_(True)
    return model.eval(), head


def _fill_head(head: ScalarHead | LabelHead, weight: Tensor | None, folder: Path) -> None:
    if weight is None or weight.shape != head.score.weight.shape:
        raise UserError("has no score.weight that fits", where=folder, fix="use a reward model or a classifier")
    head.score.weight.data = weight.float().clone()


def _trainable(model: Decoder) -> Decoder:
    """Assigned tensors keep what the file's had; buffers (tables of angles) stay in float32."""
    model.requires_grad_(True)
    if model.embedding.weight.dtype != torch.float32:
        fresh = build(model.config)
        for name, buffer in fresh.named_buffers():
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, buffer.to(model.embedding.weight.device))
    return model


def _tensors(model: Decoder, head: ScalarHead | LabelHead | None) -> dict[str, Tensor]:
    tensors = hub.export_weights(model.state_dict(), model.config)
    if head is not None:
        tensors[HEAD_WEIGHT] = head.score.weight
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def _save_weights(folder: Path, tensors: dict[str, Tensor], shard_bytes: int) -> None:
    shards = list(_shards(tensors, shard_bytes))
    if len(shards) == 1:
        save_file(shards[0], folder / WEIGHTS, metadata={"format": "pt"})
        return
    where = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, name))
    size = sum(value.nbytes for value in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": where})


def _shards(tensors: dict[str, Tensor], limit: int) -> Iterator[dict[str, Tensor]]:
    """Groups of at most `limit` bytes, in order (a larger single tensor is a group of its own)."""
    shard: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if shard and sum(t.nbytes for t in shard.values()) + value.nbytes > limit:
            yield shard
            shard = {}
        shard[name] = value
    yield shard


def _read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    files = [WEIGHTS]
    if (folder / INDEX).exists():
        files = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
    for name in files:
        if not (folder / name).exists():
            raise UserError("weights are missing", where=folder / name, fix="only safetensors files are read")
        try:
            with safe_open(folder / name, "pt") as file:
                for key in file.keys():  # noqa: SIM118 - a handle, not a dict
                    yield key, file.get_tensor(key)
        except SafetensorError as error:
            raise UserError(f"damaged weights: {error}", where=folder / name, fix="copy or train it again") from None


def _mismatch(folder: Path, tokenizer: Tokenizer, size: int) -> UserError:
    return UserError(
        f"this tokenizer ({tokenizer.vocab_size} ids) is not the one of the model ({size} ids)",
        where=folder,
        fix="use the tokenizer that the model was trained with, or resize the model's vocabulary",
    )
