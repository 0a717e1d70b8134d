"""Messages in, messages out: prompts rendered, tool calls answered on the way, replies parsed.

A reply with a tool call is one token sequence. When the model has written <tool_call>{json}</tool_call><|im_end|>, the
tool's result and a new assistant header are forced behind it, and the model goes on:

    12 + 3 is <tool_call>{"name": "calculator", …}</tool_call><|im_end|>        sampled
    \\n<|im_start|>tool\\n15<|im_end|>\\n<|im_start|>assistant\\n                  forced
    12 + 3 = 15.<|im_end|>                                                      sampled
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nestling import tools as toolbox
from nestling.core import registry
from nestling.core.errors import UserError
from nestling.core.runtime import stream_seed
from nestling.core.types import Message, PromptRow, ToolCall
from nestling.generation.engine import Engine
from nestling.generation.sampling import Sampling
from nestling.generation.sequence import Completion, Request
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.conversation import between, opened_by, parse_reply, render
from nestling.tokenizer.foreign import Tool, tool_name
from nestling.tokenizer.special import CALL_START

MAX_ROUNDS = 4
Run = Callable[[str, Mapping[str, Any]], str]
"""Answers a call, given a tool's name and its arguments: `tools.run`, or that of a `Toolbox` with settings of its own."""
MALFORMED = 'error: the call is not valid; write {"name": "…", "arguments": {…}}'


@dataclass(frozen=True)
class Reply:
    """The answer to one prompt.

    With a tool: messages = (assistant with tool_calls, tool with the result, assistant with the final text).
    """

    messages: tuple[Message, ...]
    text: str
    """Content of the last assistant message."""
    completion: Completion


def replies(
    engine: Engine, rows: Sequence[PromptRow], sampling: Sampling, seed: int, max_rounds: int = MAX_ROUNDS,
    run: Run = toolbox.run, first: int = 0,
) -> list[Reply]:  # fmt: skip
    """Answer all prompts in one batch; row i has its own random stream, derived from (seed, first + i).

    Args:
        rows: the prompts, each with the tools that it offers; a call is run and the model goes on with the result.
        max_rounds: tool rounds per reply; a further call ends the reply.
        run: answers calls; the batch waits for it.
        first: number of the first row, where these are only some of the rows that are answered.

    Raises:
        UserError: a prompt longer than the context, a tokenizer without chat tokens.
    """
    loops = [ToolLoop(engine.tokenizer, row.tools, max_rounds, run) for row in rows]
    requests = [
        ask(engine.tokenizer, row.prompt, sampling, stream_seed(seed, "reply", i), loop)
        for i, (row, loop) in enumerate(zip(rows, loops, strict=True), first)
    ]
    completions = engine.generate(requests)
    return [loop.reply(completion, sampling) for loop, completion in zip(loops, completions, strict=True)]


def ask(tokenizer: Tokenizer, prompt: Sequence[Message], sampling: Sampling, seed: int, loop: ToolLoop) -> Request:
    """The request that makes a model answer `prompt`, its tool calls served by `loop`."""
    ids = prompt_ids(tokenizer, prompt, loop.tools)
    loop.prompt, loop.begun = tuple(prompt), ids
    return Request(ids, sampling, seed, interject=loop if loop.tools else None)


def prompt_ids(tokenizer: Tokenizer, prompt: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
    """The ids that a model goes on from.

    Raises:
        UserError: as `render`.
    """
    return render(tokenizer, prompt, offered(tokenizer, tools), prompt=True).ids


def offered(tokenizer: Tokenizer, tools: Sequence[Tool]) -> Sequence[Tool]:
    """What a model is told of tools: ours know them by name, others read their definitions."""
    if tokenizer.has_own_form:
        return tools
    known = registry.names("tools")
    return [toolbox.schema(tool) if isinstance(tool, str) and tool in known else tool for tool in tools]


class ToolLoop:
    """Serves the tool calls of one reply, as the `interject` of its request."""

    def __init__(
        self, tokenizer: Tokenizer, tools: Sequence[Tool] = (), max_rounds: int = MAX_ROUNDS, run: Run = toolbox.run
    ) -> None:
        self.tools, self._answer = tuple(tools) if tokenizer.takes_tools else (), run
        self.prompt: tuple[Message, ...] = ()
        self.begun: Sequence[int] = ()
        """The prompt's messages and its ids, in which a template may have begun the reply."""
        self.messages: list[Message] = []
        """Assistant turns with calls and their tool turns, so far."""
        self._tokenizer, self._rounds = tokenizer, max_rounds
        self._ends = tokenizer.turn_ends
        self._starts = [0]  # where each assistant turn begins in the continuation
        self._turns: list[int] = []  # how many messages each round added

    def __call__(self, ids: list[int]) -> list[int] | None:
        """At the end of a turn with calls: run them and force their results."""
        if ids[-1] not in self._ends or len(self._turns) >= self._rounds:
            return None
        message = self._last(ids)
        results = [self._run(call) for call in message.tool_calls]
        begun = ids[self._starts[-1] :].count(self._tokenizer.special.get(CALL_START, -1))
        results += [MALFORMED] * (begun - len(results))
        if not results:
            return None
        answers = [Message(role="tool", content=result) for result in results]
        try:
            said = (*self.prompt, *self.messages)
            forced = between(self._tokenizer, said, message, answers, offered(self._tokenizer, self.tools))
        except UserError:  # the model's template has no form for answers: the calls are where the reply ends
            return None
        self.messages += [message, *answers]
        self._turns.append(1 + len(answers))
        self._starts.append(len(ids) + len(forced))
        return forced

    def reply(self, completion: Completion, sampling: Sampling) -> Reply:
        """All messages of the finished reply."""
        if len(completion.ids) < self._starts[-1]:  # the last results did not fit into the context
            self._starts.pop()
            del self.messages[-self._turns.pop() :]
        last = self._last(completion.ids)
        text = _before(last.content, sampling.stop)
        last = Message(role="assistant", content=text, tool_calls=last.tool_calls)
        return Reply((*self.messages, last), text, completion)

    def _last(self, ids: list[int]) -> Message:
        """The last turn of a continuation."""
        start = self._starts[-1]
        opened = opened_by(self._tokenizer, [*self.begun, *ids[:start]])
        return parse_reply(self._tokenizer, ids[start:], self.tools, opened)

    def _run(self, call: ToolCall) -> str:
        names = [tool_name(tool) for tool in self.tools]
        if call.name not in names:
            return f"error: no tool {call.name!r} on offer; there is {', '.join(names)}"
        return self._answer(call.name, call.arguments)


def _before(text: str, stops: Sequence[str]) -> str:
    """The text up to the first stop text."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]
