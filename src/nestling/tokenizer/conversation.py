"""The one conversation renderer: messages to ids and loss mask, used by SFT, RL, evaluation and serving.

    <|im_start|>role\\ncontent<|im_end|>\\n

It gives the ids of the stored chat template in transformers. What it does differently, on purpose: text that spells a
control token stays text here, where the template would let it through.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from nestling.core.config import nearest
from nestling.core.errors import UserError
from nestling.core.types import Message, Role, ToolCall
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.special import CALL_END, CALL_START, THINK_END, THINK_START, TURN_END, TURN_START
from nestling.tokenizer.template import CHAT_TEMPLATE

__all__ = ["CHAT_TEMPLATE", "Rendered", "parse_call", "parse_reply", "render"]

Tool = str | Mapping[str, Any]
"""A tool on offer: its name, or OpenAI's tool object, of which the name is used."""


@dataclass
class Rendered:
    """A conversation as the model reads it; both lists have the same length.

    For "<|im_start|>assistant\\nHi<|im_end|>\\n" the mask is true on "Hi" and "<|im_end|>" only.
    """

    ids: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    """True where the assistant wrote the token: content, tool calls and the closing <|im_end|>."""

    def add(self, ids: Sequence[int], written: bool) -> None:
        """Append tokens of one kind."""
        self.ids.extend(ids)
        self.mask.extend([written] * len(ids))


def render(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Tool] = (), *, prompt: bool = False
) -> Rendered:
    """Render a conversation.

    Args:
        tools: tools on offer, named in the system turn ("Tools: calculator, search").
        prompt: end with "<|im_start|>assistant\\n", ready for the model to go on.

    Raises:
        UserError: an unknown role, no message, or a tokenizer without chat tokens.
    """
    if not messages:
        raise UserError("a conversation has no message")
    out = Rendered()
    offer = "Tools: " + ", ".join(map(_tool_name, tools)) if tools else ""
    if offer and messages[0].role != "system":
        _turn(tokenizer, out, "system", offer)
    for place, message in enumerate(messages):
        if message.role not in get_args(Role):
            raise UserError("unknown role", value=message.role, fix=nearest(str(message.role), get_args(Role)))
        if message.role == "assistant":
            _assistant_turn(tokenizer, out, message)
        elif offer and place == 0 and message.role == "system":
            _turn(tokenizer, out, "system", "\n\n".join(filter(None, (message.content, offer))))
        else:
            _turn(tokenizer, out, message.role, message.content)
    if prompt:
        out.add([tokenizer.id(TURN_START), *tokenizer.encode("assistant\n")], False)
    return out


def _tool_name(tool: Tool) -> str:
    return tool if isinstance(tool, str) else tool.get("function", tool)["name"]


def _turn(tokenizer: Tokenizer, out: Rendered, role: str, content: str) -> None:
    """A turn that somebody else wrote."""
    ids = [tokenizer.id(TURN_START), *tokenizer.encode(f"{role}\n{content}"), tokenizer.id(TURN_END)]
    out.add([*ids, *tokenizer.encode("\n")], False)


def _assistant_turn(tokenizer: Tokenizer, out: Rendered, message: Message) -> None:
    """The assistant's own turn. "assistant\\n" and the content are encoded apart, as they are when it is generated."""
    out.add([tokenizer.id(TURN_START), *tokenizer.encode("assistant\n")], False)
    out.add(reply_ids(tokenizer, message), True)
    out.add(tokenizer.encode("\n"), False)


def reply_ids(tokenizer: Tokenizer, message: Message) -> list[int]:
    """What the assistant writes in one turn: content, tool calls, <|im_end|>. Inverse of `parse_reply`."""
    ids = tokenizer.encode(message.content.lstrip())
    for call in message.tool_calls:
        name, arguments = (json.dumps(part, ensure_ascii=False) for part in (call.name, call.arguments))
        text = f'{{"name": {name}, "arguments": {arguments}}}'
        ids += [tokenizer.id(CALL_START), *tokenizer.encode(text), tokenizer.id(CALL_END)]
    return [*ids, tokenizer.id(TURN_END)]


def parse_reply(tokenizer: Tokenizer, ids: Iterable[int]) -> Message:
    """Read what the model wrote after "<|im_start|>assistant\\n", up to <|im_end|> or the end of `ids`.

    Thoughts between <think> and </think> are left out. A call that is not valid JSON with a name and arguments stays
    in the content, spelled, so that nothing the model wrote is lost silently.
    """
    control = {tokenizer.special[name]: name for name in tokenizer.special}
    content: list[int] = []
    inner: list[int] = []
    calls: list[ToolCall] = []
    within = ""
    for number in ids:
        name = control.get(number)
        if name == TURN_END:
            break
        if name in (CALL_START, THINK_START) and not within:
            within, inner = name, []
        elif (within, name) == (CALL_START, CALL_END):
            call = parse_call(tokenizer.decode(inner))
            calls += [call] if call else []
            content += [] if call else [tokenizer.special[CALL_START], *inner, number]
            within = ""
        elif (within, name) == (THINK_START, THINK_END):
            within = ""
        else:
            (inner if within else content).append(number)
    if within == CALL_START:
        content += [tokenizer.special[CALL_START], *inner]
    return Message(role="assistant", content=tokenizer.decode(content, control=True), tool_calls=tuple(calls))


def parse_call(text: str) -> ToolCall | None:
    """The call that stands between <tool_call> and </tool_call>; None where it is no JSON with a name and arguments."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError:
        return None
    if not isinstance(data, dict) or not isinstance(data.get("name"), str):
        return None
    arguments = data.get("arguments", {})
    return ToolCall(name=data["name"], arguments=arguments) if isinstance(arguments, dict) else None
