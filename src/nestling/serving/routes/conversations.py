"""Conversations of the page, as JSON under /api/: a tree of messages, replies as streams, and what people say of them.

    conversation  {id, title, system, tools, model, sampling, tip, created, updated}
    message       {id, conversation, parent, role: "user" | "assistant", content, thinking, steps, created,
                   forgotten, finish, reply, vote, flagged, blind}
    reply         {model, checkpoint, sampling, seed, prompt_tokens, completion_tokens, finish, seconds,
                   first_token_seconds, system, tools, forgotten}

Messages form a tree: `parent` is the message before, null at the start, and messages with one parent are variants of each
other (an edited question, a regenerated answer). `tip` is the leaf that the person looks at. `steps` are the OpenAI messages
before the final text: calls of tools and their results. `forgotten` messages at the start had no room in the model's context
and were not read. `flagged`: a user reported it, or the moderation model objects to it. `blind` is true while the reply takes
part in an undecided comparison; `reply` is then null. `vote` is {value, reason, comment} or null. Times are Unix seconds.
Each row belongs to the API key that wrote it (all rows to the same person where the server has no keys). Errors have
OpenAI's shape: 404 for an unknown id, 400 for a wrong body, 409 for a vote on a comparison that is decided, 503 where the
server has no store.

    GET    /api/conversations?search=&limit=50&after=    {data: [conversation + snippet], next: cursor or null}, newest first
    POST   /api/conversations                            {title?, system?, tools?, model?, sampling?} → 201 conversation
    GET    /api/conversations/{id}                       conversation + {messages: [message], comparisons, rankings},
                                                         parents before children, variants by age
    PATCH  /api/conversations/{id}                       {title?, system?, tools?, model?, sampling?, tip?} → conversation
    DELETE /api/conversations/{id}                       204; its messages, votes, flags, rankings, comparisons go too
    POST   /api/conversations/{id}/messages              {content, parent?} → 201 user message; parent defaults to the tip;
                                                         edit and resend = the parent of the edited message (null: the start)
    POST   /api/conversations/{id}/reply                 {parent?, model?, sampling?, tools?, reasoning_effort?} → events;
                                                         regenerate = the same parent (a user message) again
    GET    /api/messages/{id}/tokens                     {data: [{text, logprob, top: [{text, logprob}]}]}

    PUT    /api/messages/{id}/vote                       {value: 1 | -1, reason?, comment?} → vote; again replaces it
    DELETE /api/messages/{id}/vote                       204
    POST   /api/messages/{id}/flags                      {category, comment?} → 201 flag: a user's report
    GET    /api/flags                                    {data: [flag]}, own reports, newest first
    DELETE /api/flags/{id}                               204, withdrawn
    POST   /api/conversations/{id}/rankings              {order: [[best ids], …, [worst ids]], comment?} → 201 ranking;
                                                         2 to 9 replies to one message, ids in one group tie
    GET    /api/arena                                    {data: [{model, rating, low, high, games, wins, ties, losses}],
                                                         votes, undecided, same_model, both_bad}
    POST   /api/conversations/{id}/comparisons           {parent?, candidates: [{model, sampling?}, same again]}
                                                         or {replies: [id, id]} → 201 comparison; who is a and b is drawn
    GET    /api/comparisons/{id}                         comparison {id, conversation, parent, a, b, choice, comment,
                                                         identities}: a and b are message ids, null until they are written
    POST   /api/comparisons/{id}/reply/{side}            → events, as of /reply; side is a or b, both may run at once
    PUT    /api/comparisons/{id}/vote                    {choice: "a" | "b" | "tie" | "both_bad", comment?} → comparison,
                                                         now with identities {a: {model, checkpoint, sampling}, b: …}
    POST   /api/render                                   {texts: [Markdown]} → {data: [sanitised HTML]}
    GET    /api/feedback/stats                           {conversations, messages, replies, up, down, flags, comparisons, …}

Events of a reply are server-sent: each `data:` line is one JSON object, the last one is `[DONE]`.

    {"type": "start", "parent": id, "model": name or null where blind, "forgotten": messages left out of the context}
    {"type": "text", "text": "Hel", "tokens": [{text, logprob, top: [{text, logprob}]}]}
    {"type": "thinking", "text": …}    {"type": "call", "name", "arguments": JSON text}    {"type": "result", "text": …}
    {"type": "html", "html": the text so far (since the last call) as sanitised HTML}; now and then
    {"type": "done", "message": message, "html": of its content}    or    {"error": {message, type, code, param}}

A client that goes away, or presses stop, ends the reply: what was written by then is stored with finish "cancelled". A
reply is stored before "done" is sent: what a client has seen acknowledged survives a crash.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from nestling.serving.protocol.messages import Wire
from nestling.serving.routes._opened import OpenStore
from nestling.serving.routes._replying import PageSampling, ReplyRequest, begin, tell, wish_for
from nestling.serving.store.records import (
    ComparisonRecord,
    ConversationChanges,
    ConversationPage,
    ConversationRecord,
    MessageRecord,
    RankingRecord,
    Record,
    TokenRecord,
)

router = APIRouter(prefix="/api", tags=["conversations"])


class ConversationBody(ConversationChanges):
    """A new conversation, or what changes in one."""

    sampling: PageSampling = PageSampling()  # type: ignore[assignment]

    def changes(self) -> ConversationChanges:
        """What was given, as the store takes it."""
        return ConversationChanges(**self.model_dump(exclude_unset=True))


class WholeConversation(ConversationRecord):
    """A conversation with all its messages and what was said of several at once."""

    messages: list[MessageRecord]
    comparisons: list[ComparisonRecord]
    rankings: list[RankingRecord]


class Ask(Wire):
    """A user's message."""

    content: str
    parent: str | None = None


class TokenList(Record):
    """The tokens of a reply."""

    data: list[TokenRecord]


@router.get("/conversations")
def list_conversations(
    store: OpenStore,
    search: Annotated[str, Query(max_length=1000)] = "",
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    after: str | None = None,
) -> ConversationPage:
    """Conversations, the latest first; with `search`, those that hold these words."""
    return store.conversations.page(search, limit, after)


@router.post("/conversations", status_code=201)
def create_conversation(store: OpenStore, body: ConversationBody) -> ConversationRecord:
    """Begin a conversation."""
    return store.conversations.create(body.changes())


@router.get("/conversations/{id}")
def get_conversation(store: OpenStore, id: str) -> WholeConversation:
    """A conversation with all its messages."""
    found = store.conversations.get(id)
    return WholeConversation(
        **dict(found),
        messages=store.conversations.messages(id),
        comparisons=store.arena.of(id),
        rankings=store.feedback.rankings(id),
    )


@router.patch("/conversations/{id}")
def change_conversation(store: OpenStore, id: str, body: ConversationBody) -> ConversationRecord:
    """Rename a conversation, or change how it is answered from now on."""
    return store.conversations.change(id, body.changes())


@router.delete("/conversations/{id}", status_code=204)
def delete_conversation(store: OpenStore, id: str) -> None:
    """Delete a conversation with all feedback on it."""
    store.conversations.delete(id)


@router.post("/conversations/{id}/messages", status_code=201)
def ask(store: OpenStore, id: str, body: Ask) -> MessageRecord:
    """Add a user's message; one beside another is an edit of it."""
    parent = body.parent
    if "parent" not in body.model_fields_set:
        tip = store.conversations.path(id, store.conversations.get(id).tip)[-1:]
        parent = next((one.id if one.role == "assistant" else one.parent for one in tip), None)
    return store.conversations.ask(id, body.content, parent)


@router.post("/conversations/{id}/reply")
async def reply(request: Request, store: OpenStore, id: str, body: ReplyRequest) -> Response:
    """Answer a user's message, told as server-sent events; once more gives a variant."""
    wanted = await wish_for(request, store, id, body)
    parent = wanted.path[-1].id
    begun = await begin(request, store, wanted)
    return tell(request, store, begun, lambda written: store.conversations.answer(id, parent, written))


@router.get("/messages/{id}/tokens")
def list_tokens(store: OpenStore, id: str) -> TokenList:
    """The tokens of a reply with their probabilities and alternatives."""
    return TokenList(data=store.conversations.tokens(id))
