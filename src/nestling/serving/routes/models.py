"""/v1/models: what is served."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from nestling.serving.models import AUTO, Models, Served

router = APIRouter(tags=["models"])


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """The models, the default first, and "auto" where a router chooses among them."""
    models: Models = request.app.state.models
    entries = [_entry(one) for one in models]
    if entries and request.app.state.router is not None:
        entries.append({"id": AUTO, "object": "model", "created": entries[0]["created"], "owned_by": "nestling"})
    return {"object": "list", "data": entries}


@router.get("/v1/models/{name}")
async def get_model(request: Request, name: str) -> dict[str, Any]:
    """One model."""
    return _entry(request.app.state.models.get(name))


def _entry(one: Served) -> dict[str, Any]:
    """OpenAI's four fields, and what people ask next."""
    return {"id": one.name, "object": "model", "created": one.created, "owned_by": "nestling", "kind": one.kind,
            "max_model_len": one.context, "fingerprint": one.fingerprint,
            "parameters": one.driver.engine.model.parameter_count(), "tools": one.toolbox.names}  # fmt: skip
