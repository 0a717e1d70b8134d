"""The service: models, store and settings put together as one ASGI app."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

import nestling
from nestling.core import registry
from nestling.serving import errors
from nestling.serving.guarding import guard_of
from nestling.serving.limits import Gate
from nestling.serving.models import Models
from nestling.serving.moderation import Moderator
from nestling.serving.observing import Observer
from nestling.serving.remembering import Memory
from nestling.serving.rendering import Progressive
from nestling.serving.router import Router
from nestling.serving.runs import DEFAULT, Runs
from nestling.serving.settings import ServeSettings
from nestling.serving.store.store import Store


def create_app(
    settings: ServeSettings,
    models: Models,
    store: Store | None = None,
    *,
    moderator: Moderator | None = None,
    router: Router | None = None,
    runs: Runs | None = None,
) -> FastAPI:
    """The ASGI app; the models' drivers run from its start to its end.

    Args:
        store: where conversations and what people say of them are kept; without one, those paths answer that.
        moderator: judges texts; without one, nothing is.
        router: chooses a model for "auto".
        runs: of recipes, for the page to show; those in `runs` where none are given.
    """
    app = FastAPI(
        title="Nestling", version=nestling.__version__, lifespan=_lifespan, docs_url=None, redoc_url=None,
        responses=errors.DOCUMENTED,
    )  # fmt: skip
    observer = Observer(models, log_text=settings.log_text)
    state = {"settings": settings, "models": models, "store": store, "moderator": moderator, "router": router,
             "observer": observer, "memory": Memory(settings.kept_responses, store), "runs": runs or Runs(DEFAULT),
             "progressive": Progressive()}  # fmt: skip
    for name, value in state.items():
        setattr(app.state, name, value)
    app.state.guard = guard_of(app.state)
    errors.install(app)
    for name in registry.names("serving.routes"):
        app.include_router(registry.find("serving.routes", name).router)
    app.add_middleware(Gate, settings=settings, observer=observer)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["*"], allow_headers=["*"],
            expose_headers=["x-request-id"],
        )  # fmt: skip
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    models: Models = app.state.models
    models.start()
    try:
        yield
    finally:
        await models.stop(app.state.settings.shutdown_seconds)
