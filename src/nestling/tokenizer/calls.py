"""Tool calls as other families write them, read out of the text of a reply (control tokens spelled).

    Hermes, Qwen   <tool_call>{"name": …, "arguments": {…}}</tool_call>
    Mistral        [TOOL_CALLS][{"name": …, "arguments": {…}}, …]   or   [TOOL_CALLS]name[ARGS]{…}
    Llama 3        {"name": …, "parameters": {…}}; …   or, after <|python_tag|>, the same or tool.call(query="…")

What is in none of these forms is text.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Collection, Iterator
from typing import Any

from nestling.core.types import ToolCall
from nestling.tokenizer.special import CALL_END, CALL_START

MISTRAL, PYTHON_TAG = "[TOOL_CALLS]", "<|python_tag|>"
MARKS = (CALL_START, MISTRAL, PYTHON_TAG)
_NAMED = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\][\w-]*)?(?:\[ARGS\])?\s*(?=\{)")


def parse_call(text: str) -> ToolCall | None:
    """The call that stands between <tool_call> and </tool_call>; None where it is no JSON with a name and arguments."""
    try:
        return _call(json.loads(text))
    except (json.JSONDecodeError, RecursionError):
        return None


def may_call(text: str, offered: bool) -> bool:
    """Whether a reply that has come so far may contain a call, or the beginning of one: what is not to be shown yet.

    Args:
        offered: tools are on offer, so JSON alone may be a call.
    """
    if any(mark in text for mark in MARKS):
        return True
    if offered and (not text.strip() or text.lstrip().startswith("{")):
        return True
    return any(text.endswith(mark[:size]) for mark in MARKS for size in range(1, len(mark)))


def read_calls(text: str, offered: Collection[str] = ()) -> tuple[str, tuple[ToolCall, ...]]:
    """(what is said, calls) of a reply; a call that can't be read stays in the text.

    Args:
        offered: names of the tools on offer; JSON that nothing marks as a call is one only when it names one of them.

    >>> read_calls('[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}]')
    ('', (ToolCall(name='add', arguments={'a': 1}),))
    """
    if CALL_START in text:
        return _hermes(text)
    for mark in (MISTRAL, PYTHON_TAG):
        if mark in text:
            said, _, rest = text.partition(mark)
            calls = _mistral(rest) if mark == MISTRAL else _llama(rest) or _python(rest)
            return (said, calls) if calls else (text, ())
    calls = _llama(text)
    return ("", calls) if calls and all(call.name in offered for call in calls) else (text, ())


def _call(data: Any) -> ToolCall | None:
    """A JSON value as a call; Llama 3 says "parameters", and some write the arguments as a text of JSON."""
    if not isinstance(data, dict) or not isinstance(data.get("name"), str):
        return None
    arguments = data.get("arguments", data.get("parameters", {}))
    return ToolCall(name=data["name"], arguments=arguments) if isinstance(arguments, dict) else None


def _hermes(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    calls: list[ToolCall] = []

    def take(match: re.Match[str]) -> str:
        call = parse_call(match[1])
        calls.extend([call] if call else [])
        return "" if call else match[0]

    said = re.sub(rf"\s*{CALL_START}(.*?)(?:{CALL_END}|\Z)", take, text, flags=re.DOTALL)
    return said, tuple(calls)


def _values(text: str) -> Iterator[Any]:
    """JSON values that stand behind each other, blanks and semicolons between them; None for anything else."""
    reader, place = json.JSONDecoder(), 0
    while match := re.compile(r"[\s;]*(?=\S)").match(text, place):
        if match.end() >= len(text):
            return
        try:
            value, place = reader.raw_decode(text, match.end())
        except (json.JSONDecodeError, RecursionError):
            yield None
            return
        yield value


def _llama(text: str) -> tuple[ToolCall, ...]:
    calls = [_call(value) for value in _values(text)]
    return tuple(call for call in calls if call) if all(calls) else ()


def _mistral(text: str) -> tuple[ToolCall, ...]:
    found: list[Any] = []
    for part in text.split(MISTRAL):
        head = _NAMED.match(part)
        values = list(_values(part[head.end() :] if head else part))
        if head:
            found += [{"name": head[1], "arguments": values[0]}]
        else:
            found += values[0] if values and isinstance(values[0], list) else values
    calls = [_call(value) for value in found]
    return tuple(call for call in calls if call) if all(calls) else ()


def _python(text: str) -> tuple[ToolCall, ...]:
    """One call of Llama 3's built-in tools, `brave_search.call(query="…")`: nothing is run, only read."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if not isinstance(node, ast.Call) or node.args:
            return ()
        arguments = {word.arg or "": ast.literal_eval(word.value) for word in node.keywords}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return ()
    return (ToolCall(name=ast.unparse(node.func).removesuffix(".call"), arguments=arguments),)
