"""Between our configuration and weights and the Hugging Face folder's config.json and tensors.

A decoder whose settings its family can't say (Llama's parts with ALiBi, or an architecture of one's own) is saved in
Nestling's own form: the whole configuration under "nestling" in config.json, tensors under our names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

from nestling.core import registry
from nestling.core.config import nearest, parse
from nestling.core.errors import UserError
from nestling.model.config import DecoderConfig

FOLDER = "model.architectures"
OWN_FORM = "nestling-"
MULTI_LABEL = "multi_label_classification"
ACTIVATION_NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "silu": "silu", "relu_squared": "relu2"}
_ACTIVATIONS = {**{theirs: ours for ours, theirs in ACTIVATION_NAMES.items()}, "gelu_new": "gelu_tanh", "swish": "silu"}
_NO_WEIGHTS = (".attn.masked_bias", ".rotary_emb.inv_freq")


def make_config(data: Mapping[str, Any], where: str = "model") -> DecoderConfig:
    """A configuration from settings: `architecture` chooses the family, whose defaults fill the rest.

    Raises:
        UserError: unknown architecture or setting, or sizes that don't fit.
    """
    name = data.get("architecture", DecoderConfig.model_fields["architecture"].default)
    return parse(registry.find(FOLDER, name).Config, {**data, "architecture": name}, where)


def to_hub(config: DecoderConfig, *, scalar_head: bool = False, labels: Sequence[str] = ()) -> dict[str, Any]:
    """config.json: the family's where it can say all of `config`, otherwise our own form.

    Args:
        labels: of a multi-label classifier, in the order of its logits.
    """
    family = _family(config)
    if family is None:
        shared = {"vocab_size": config.vocab_size, "hidden_size": config.d_model}
        own = {"model_type": OWN_FORM + config.architecture, "architectures": ["NestlingDecoder"]}
        return {**own, **shared, "nestling": config.model_dump(), "scalar_head": scalar_head, **_label_names(labels)}
    name: str = family.REFERENCE
    if scalar_head or labels:
        name = name.removesuffix("LMHeadModel").removesuffix("ForCausalLM") + "ForSequenceClassification"
    hub = {"model_type": family.MODEL_TYPE, "architectures": [name], **family.to_hub(config)}
    return {**hub, "id2label": {"0": "score"}, "label2id": {"score": 0}} if scalar_head else {**hub, **_label_names(labels)}


def _label_names(labels: Sequence[str]) -> dict[str, Any]:
    """What transformers calls a multi-label classifier with these labels; nothing where there are none."""
    if not labels:
        return {}
    names = {str(place): name for place, name in enumerate(labels)}
    return {"problem_type": MULTI_LABEL, "id2label": names, "label2id": {name: int(n) for n, name in names.items()}}


def labels_of(hub: Mapping[str, Any]) -> tuple[str, ...]:
    """The labels of a multi-label classifier's config.json, in the order of its logits; none for any other model."""
    if hub.get("problem_type") != MULTI_LABEL:
        return ()
    names = hub.get("id2label") or {}
    return tuple(str(names[place]) for place in sorted(names, key=int))


def from_hub(hub: Mapping[str, Any], where: str = "config.json") -> tuple[DecoderConfig, bool]:
    """(configuration, whether a scalar head is in the checkpoint) from config.json.

    Raises:
        UserError: unknown model_type, a missing key, or a setting that this decoder doesn't have.
    """
    if not isinstance(hub, Mapping):
        raise UserError("a model's configuration must be a JSON object", where=where, value=hub)
    model_type = str(hub.get("model_type"))
    if model_type.startswith(OWN_FORM):
        return make_config(hub["nestling"], where), bool(hub.get("scalar_head"))
    families = _families()
    if model_type not in families:
        raise UserError("unknown model_type", where=where, value=model_type, fix=nearest(model_type, families))
    heads = [str(name) for name in hub.get("architectures") or ()]
    try:
        config = families[model_type].from_hub(hub)
    except KeyError as error:
        raise UserError(f"{error.args[0]} is missing", where=where) from None
    return config, any(name.endswith("ForSequenceClassification") for name in heads)


def export_weights(state: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """A decoder's state dict under the names that its config.json promises."""
    family = _family(config)
    return dict(state) if family is None else family.export_weights(state, config)


def import_weights(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], config: DecoderConfig, where: str
) -> dict[str, Tensor]:
    """Tensors of a checkpoint under our names.

    Args:
        expected: what `export_weights` gives for a fresh model: the names and shapes that must be there, no others.

    Raises:
        UserError: missing, unexpected or mis-shaped tensors, by name.
    """
    found = _usual_names(found, expected)
    _complain(where, "lacks the tensors", sorted(expected.keys() - found.keys()))
    _complain(where, "has unknown tensors", sorted(found.keys() - expected.keys()))
    wrong = [
        f"{name} {list(value.shape)} instead of {list(expected[name].shape)}"
        for name, value in found.items()
        if value.shape != expected[name].shape
    ]
    _complain(where, "has tensors of another shape than config.json says:", wrong)
    family = _family(config)
    return dict(found) if family is None else family.import_weights(found, config)


def require(hub: Mapping[str, Any], **values: Any) -> None:
    """Refuse a config.json whose settings, where given, differ from the only ones we compute.

    Raises:
        UserError: names the setting.
    """
    for key, value in values.items():
        if key in hub and hub[key] != value:
            raise UserError(f"{key} other than {value} is not supported", where="config.json", value=hub[key])


def activation_from_hub(name: str, names: Mapping[str, str] = _ACTIVATIONS) -> str:
    """Our name of an activation.

    Raises:
        UserError: one that we don't have.
    """
    if name not in names:
        raise UserError("unknown activation", where="config.json", value=name, fix=nearest(name, names))
    return names[name]


def _families() -> dict[str, ModuleType]:
    """model_type -> architecture file, of those that a class in transformers reads."""
    modules = [registry.find(FOLDER, name) for name in registry.names(FOLDER)]
    return {module.MODEL_TYPE: module for module in modules if module.REFERENCE is not None}


def _family(config: DecoderConfig) -> ModuleType | None:
    """The file of the family whose form says all of `config`; None where only our own form does."""
    module = registry.find(FOLDER, config.architecture)
    if module.REFERENCE is None:
        return None
    try:
        returned = module.from_hub(module.to_hub(config))
    except UserError:
        return None
    return module if _canonical(returned) == _canonical(config) else None


def _canonical(config: DecoderConfig) -> dict[str, Any]:
    """All that decides the output: sizes left open filled in, start values left out."""
    sizes = {"n_kv_heads": config.kv_heads, "head_size": config.head, "d_ff": config.ff, "init": None}
    if config.positions != "rope":
        sizes["rope_theta"] = None
    return {**config.model_dump(), **sizes}


def _usual_names(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo what older files do: masks stored as tensors, no "transformer." in front, the tied output layer repeated."""
    prefix = next(iter(expected)).split(".")[0] + "."
    named = {}
    for name, value in found.items():
        if name not in expected and prefix + name in expected:
            name = prefix + name
        is_mask = name.endswith(_NO_WEIGHTS) or (name.endswith("attn.bias") and value.ndim == 4)
        if not is_mask:
            named[name] = value
    if "lm_head.weight" not in expected:
        named.pop("lm_head.weight", None)
    return named


def _complain(where: str, what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        raise UserError(f"{what} {', '.join(names[:4])}{more}", where=where, fix="use weights of this very model")
