"""The values that go into the store and come out of it, in the form that the page reads them as JSON."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nestling.core.errors import UserError
from nestling.core.types import Message

Choice = Literal["a", "b", "tie", "both_bad"]
Side = Literal["a", "b"]


class Missing(UserError):
    """There is no such row, or it belongs to somebody else."""


class Conflict(UserError):
    """The row is in a state that does not allow this any more."""


class Record(BaseModel):
    """A frozen row."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())


class ConversationRecord(Record):
    """A conversation without its messages; `tip` is the message last looked at."""

    id: str
    owner: str = Field(exclude=True)
    title: str
    system: str
    tools: list[str]
    model: str
    sampling: dict[str, Any]
    tip: str | None
    created: float
    updated: float


class Found(ConversationRecord):
    """A conversation in a list; `snippet` is the text around the first place where the searched words stand."""

    snippet: str = ""


class ConversationPage(Record):
    """Part of a list; `next` asks for the part that follows."""

    data: list[Found]
    next: str | None = None


class ConversationChanges(Record):
    """What may be said of a conversation; fields that are not given stay as they are."""

    model_config = ConfigDict(extra="forbid")

    title: str = Field("", max_length=1000)
    system: str = ""
    tools: list[str] = []
    model: str = Field("", max_length=200)
    sampling: dict[str, Any] = {}
    tip: str | None = None


class ModelVersion(Record):
    """What answered: the name it is served under, the identity of its checkpoint, and what nestling.json tells.

    >>> ModelVersion(name="demo", checkpoint="f00d").id == ModelVersion(name="demo", checkpoint="beef").id
    False
    """

    name: str
    checkpoint: str = ""
    provenance: dict[str, Any] = {}

    @property
    def id(self) -> str:
        """A hash of all three."""
        text = json.dumps([self.name, self.checkpoint, self.provenance], sort_keys=True, default=str)
        return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=12).hexdigest()


class TokenRecord(Record):
    """A token of a reply with the likeliest alternatives that the model had."""

    text: str
    logprob: float
    top: list[TokenRecord] = []


class Written(Record):
    """A reply as the model wrote it, before it is in the store."""

    version: ModelVersion
    content: str
    thinking: str = ""
    steps: list[dict[str, Any]] = []
    """OpenAI messages before the final text: calls of tools and their results."""
    system: str = ""
    tools: list[str] = []
    sampling: dict[str, Any] = {}
    seed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish: str = "stop"
    seconds: float = 0.0
    first_token_seconds: float | None = None
    tokens: list[TokenRecord] = []
    forgotten: int = 0
    """Messages at the start that had no room in the context and were not read."""


class ReplyRecord(Record):
    """How a message of the assistant came about."""

    model: str
    checkpoint: str
    system: str
    tools: list[str]
    sampling: dict[str, Any]
    seed: int
    prompt_tokens: int
    completion_tokens: int
    finish: str
    seconds: float
    first_token_seconds: float | None
    forgotten: int


class VoteRecord(Record):
    """Thumbs up (1) or down (-1)."""

    value: Literal[1, -1]
    reason: str = Field("", max_length=200)
    comment: str = ""


class MessageRecord(Record):
    """A node of the tree; `flagged` when a user reported it or the moderation model objects to it, and no
    operator found that wrong.

    While it takes part in an undecided comparison it is `blind`: `reply` is withheld, but not how much was
    `forgotten` for it and why it ended (`finish`), which everybody who reads it must know.
    """

    id: str
    conversation: str
    parent: str | None
    role: Literal["user", "assistant"]
    content: str
    thinking: str
    steps: list[dict[str, Any]]
    created: float
    forgotten: int = 0
    finish: str = ""
    reply: ReplyRecord | None = None
    vote: VoteRecord | None = None
    flagged: bool = False
    blind: bool = False

    def messages(self) -> list[Message]:
        """The message as a model reads it: calls and results of tools first, then the text."""
        return [*map(Message.from_row, self.steps), Message(role=self.role, content=self.content)]


class FlagRecord(Record):
    """A user's report of a message."""

    id: str
    message: str
    category: str
    comment: str
    created: float
    upheld: bool | None = None
    """What an operator said of it."""


class Case(Record):
    """What an operator has not looked at yet: a report of a user's, or a verdict that flags."""

    id: str
    kind: Literal["report", "verdict"]
    text: str
    categories: list[str]
    comment: str = ""
    created: float


class RankingRecord(Record):
    """Replies to one message from best to worst; ids in one group tie."""

    id: str
    parent: str
    order: list[list[str]]
    comment: str
    created: float


class Candidate(Record):
    """What is asked of a model for one side of a comparison; the reply's checkpoint is known once it is written."""

    model: str
    checkpoint: str = ""
    sampling: dict[str, Any] = {}
    seed: int | None = None


class ComparisonRecord(Record):
    """Two replies to one message; who wrote them is told after the vote."""

    id: str
    conversation: str
    parent: str
    a: str | None
    b: str | None
    choice: Choice | None
    comment: str
    created: float
    identities: dict[Side, Candidate] | None = None


class Verdict(Record):
    """What the moderation model said of a text on its way in ("input") or out ("output").

    `message` is the message of the store that was judged; without one, `text` may hold what was judged.
    """

    direction: Literal["input", "output"]
    moderator: str
    flagged: bool
    categories: dict[str, bool] = {}
    scores: dict[str, float] = {}
    message: str | None = None
    text: str | None = None
