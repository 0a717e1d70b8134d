"""Conversations in the form of a model's own chat template: a filled-in template to ids and loss mask.

Control tokens are looked for in what the template wrote, never in what it was given (see `sandbox.py`). Where a format's marks
are plain text, as Llama 2's [INST], no token tells a message from a mark; that is so in every program.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from nestling.core.errors import UserError
from nestling.core.types import Message
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.sandbox import BEGIN, END, SPLIT, ChatTemplate
from nestling.tokenizer.special import THINK_END

Tool = str | Mapping[str, Any]
"""A tool on offer: its name, or OpenAI's tool object."""
Span = tuple[int, int]
_BLANK, _BLANK_END = re.compile(rf"[\s{BEGIN}{END}]*"), re.compile(rf"[\s{BEGIN}{END}]+\Z")
_UNMARKED = str.maketrans(dict.fromkeys((SPLIT, BEGIN, END)))
_FIX = "train on conversations with one reply, or give the model a chat template with {% generation %}"


def tool_name(tool: Tool) -> str:
    """The name of a tool on offer."""
    return tool if isinstance(tool, str) else tool.get("function", tool)["name"]


def render_foreign(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Tool], prompt: bool,
    learnt: int = 0,
) -> tuple[list[int], list[bool]]:  # fmt: skip
    """Ids, and which of them the assistant wrote (its closing token included); in a prompt none is marked.

    Args:
        learnt: replies before this message are not marked.

    Raises:
        UserError: the template is broken or refuses the conversation; or, without `prompt`, nothing tells what the
            assistant wrote.
    """
    rows, offered = template_rows(messages), [_definition(tool) for tool in tools]
    text = template.fill(rows, offered, prompt=prompt)
    if prompt:
        return _to_ids(tokenizer, text, [])
    if template.tells_replies:
        places = [place for place, mark in enumerate(text) if mark in (BEGIN, END)]
        earlier = template.fill(rows[:learnt], offered).count(BEGIN) if learnt else 0
        return _to_ids(tokenizer, text, list(zip(places[::2], places[1::2], strict=False))[earlier:])
    return _to_ids(tokenizer, text, _reply_spans(tokenizer, template, rows, offered, text, learnt))


def after_reply(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Message], answers: Sequence[Message],
    tools: Sequence[Tool],
) -> list[int]:  # fmt: skip
    """What stands between the end of the last of `messages`, a reply with calls, and the next reply: their answers.

    Raises:
        UserError: the template has no form for them.
    """
    rows, offered = template_rows([*messages, *answers]), [_definition(tool) for tool in tools]
    text = template.fill(rows, offered, prompt=True)
    _, end = _reply_span(tokenizer, template, rows, offered, text, len(messages) - 1)
    return _to_ids(tokenizer, text[end:], [], begun=True)[0]


def template_rows(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """OpenAI's shape, arguments as objects; calls are numbered, and answers say which they answer, as some templates ask."""
    rows: list[dict[str, Any]] = []
    open_calls: list[dict[str, str]] = []
    for place, message in enumerate(messages):
        row: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.role == "tool" and open_calls:
            row |= open_calls.pop(0)
        elif message.tool_calls:
            names = [f"call{place:03d}{number:02d}" for number in range(len(message.tool_calls))]
            row["tool_calls"] = [
                {"id": name, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for name, call in zip(names, message.tool_calls, strict=True)
            ]
            open_calls = [{"tool_call_id": n, "name": c.name} for n, c in zip(names, message.tool_calls, strict=True)]
        rows.append(row)
    return rows


def _definition(tool: Tool) -> Mapping[str, Any]:
    """A tool of which only the name is known takes anything."""
    if not isinstance(tool, str):
        return tool
    nothing = {"description": "", "parameters": {"type": "object", "properties": {}}}
    return {"type": "function", "function": {"name": tool, **nothing}}


def _reply_spans(
    tokenizer: Tokenizer, template: ChatTemplate, rows: Sequence[dict[str, Any]], tools: Sequence[Any], text: str,
    learnt: int,
) -> list[Span]:  # fmt: skip
    """Where in a filled-in template each reply from `learnt` on stands, found by filling it in with less."""
    replies = [place for place, row in enumerate(rows) if row["role"] == "assistant" and place >= learnt]
    spans = [_reply_span(tokenizer, template, rows, tools, text, place) for place in replies]
    if any(end > start for (_, end), (start, _) in pairwise(spans)):
        raise UserError("doesn't tell one reply from the next", where="chat template", fix=_FIX)
    return spans


def _reply_span(
    tokenizer: Tokenizer, template: ChatTemplate, rows: Sequence[dict[str, Any]], tools: Sequence[Any], text: str,
    place: int,
) -> Span:  # fmt: skip
    """From the end of the prompt for this reply to the token that closes it.

    Templates drop old thoughts, so the conversation up to this reply need not begin the whole one as it does alone; its
    prompt must.
    """
    prompt = template.fill(rows[:place], tools, prompt=True)
    whole = template.fill(rows[: place + 1], tools)
    if not text.startswith(prompt):
        what = "writes what comes before a reply in another way once the conversation goes on"
        raise UserError(what, where="chat template", fix=_FIX)
    start, is_kept = len(prompt), text.startswith(whole)
    names = {name for name, number in tokenizer.special.items() if number in tokenizer.turn_ends}
    found = template.words.finditer(text, start, len(whole) if is_kept else len(text))
    end = next((match.end() for match in found if match[0] in names), len(whole) if is_kept else start)
    said = template.marked(rows[place]["content"].rpartition(THINK_END)[2].strip())
    if end == start or (said not in text[start:end] and not rows[place].get("tool_calls")):
        raise UserError("leaves out what the assistant says, or where it ends", where="chat template", fix=_FIX)
    return start, end


def _to_ids(
    tokenizer: Tokenizer, text: str, written: Sequence[Span], begun: bool = False
) -> tuple[list[int], list[bool]]:
    """Ids of a filled-in template, and which of them stand for characters within `written`.

    Args:
        begun: the text goes on after other tokens.
    """
    ids: list[int] = []
    mask: list[bool] = []
    for start, end, name in _sections(tokenizer, text):
        if name:
            ids.append(tokenizer.special[name])
            mask.append(any(a <= start < b for a, b in written))
            continue
        section = text[start:end].translate(_UNMARKED)
        within = begun or start > 0
        found = (tokenizer.encode_within if within else tokenizer.encode)(section)
        ids += found
        mask += _mask(tokenizer, text, (start, end), written, within) or [False] * len(found)
    return ids, mask


def _sections(tokenizer: Tokenizer, text: str) -> Iterator[tuple[int, int, str]]:
    """(start, end, name of a control token or "") of all parts of a text; a token may take the blanks beside it."""
    takes = {token["content"]: (token["lstrip"], token["rstrip"]) for token in tokenizer.definition["added_tokens"]}
    assert tokenizer.template is not None
    place = 0
    for match in tokenizer.template.words.finditer(text):
        left, right = takes[match[0]]
        before = text[place : match.start()]
        if kept := len(_BLANK_END.sub("", before) if left else before):
            yield place, place + kept, ""
        yield match.start(), match.end(), match[0]
        place = _BLANK.match(text, match.end()).end() if right else match.end()  # type: ignore[union-attr]
    if place < len(text):
        yield place, len(text), ""


def _mask(tokenizer: Tokenizer, text: str, section: Span, written: Sequence[Span], within: bool) -> list[bool]:
    """Which tokens of a section stand for something written; empty where nothing was."""
    places = [place for place in range(*section) if text[place] not in (SPLIT, BEGIN, END)]
    learnt = [any(a <= place < b for a, b in written) for place in places]
    if not any(learnt):
        return []
    clean = "".join(text[place] for place in places)
    return [any(learnt[start : max(end, start + 1)]) for start, end in tokenizer.spans(clean, within)]
