"""What the routes under /api/ share: the caller's view of the store, and its errors as answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from fastapi import Depends, Request
from sqlalchemy.exc import IntegrityError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as NoConnection

from nestling.serving.errors import ApiError
from nestling.serving.store.records import Conflict, Missing
from nestling.serving.store.store import Store

STORE_ERRORS = (Missing, Conflict, IntegrityError, OperationalError, InterfaceError, NoConnection)
"""What goes wrong in a store that works as it should: what is asked for is not there, or just goes, or the database is not."""


def own_store(request: Request) -> Store:
    """The store as the holder of the request's key sees it.

    Raises:
        ApiError: 503, the service keeps none.
    """
    if request.app.state.store is None:
        raise ApiError("this service keeps no conversations; start it with --store", status=503, code="no_store")
    store: Store = request.app.state.store
    return store.of(request.state.key.name)


def opened(request: Request) -> Iterator[Store]:
    """`own_store` for a route; what goes wrong in the store becomes 404, 409 or 503."""
    store = own_store(request)
    try:
        yield store
    except STORE_ERRORS as error:
        raise answer_for(error) from error


def answer_for(error: Exception) -> ApiError:
    """The answer that a mistake of the store's becomes."""
    match error:
        case Missing():
            return ApiError(str(error), status=404, code="not_found")
        case Conflict():
            return ApiError(str(error), status=409, code="conflict")
        case IntegrityError():
            return ApiError("somebody else has just changed this; try again", status=409, code="conflict")
    return ApiError("the store can't be reached; try again", status=503, code="store_unavailable")


OpenStore = Annotated[Store, Depends(opened)]
