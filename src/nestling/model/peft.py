"""Adapters as PEFT stores them: adapter_config.json and adapter_model.safetensors, for any family of architectures/.

A family's own `export_weights` says what it calls a layer and in which form it keeps it: numbered rows are sent through
it. GPT-2's one matrix for queries, keys and values has one adapter there, of the ranks of our three together: their A
below one another, their B as blocks on the diagonal. So have the gates and ups of experts, which are one tensor there. PEFT
calls that tensor, and all else in the feed-forwards of a family with experts, by a parameter's name (`target_parameters`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nestling.core import registry
from nestling.core.config import parse
from nestling.core.errors import UserError
from nestling.core.storage import read_json, write_json
from nestling.model import hub
from nestling.model.adapters import (
    Adaptation,
    Adapted,
    AdaptedStack,
    AdapterSettings,
    Target,
    TrainedRows,
    adaptable,
    adapted_layers,
    put,
    with_adapter,
)
from nestling.model.config import DecoderConfig
from nestling.model.decoder import Decoder
from nestling.model.experts import StackedLinear

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, SCORE = "base_model.model.", "score.weight"
ROWS = ".token_adapter.trainable_tokens_delta"
WRITES, SCORES = "CAUSAL_LM", "SEQ_CLS"
PLAIN = {"peft_type": "LORA", "bias": "none", "use_dora": False, "lora_bias": False, "use_qalora": False}
"""Settings of PEFT that we compute only this way, as are those of `ABSENT`, which must not be there."""
ABSENT = ("layer_replication", "alora_invocation_tokens", "use_bdlora", "kasa_config", "velora_config")
WHOLE = ("score", "classifier", "embed_tokens", "wte", "lm_head")
"""What may be kept whole in an adapter."""
CHANGE_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
SAMPLES, SAMPLE_BYTES = 16, 1 << 16
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.(gate|up|down)_proj")
_INNER, _OUTER = "gate_up_proj", "down_proj"
"""What transformers calls the stacks of a layer's experts, in the order in which PEFT puts adapters round them."""


@dataclass(frozen=True)
class Place:
    """A matrix of the family's form: what it is called there, our layers in it, whether it is stored [in, out].

    Of `experts` it is a stack, a matrix for each. PEFT finds it by its `target`: a module, or (`parameter`) a tensor.
    """

    name: str
    ours: tuple[str, ...]
    turned: bool = False
    experts: int = 0
    parameter: bool = False

    @property
    def target(self) -> str:
        """A module's name, or a parameter's."""
        return f"{self.name}.weight" if self.parameter and not self.experts else self.name

    def key(self, adapted: Collection[str]) -> str:
        """What its adapter is called in a file where the places of these names are adapted."""
        if not self.experts:
            return self.name
        module, _, part = self.name.rpartition(".")
        return f"{module}.base_layer" if part == _INNER and f"{module}.{_OUTER}" in adapted else module


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter instead of a whole model."""
    return (folder / CONFIG).exists()


def writes_text(folder: Path) -> bool:
    """Whether an adapter folder's model writes text; others score or label it."""
    return read_json(folder / CONFIG).get("task_type") in (WRITES, None)


def base_folder(folder: Path) -> Path:
    """The folder of the model that an adapter changes.

    Raises:
        UserError: it isn't where the adapter says, or it is another model than the adapter was trained on.
    """
    named = str(read_json(folder / CONFIG).get("base_model_name_or_path") or "")
    origin = read_json(folder / "nestling.json") if (folder / "nestling.json").exists() else {}
    known = origin.get("base") or {}
    places = [folder / known["path"]] if known else []
    places += [Path(named), folder / named] if named else []
    for place in places:
        is_model = (place / "config.json").exists() or is_adapter(place)
        if is_model and place.resolve() != folder.resolve():
            if known and known["fingerprint"] != fingerprint(place):
                fix = "use the very weights that the adapter was trained on"
                raise UserError("this adapter belongs to another base model", where=folder, value=str(place), fix=fix)
            return place.resolve()
    fix = f"put that model there, or name its folder as base_model_name_or_path in {CONFIG}"
    raise UserError("the adapter's base model is not on this machine", where=folder, value=named, fix=fix)


def fingerprint(base: Path) -> str:
    """Tells a model's weights from others without reading all of them: sizes, and pieces of each file."""
    digest = blake2b(digest_size=16)
    for file in sorted(base.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for piece in range(SAMPLES):
                stream.seek(max(0, size - SAMPLE_BYTES) * piece // (SAMPLES - 1))
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def places(config: DecoderConfig) -> list[Place]:
    """Every matrix of the family's checkpoint with our layers in it."""
    with torch.device("meta"):
        state = registry.find(hub.FOLDER, config.architecture).build(config).state_dict()
    names, count = list(state), config.experts.count if config.experts else 0
    numbered = {name: _numbered(value, index) for index, (name, value) in enumerate(state.items())}
    found: list[Place] = []
    stacks: dict[str, list[str]] = {}
    for called, value in hub.export_weights(numbered, config).items():
        if value.ndim == 2 and called.endswith(".weight"):
            parts = dict.fromkeys((value.flatten() >> 32).tolist())
            ours, name = tuple(names[number].removesuffix(".weight") for number in parts), called.removesuffix(".weight")
            if stack := _EXPERT.fullmatch(name):
                stacks.setdefault(f"{stack[1]}.{_OUTER if stack[2] == 'down' else _INNER}", []).extend(ours)
            else:
                found.append(Place(name, ours, value.shape[0] == 1, parameter=count > 0 and ".feed_forward." in ours[0]))
    fused = ((name, tuple(dict.fromkeys(ours))) for name, ours in stacks.items())
    return [*found, *(Place(name, ours, experts=count, parameter=True) for name, ours in fused)]


def _numbered(value: Tensor, index: int) -> Tensor:
    """In the place of a matrix [out, in] its rows' numbers [out, 1], so that nothing of the model's size is made."""
    rows = torch.arange(value.shape[0]) + (index << 32)
    return rows.view(-1, *[1] * (value.ndim - 1))


# --- writing ---------------------------------------------------------------------------------------------------------


def write(folder: Path, model: Decoder, origin: Adaptation, score: Tensor | None = None) -> None:
    """Write what was learnt; the base model is named, not copied.

    Args:
        score: weights of a scalar head, which are kept whole.
    """
    settings, modules, layers = origin.settings, dict(model.named_modules()), adapted_layers(model)
    tensors: dict[str, Tensor] = {} if score is None else {SCORE: score}
    known = places(model.config)
    adapted = {place.name: place for place in known if any(path in layers for path in place.ours)}
    ranks, alphas = {}, {}
    for place in adapted.values():
        lora_a, lora_b, scale = _joined([modules[path] for path in place.ours])  # type: ignore[arg-type]
        rank, key = lora_a.shape[-2], place.key(adapted)
        flat_b = lora_b.movedim(0, -1).flatten(1) if place.experts else lora_b  # [out, r E]
        tensors |= {f"{key}.lora_A.weight": lora_a.flatten(0, -2), f"{key}.lora_B.weight": flat_b}
        if rank != settings.rank or scale != settings.scale():
            ranks[place.target], alphas[place.target] = rank, scale / settings.scale(rank, 1.0)
    rows = {p.name: part for p in known if isinstance(part := modules.get(p.ours[0]), TrainedRows)}
    tensors |= {f"{name}{ROWS}": part.rows for name, part in rows.items()}
    ready = {f"{PREFIX}{name}": value.detach().float().cpu().contiguous() for name, value in tensors.items()}
    save_file(ready, folder / WEIGHTS, metadata={"format": "pt"})
    config = {
        **PLAIN,
        "task_type": WRITES if score is None else SCORES,
        "base_model_name_or_path": str(origin.base.resolve()),
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.use_rslora,
        "target_modules": _targets(adapted.values(), known, parameters=False),
        "target_parameters": _targets(adapted.values(), known, parameters=True) or None,
        "fan_in_fan_out": any(place.turned for place in adapted.values()),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "modules_to_save": None if score is None else ["score"],
        "trainable_token_indices": {name.rsplit(".", 1)[-1]: part.numbers.tolist() for name, part in rows.items()}
        or None,
    }
    write_json(folder / CONFIG, config)


def _targets(adapted: Iterable[Place], known: Iterable[Place], parameters: bool) -> list[str]:
    """Names by which PEFT finds modules or parameters: what follows the block's number, where it is adapted in every block."""
    names = [place.target for place in adapted if place.parameter == parameters]
    ends = {place.target: re.split(r"\.\d+\.", place.target, maxsplit=1)[-1] for place in known}
    partly = {end for name, end in ends.items() if name not in names}
    return sorted({name if ends[name] in partly else ends[name] for name in names})


def base_record(origin: Adaptation, folder: Path) -> dict[str, str]:
    """What nestling.json remembers of the base: where it is, seen from the adapter, and which one it is."""
    path = os.path.relpath(origin.base.resolve(), folder.resolve())
    return {"path": path, "fingerprint": fingerprint(origin.base)}


def _joined(layers: Sequence[nn.Linear | StackedLinear]) -> tuple[Tensor, Tensor, float]:
    """A [.., Σ r, in], B [.., Σ out, Σ r] and the scale of the layers of one matrix; those without an adapter add no rank."""
    given = [layer for layer in layers if isinstance(layer, Adapted | AdaptedStack)]
    lora_a = torch.cat([layer.lora_a.detach() for layer in given], -2)
    lora_b = lora_a.new_zeros(*lora_a.shape[:-2], sum(layer.out_features for layer in layers), lora_a.shape[-2])
    row = column = 0
    for layer in layers:
        if isinstance(layer, Adapted | AdaptedStack):
            rank = layer.lora_a.shape[-2]
            lora_b[..., row : row + layer.out_features, column : column + rank] = layer.lora_b.detach()
            column += rank
        row += layer.out_features
    return lora_a, lora_b, given[0].scale


# --- reading ---------------------------------------------------------------------------------------------------------


def read(folder: Path, base: Path, model: Decoder) -> Tensor | None:
    """Give a model the adapters of a folder, frozen weights and all; returns the weights of a scalar head, if any.

    Raises:
        UserError: another method than plain LoRA, damaged weights, or an adapter of another model.
    """
    config = _checked(read_json(folder / CONFIG), folder / CONFIG, model.config)
    tensors = _tensors(folder)
    named = tuple(f".{target}" for target in config.get("target_parameters") or ())
    known = [place for place in places(model.config) if not place.experts or f".{place.target}".endswith(named)]
    layers, stacks = dict(adaptable(model)), {place.name for place in known if place.experts}
    ours = [path for place in known for path in place.ours if f"{place.key(stacks)}.lora_A.weight" in tensors]
    origin = Adaptation(_settings(config, ours, folder / CONFIG), base)
    model.requires_grad_(False)
    for place in known:
        lora_a, lora_b = (tensors.pop(f"{place.key(stacks)}.lora_{side}.weight", None) for side in "AB")
        if lora_a is not None and lora_b is not None:
            parts = [layers.get(path) for path in place.ours]
            fits = all(part is not None and part.in_features == lora_a.shape[1] for part in parts)
            if not fits or sum(part.out_features for part in parts if part is not None) != len(lora_b):
                raise _foreign(folder, place.name)
            if place.experts:
                lora_a = lora_a.unflatten(0, (place.experts, -1))  # [E, r, in]
                lora_b = lora_b.unflatten(1, (-1, place.experts)).movedim(-1, 0)  # [E, out, r]
            scale = _scale(config, origin.settings, place.target)
            pieces = _divided(lora_a, lora_b, [part.out_features for part in parts if part is not None])
            for path, part, piece in zip(place.ours, parts, pieces, strict=True):
                if part is not None and piece is not None:
                    put(model, path, with_adapter(part, *piece, scale, origin))
        _read_rows(model, place, tensors, config, folder)
    score = tensors.pop(SCORE, None)
    if tensors:
        raise _foreign(folder, next(iter(tensors)))
    return score


def _checked(config: Mapping[str, Any], where: Path, model: DecoderConfig) -> Mapping[str, Any]:
    """Refuse what PEFT can do and we can't."""
    absent = ABSENT if model.experts else (*ABSENT, "target_parameters")
    whole = sorted({*(config.get("modules_to_save") or ())} - {*WHOLE})
    for name, value in {**PLAIN, **dict.fromkeys(absent), "modules_to_save": None}.items():
        found = whole if name == "modules_to_save" else config.get(name, value)
        if found != value and found not in (None, False, [], {}):
            fix = "merge it with PEFT's merge_and_unload, and load the merged model"
            raise UserError(f"adapters with {name} are not supported", where=where, value=found, fix=fix)
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(CHANGE_THE_BASE):
        raise UserError(
            "this way of starting changes the base model too", where=where, value=start, fix="convert it to plain LoRA"
        )
    return config


def _tensors(folder: Path) -> dict[str, Tensor]:
    """The file's tensors without PEFT's prefix."""
    if not (folder / WEIGHTS).exists():
        raise UserError("weights are missing", where=folder / WEIGHTS, fix="only safetensors files are read")
    try:
        return {name.removeprefix(PREFIX): value for name, value in load_file(folder / WEIGHTS).items()}
    except SafetensorError as error:
        raise UserError(f"damaged weights: {error}", where=folder / WEIGHTS, fix="copy or train it again") from None


def _settings(config: Mapping[str, Any], adapted: Sequence[str], where: Path) -> AdapterSettings:
    leaves = {path.rsplit(".", 1)[-1] for path in adapted}
    found = {
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "dropout": config.get("lora_dropout", 0.0),
        "targets": tuple(name for name in get_args(Target) if name in leaves),
        "use_rslora": config.get("use_rslora", False),
    }
    return parse(AdapterSettings, found, f"{where}: ")


def _scale(config: Mapping[str, Any], settings: AdapterSettings, name: str) -> float:
    """The scale of one matrix: PEFT keeps exceptions by name or by the end of a name."""
    rank, alpha = (_exception(config.get(f"{kind}_pattern") or {}, name) for kind in ("rank", "alpha"))
    return settings.scale(None if rank is None else int(rank), alpha)


def _exception(patterns: Mapping[str, float], name: str) -> float | None:
    return next((value for pattern, value in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", name)), None)


def _divided(lora_a: Tensor, lora_b: Tensor, sizes: Sequence[int]) -> Iterator[tuple[Tensor, Tensor] | None]:
    """What each of the layers in one matrix gets; None where the adapter leaves it as it is.

    Columns of B that are zero in a layer's rows do nothing there, so blocks that were joined come apart again.
    """
    apart = len(sizes) > 1 and bool(lora_b.ne(0).any())
    for rows in lora_b.split(list(sizes), dim=-2):
        used = rows.ne(0).flatten(0, -2).any(0) if apart else torch.ones(rows.shape[-1], dtype=torch.bool)
        yield (lora_a[..., used, :], rows[..., used]) if used.any() else None


def _read_rows(
    model: Decoder, place: Place, tensors: dict[str, Tensor], config: Mapping[str, Any], folder: Path
) -> None:
    """Rows that were trained of the embedding, or of an output layer of its own: some of them, or the whole table."""
    rows = tensors.pop(f"{place.name}{ROWS}", None)
    indices = config.get("trainable_token_indices") or {}
    numbers = indices if isinstance(indices, list) else indices.get(place.name.rsplit(".", 1)[-1], [])
    if rows is None and (rows := tensors.pop(f"{place.name}.weight", None)) is not None:
        numbers = list(range(len(rows)))
        if model.head is None:
            what = "this adapter trains the embedding apart from the output layer that shares it"
            raise UserError(what, where=folder, fix="merge it with PEFT's merge_and_unload, and load the merged model")
    if rows is None:
        return
    tables = {"embedding": model.embedding.weight, "head": model.output_weight}
    table = tables.get(place.ours[0])
    if table is None or rows.shape != (len(numbers), table.shape[1]) or max(numbers) >= len(table):
        raise _foreign(folder, place.name)
    put(model, place.ours[0], TrainedRows(nn.Parameter(table, requires_grad=False), numbers, rows))


def _foreign(folder: Path, name: str) -> UserError:
    fix = "use the model that it was trained on"
    return UserError(f"this adapter does not fit its base model: {name}", where=folder, fix=fix)
