"""Who answers a request: the model it names, or the router's choice for "auto"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from nestling.core.errors import UserError
from nestling.core.types import Message
from nestling.serving.answering import Question
from nestling.serving.errors import ApiError
from nestling.serving.models import AUTO, Models, Served

THINKING = "medium"
"""The reasoning_effort that the router's "thinking" stands for."""


@dataclass(frozen=True)
class Chosen:
    """Who answers; `effort` is the router's word (direct, tools, thinking), None where the client named the model."""

    served: Served
    effort: str | None = None

    def adapt(self, question: Question) -> Question:
        """The question with the router's effort, where the client said nothing else."""
        if self.effort is None:
            return question
        own = question.offer.own if self.effort == "tools" else ()
        wanted = question.effort or (THINKING if self.effort == "thinking" else "none")
        opens = question.opens_thought or self.effort == "thinking"
        return replace(question, offer=replace(question.offer, own=own), effort=wanted, opens_thought=opens)


def choose(state: Any, name: str, messages: Sequence[Message], *, tools: bool = True) -> Chosen:
    """The chat model for a request.

    Args:
        state: of the app.
        tools: whether the request lets the service use tools of its own.

    Raises:
        ApiError: no such model, or one that does not chat; "auto" without a router that knows one of the models.
    """
    models: Models = state.models
    if name != AUTO:
        return Chosen(models.chat(name))
    if state.router is None:
        raise ApiError('"auto" needs a router; start the service with --router FOLDER', status=404,
                       code="model_not_found", param="model")  # fmt: skip
    try:
        chatting = [one for one in models if one.kind == "chat"]
        tools = tools and any(one.toolbox.names for one in chatting)
        choice = state.router.choose(messages, [one.name for one in chatting], tools=tools)
    except UserError as error:
        raise ApiError.of(error, param="model") from None
    return Chosen(models.chat(choice.model), choice.effort)
