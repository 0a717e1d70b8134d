"""The one conversation renderer: messages to ids and loss mask, used by SFT, RL, evaluation and serving.

    <|im_start|>role\\ncontent<|im_end|>\\n

It gives the ids of the stored chat template in transformers. What it does differently, on purpose: text that spells a
control token stays text here, where the template would let it through; only what an assistant says may begin with a
thought, "<think>…</think>"; and the thoughts of replies before the last question are left out, as clients leave them out of
the history that they send back, and as the templates of models that think do. A model that was made elsewhere has a form of
its own, and its template says it (`foreign.py`); for ours the code here does, which is the same and faster.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import get_args

from nestling.core.config import nearest
from nestling.core.errors import UserError
from nestling.core.types import Message, Role, ToolCall
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.calls import parse_call, read_calls
from nestling.tokenizer.foreign import Tool, after_reply, render_foreign, tool_name
from nestling.tokenizer.special import CALL_END, CALL_START, THINK_END, THINK_START, TURN_END, TURN_START

__all__ = ["Rendered", "between", "opened_by", "parse_call", "parse_reply", "render"]

ASKING = ("system", "user")
"""Whose messages begin a new turn; what the assistant and its tools say after one is one reply."""
_THOUGHT = re.compile(rf"{THINK_START}.*?(?:{THINK_END}\s*|\Z)", re.DOTALL)


@dataclass
class Rendered:
    """A conversation as the model reads it; both lists have the same length.

    For "<|im_start|>assistant\\nHi<|im_end|>\\n" the mask is true on "Hi" and "<|im_end|>" only.
    """

    ids: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    """True where the assistant wrote the token: content, tool calls and the closing <|im_end|>. Of use without `prompt`."""

    def add(self, ids: Sequence[int], written: bool) -> None:
        """Append tokens of one kind."""
        self.ids.extend(ids)
        self.mask.extend([written] * len(ids))


def render(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Tool] = (), *, prompt: bool = False,
    learnt: int = 0,
) -> Rendered:  # fmt: skip
    """Render a conversation; a thought stays only in the last reply.

    Args:
        tools: tools on offer, named in the system turn ("Tools: calculator, search"); a foreign template may say more.
        prompt: end with "<|im_start|>assistant\\n", ready for the model to go on.
        learnt: replies before this message are not marked in the mask.

    Raises:
        UserError: an unknown role, no message, a tokenizer without chat tokens, a foreign template that is broken or
            refuses the conversation or, without `prompt`, doesn't tell what the assistant wrote.
    """
    if not messages:
        raise UserError("a conversation has no message")
    for message in messages:
        if message.role not in get_args(Role):
            raise UserError("unknown role", value=message.role, fix=nearest(str(message.role), get_args(Role)))
    asked = max((place for place, message in enumerate(messages) if message.role in ASKING), default=0)
    messages = [*(_without_thought(tokenizer, message) for message in messages[:asked]), *messages[asked:]]
    if tokenizer.template is not None and not tokenizer.has_own_form:
        return Rendered(*render_foreign(tokenizer, tokenizer.template, messages, tools, prompt, learnt))
    return _render_own(tokenizer, messages, tools, prompt, learnt)


def _render_own(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Tool], prompt: bool, learnt: int
) -> Rendered:
    out = Rendered()
    offer = "Tools: " + ", ".join(map(tool_name, tools)) if tools else ""
    if offer and messages[0].role != "system":
        _turn(tokenizer, out, "system", offer)
    for place, message in enumerate(messages):
        if message.role == "assistant":
            _assistant_turn(tokenizer, out, message, place >= learnt)
        elif offer and place == 0 and message.role == "system":
            _turn(tokenizer, out, "system", "\n\n".join(filter(None, (message.content, offer))))
        else:
            _turn(tokenizer, out, message.role, message.content)
    if prompt:
        out.add([tokenizer.id(TURN_START), *tokenizer.encode("assistant\n")], False)
    return out


def _turn(tokenizer: Tokenizer, out: Rendered, role: str, content: str) -> None:
    """A turn that somebody else wrote."""
    ids = [tokenizer.id(TURN_START), *tokenizer.encode(f"{role}\n{content}"), tokenizer.id(TURN_END)]
    out.add([*ids, *tokenizer.encode("\n")], False)


def _assistant_turn(tokenizer: Tokenizer, out: Rendered, message: Message, learnt: bool) -> None:
    """The assistant's own turn. "assistant\\n" and the content are encoded apart, as they are when it is generated."""
    out.add([tokenizer.id(TURN_START), *tokenizer.encode("assistant\n")], False)
    out.add(reply_ids(tokenizer, message), learnt)
    out.add(tokenizer.encode("\n"), False)


def reply_ids(tokenizer: Tokenizer, message: Message) -> list[int]:
    """What the assistant writes in one turn: content, tool calls, <|im_end|>. Inverse of `parse_reply`."""
    if not tokenizer.has_own_form:
        whole = render(tokenizer, [Message(role="user", content="."), message])
        return [number for number, mine in zip(whole.ids, whole.mask, strict=True) if mine]
    ids = _content_ids(tokenizer, message)
    for call in message.tool_calls:
        name, arguments = (json.dumps(part, ensure_ascii=False) for part in (call.name, call.arguments))
        text = f'{{"name": {name}, "arguments": {arguments}}}'
        ids += [tokenizer.id(CALL_START), *tokenizer.encode(text), tokenizer.id(CALL_END)]
    return [*ids, tokenizer.id(TURN_END)]


def _content_ids(tokenizer: Tokenizer, message: Message) -> list[int]:
    """What is said; a thought at its beginning stands between its control tokens."""
    thought, said = split_thought(tokenizer, message)
    if thought is None:
        return tokenizer.encode(said)
    return [tokenizer.id(THINK_START), *tokenizer.encode(thought), tokenizer.id(THINK_END), *tokenizer.encode(said)]


def split_thought(tokenizer: Tokenizer, message: Message) -> tuple[str | None, str]:
    """The thought at the beginning of what an assistant says, None where there is none, and what is said."""
    content = message.content.lstrip()
    thought, end, said = content.partition(THINK_END)
    may_think = message.role == "assistant" and THINK_START in tokenizer.special
    if not (may_think and end and thought.startswith(THINK_START)):
        return None, content
    return thought.removeprefix(THINK_START), said


def _without_thought(tokenizer: Tokenizer, message: Message) -> Message:
    thought, said = split_thought(tokenizer, message)
    return message if thought is None else message.model_copy(update={"content": said.lstrip()})


def between(
    tokenizer: Tokenizer, prompt: Sequence[Message], reply: Message, answers: Sequence[Message],
    tools: Sequence[Tool] = (),
) -> list[int]:  # fmt: skip
    """What stands between the end of a reply with calls and the next reply: the tools' answers, and its beginning.

    Args:
        prompt: what the reply replies to.

    Raises:
        UserError: a foreign template has no form for answers.
    """
    if tokenizer.template is not None and not tokenizer.has_own_form:
        # A template that opens a thought for each reply knows one that has none as another reply; any will do.
        if opened_by(tokenizer, render(tokenizer, prompt, tools, prompt=True).ids) == THINK_START:
            reply = reply.model_copy(update={"content": f"{THINK_START}.{THINK_END}{reply.content}"})
        return after_reply(tokenizer, tokenizer.template, [*prompt, reply], answers, tools)
    return [*tokenizer.encode("\n"), *render(tokenizer, answers, prompt=True).ids]


def parse_reply(tokenizer: Tokenizer, ids: Sequence[int], tools: Sequence[Tool] = (), opened: str = "") -> Message:
    """Read what the model wrote after "<|im_start|>assistant\\n", up to <|im_end|> or the end of `ids`.

    Thoughts between <think> and </think> are left out, as is a </think> that ends none. A call that is not valid JSON
    with a name and arguments stays in the content, spelled, so that nothing the model wrote is lost silently.

    Args:
        tools: on offer; some foreign forms mark a call by nothing else than a tool's name.
        opened: the control token with which the prompt has already begun the turn, if any (`opened_by`).
    """
    ids = [tokenizer.id(opened), *ids] if opened else ids
    if not tokenizer.has_own_form:
        return _parse_foreign(tokenizer, ids, tools)
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
        elif name == THINK_END and within != CALL_START:
            within = ""
        else:
            (inner if within else content).append(number)
    if within == CALL_START:
        content += [tokenizer.special[CALL_START], *inner]
    return Message(role="assistant", content=tokenizer.decode(content, control=True), tool_calls=tuple(calls))


def opened_by(tokenizer: Tokenizer, prompt: Sequence[int]) -> str:
    """The control token of the call or thought within which a prompt ends; empty for none."""
    marks = {tokenizer.special.get(name): name for name in (CALL_START, CALL_END, THINK_START, THINK_END)}
    marks |= dict.fromkeys(tokenizer.turn_ends, "")
    last = next((marks[id] for id in reversed(prompt) if id in marks), "")
    return last if last in (CALL_START, THINK_START) else ""


def _parse_foreign(tokenizer: Tokenizer, ids: Sequence[int], tools: Sequence[Tool]) -> Message:
    """As `parse_reply`; a template may have opened the thought that the reply ends."""
    end = next((place for place, number in enumerate(ids) if number in tokenizer.turn_ends), len(ids))
    text = tokenizer.decode(ids[:end], control=True)
    if {THINK_START, THINK_END} <= tokenizer.special.keys():
        before, mark, _ = text.partition(THINK_END)
        text = THINK_START + text if mark and THINK_START not in before else text
        text = _THOUGHT.sub("", text).replace(THINK_END, "")
    content, calls = read_calls(text, [tool_name(tool) for tool in tools])
    return Message(role="assistant", content=content.strip(), tool_calls=calls)  # templates put blanks around
