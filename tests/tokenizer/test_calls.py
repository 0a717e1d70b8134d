"""Tool calls in the forms of other families."""

from __future__ import annotations

import pytest

from nestling.core.types import ToolCall
from nestling.tokenizer.calls import may_call, read_calls

ADD = ToolCall(name="add", arguments={"a": 1})
SEARCH = ToolCall(name="brave_search", arguments={"query": "a; b"})


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ('<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>', "", [ADD]),
        ('So:\n<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>', "So:", [ADD]),
        ('<tool_call>{"name": "add", "arguments": {"a": 1}}', "", [ADD]),
        ('<tool_call>{"name": "add"}</tool_call>\n<tool_call>{oops</tool_call>', "\n<tool_call>{oops</tool_call>",
         [ToolCall(name="add", arguments={})]),
        ('[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}, "id": "123456789"}]', "", [ADD]),
        ('[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}, {"name": "add", "arguments": {"a": 1}}]', "", [ADD, ADD]),
        ('Hm.[TOOL_CALLS]add[ARGS]{"a": 1}', "Hm.", [ADD]),
        ('[TOOL_CALLS]add{"a": 1}[TOOL_CALLS]add[CALL_ID]abc[ARGS]{"a": 1}', "", [ADD, ADD]),
        ("[TOOL_CALLS]nonsense", "[TOOL_CALLS]nonsense", []),
        ("[TOOL_CALLS]", "[TOOL_CALLS]", []),
        ('{"name": "add", "parameters": {"a": 1}}', "", [ADD]),
        ('\n{"name": "add", "parameters": {"a": 1}}; {"name": "add", "parameters": {"a": 1}}', "", [ADD, ADD]),
        ('<|python_tag|>{"name": "other", "parameters": {"a": 1}}', "", [ToolCall(name="other", arguments={"a": 1})]),
        ('<|python_tag|>brave_search.call(query="a; b")', "", [SEARCH]),
        ("<|python_tag|>print(x)", "<|python_tag|>print(x)", []),
        ("<|python_tag|>f(__import__('os'))", "<|python_tag|>f(__import__('os'))", []),
        ('{"name": "other", "parameters": {"a": 1}}', '{"name": "other", "parameters": {"a": 1}}', []),
        ('{"answer": 5}', '{"answer": 5}', []),
        ('{"name": "add", "parameters": {"a": 1}} is how', '{"name": "add", "parameters": {"a": 1}} is how', []),
        ("plain [text] <tool", "plain [text] <tool", []),
        ("", "", []),
        ("[" * 100_000, "[" * 100_000, []),
        ("<|python_tag|>" + "(" * 100_000, "<|python_tag|>" + "(" * 100_000, []),
        ('[TOOL_CALLS][{"name": "add", "arguments": "no object"}]', '[TOOL_CALLS][{"name": "add", "arguments": "no object"}]', []),
    ],
)  # fmt: skip
def test_calls_are_read_and_the_rest_is_text(text: str, said: str, calls: list[ToolCall]) -> None:
    assert read_calls(text, ["add"]) == (said, tuple(calls))


@pytest.mark.parametrize("text", ["[TOOL_CALLS][", "Hm. <tool", "a <", "<|python_tag|>x", "x[TOOL_CALLS]yz"])
def test_what_may_be_a_call_is_held_back(text: str) -> None:
    assert may_call(text, offered=False)


def test_json_is_held_back_where_tools_are_on_offer() -> None:
    assert may_call(' {"name"', offered=True)
    assert may_call("", offered=True)
    assert not may_call('{"name"', offered=False)
    assert not may_call("Hello", offered=True)
