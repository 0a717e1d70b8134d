"""What the routes under /api/ share: the caller's view of the store."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from nestling.serving.errors import ApiError
from nestling.serving.store.store import Store


def own_store(request: Request) -> Store:
    """The store as the holder of the request's key sees it.

    Raises:
        ApiError: 503, the service keeps none.
    """
    store: Store | None = request.app.state.store
    if store is None:
        raise ApiError("this service keeps no conversations; start it with --store", status=503, code="no_store")
    return store.of(request.state.key.name)


OpenStore = Annotated[Store, Depends(own_store)]
