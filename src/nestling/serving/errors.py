"""Everything that goes wrong, told in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy.exc import IntegrityError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as NoConnection
from starlette.exceptions import HTTPException

from nestling.core.errors import UserError
from nestling.serving.store.records import Conflict, Missing

INVALID = "invalid_request_error"
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 500: "server_error",
         503: "server_error"}  # fmt: skip
CODES = {404: "unknown_url", 405: "method_not_supported"}
VALIDATION_CODES = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter",
                    "json_invalid": "invalid_json"}  # fmt: skip
FIELD, FORMS = re.compile(r"[a-z_][a-z0-9_]*"), ("str", "int", "float", "bool", "list", "dict")
"""What a field's name looks like in a place of pydantic's, and what only names a form that a value may have."""


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetail


DOCUMENTED: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
"""For the OpenAPI document."""


class ApiError(Exception):
    """An answer other than 200.

    >>> ApiError("no such model", status=404, code="model_not_found", param="model").body["error"]["type"]
    'invalid_request_error'
    """

    def __init__(
        self, message: str, *, status: int = 400, code: str | None = None, param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.message, self.status, self.code, self.param = message, status, code, param
        self.headers = dict(headers or {})

    @classmethod
    def of(cls, error: UserError, *, param: str | None = None, code: str | None = "invalid_value") -> ApiError:
        """A mistake in a request that other folders found; `where` names the parameter unless given."""
        place = None if error.where is None else str(error.where).removeprefix("sampling.")
        return cls(str(error).removeprefix("sampling."), param=param or place, code=code)

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that a client reads."""
        kind = TYPES.get(self.status, INVALID)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The HTTP answer."""
        return JSONResponse(self.body, self.status, self.headers)


def unsupported(param: str, what: str) -> ApiError:
    """A parameter of OpenAI's that this service does not have, said plainly.

    >>> unsupported("suffix", "there is no text to put before it").code
    'unsupported_parameter'
    """
    return ApiError(f"{param}: {what}", param=param, code="unsupported_parameter")


def lacking(param: str) -> ApiError:
    """A field that the request must have.

    >>> lacking("tools[0].name").message
    'tools[0].name: this field is required'
    """
    return ApiError(f"{param}: this field is required", param=param, code="missing_required_parameter")


REPORTED = (ApiError, UserError, IntegrityError, OperationalError, InterfaceError, NoConnection)
"""What goes wrong in a service that works as it should: a wrong request, or a store that is changed by others or gone."""


def answer_for(error: Exception) -> ApiError:
    """The answer that one of `REPORTED` becomes."""
    match error:
        case ApiError():
            return error
        case Missing():
            return ApiError(str(error), status=404, code="not_found")
        case Conflict():
            return ApiError(str(error), status=409, code="conflict")
        case UserError():
            return ApiError.of(error)
        case IntegrityError():
            return ApiError("somebody else has just changed this; try again", status=409, code="conflict")
    return ApiError("the store can't be reached; try again", status=503, code="store_unavailable")


def install(app: FastAPI) -> None:
    """Answer every error of an app in OpenAI's shape."""
    for kind in REPORTED:
        app.add_exception_handler(kind, _reported)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _crash)


async def _reported(request: Request, error: Exception) -> JSONResponse:
    return answer_for(error).response()


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return explain(error.errors()).response()


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    headers = error.headers
    return ApiError(message, status=error.status_code, code=CODES.get(error.status_code), headers=headers).response()


async def _crash(request: Request, error: Exception) -> JSONResponse:
    """A mistake of ours; what it was stands in the log, not in the answer."""
    headers = {"x-request-id": request.state.record.id}
    what = "the server made a mistake; its log says which"
    return ApiError(what, status=500, code="internal_error", headers=headers).response()


def explain(found: Sequence[Mapping[str, Any]]) -> ApiError:
    """The mistakes that pydantic found in a request, told as one.

    Where a field may have several forms, each form complains; the form that was read furthest is what was meant.

    >>> explain([{"type": "missing", "loc": ("body", "model"), "msg": "Field required"}]).message
    'model: field required'
    """
    first = max(found, key=lambda one: len(one["loc"]))
    place = _place(first["loc"])
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ApiError | UserError):
        inner = cause if isinstance(cause, ApiError) else ApiError.of(cause)
        return ApiError(inner.message, code=inner.code, param=inner.param or place)
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    message = f"{message[:1].lower()}{message[1:]}"
    if first["type"] == "json_invalid":
        what = f"the body is not JSON: {str(cause).lower()} (character {first['loc'][-1]})"
        return ApiError(what, code="invalid_json")
    code = VALIDATION_CODES.get(first["type"], "invalid_type" if "type" in first["type"] else "invalid_value")
    return ApiError(f"{place}: {message}" if place else message, param=place, code=code)


def _place(location: tuple[int | str, ...]) -> str | None:
    """("body", "messages", 0, "content", "list[Part]", 1) -> "messages[0].content[1]": without pydantic's names of forms."""
    text = ""
    for part in location[1:]:
        if isinstance(part, int):
            text += f"[{part}]"
        elif FIELD.fullmatch(part) and part not in FORMS:
            text += f".{part}" if text else part
    return text or None
