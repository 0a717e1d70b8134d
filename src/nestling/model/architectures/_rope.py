"""RoPE's settings between our configuration and config.json, in the forms of transformers 5 and 4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nestling.core.config import nearest, parse
from nestling.core.errors import UserError
from nestling.model.config import DecoderConfig
from nestling.model.rope import SCALINGS, DynamicScaling, Scaling, yarn_amplitude

_ORIGINAL = "original_max_position_embeddings"
_OPTIONAL = ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "truncate", "attention_factor")


def rope_to_hub(config: DecoderConfig) -> dict[str, Any]:
    """`max_position_embeddings` and RoPE's keys: `rope_parameters`, and beside it what older readers look for."""
    scaling = config.rope_scaling
    plain = {"max_position_embeddings": config.context, "rope_theta": config.rope_theta}
    if scaling is None:
        return {**plain, "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}}
    said = {name: value for name, value in scaling.model_dump(exclude={"kind"}).items() if value is not None}
    original = said.pop("original_context", None)
    told: dict[str, Any] = {"rope_type": scaling.kind, **said}
    if isinstance(scaling, DynamicScaling):
        plain["max_position_embeddings"] = scaling.original_context
    elif original is not None:
        told[_ORIGINAL] = original
    return {**plain, "rope_scaling": told, "rope_parameters": {**told, "rope_theta": config.rope_theta}}


def rope_from_hub(hub: Mapping[str, Any]) -> dict[str, Any]:
    """Our `context`, `rope_theta` and `rope_scaling`, from `rope_parameters` or from `rope_theta` and `rope_scaling`.

    A published context that the stretching goes beyond is the original one; ours is the stretched one.

    Raises:
        UserError: partial rotation, or a way of stretching that we don't have.
    """
    rope = {**(hub.get("rope_scaling") or {}), **(hub.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", hub.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError("rotating only a part of each head is not supported", where="config.json", value=rope)
    context = hub["max_position_embeddings"]
    theta = rope.get("rope_theta", hub.get("rope_theta", 10_000.0))
    if kind == "default":
        return {"context": context, "rope_theta": theta}
    if kind not in SCALINGS:
        raise UserError("unknown way of scaling RoPE", where="config.json", value=kind, fix=nearest(kind, SCALINGS))
    scaling = _scaling(SCALINGS[kind], rope, context)
    original = getattr(scaling, "original_context", 0)  # linear scaling names none
    return {"context": max(context, int(original * scaling.factor)), "rope_theta": theta, "rope_scaling": scaling}


def _scaling(kind: type[Scaling], rope: Mapping[str, Any], context: int) -> Scaling:
    found = {name: rope[name] for name in _OPTIONAL if name in kind.model_fields and rope.get(name) is not None}
    original = rope.get(_ORIGINAL) or context
    if "original_context" in kind.model_fields:
        found["original_context"] = context if kind is DynamicScaling else original
    factor = rope.get("factor") or context / original
    strength, whole = rope.get("mscale"), rope.get("mscale_all_dim")
    if "attention_factor" in kind.model_fields and "attention_factor" not in found and strength and whole:
        found["attention_factor"] = yarn_amplitude(factor, strength) / yarn_amplitude(factor, whole)
    return parse(kind, {**found, "factor": factor}, "config.json: rope_parameters")
