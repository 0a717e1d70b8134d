"""From pieces to deltas: what the streaming reader says is what the parser of whole replies says."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nestling.core.types import Message, ToolCall
from nestling.generation.sequence import Piece, Watch
from nestling.serving.protocol.deltas import Delta, Reader
from nestling.tokenizer.conversation import parse_reply, reply_ids
from nestling.tokenizer.special import CALL_END, CALL_START, THINK_END, THINK_START, TURN_END

CONTROL = (CALL_START, CALL_END, THINK_START, THINK_END)
WHOLE, TURNED = '{"name": "f", "arguments": {"a": "}"}}', '{"arguments": {}, "name": "g"}'
PARTS = (*CONTROL, WHOLE, TURNED, '{"name": 1}', "two", "{")


def pieces(tokenizer, ids: list[int]) -> Iterator[list[Piece]]:
    """What the engine's watch releases after each token."""
    watch = Watch(tokenizer, ())
    for id in ids:
        watch.push(id)
        yield watch.take()


def read(tokenizer, ids: list[int]) -> list[Delta]:
    reader = Reader()
    deltas = [delta for some in pieces(tokenizer, ids) for delta in reader.read(some)]
    return [*deltas, *reader.end()]


def collected(deltas: list[Delta]) -> tuple[str, list[tuple[str, str]]]:
    """Text and calls."""
    text, calls = "", []
    for delta in deltas:
        match delta.kind:
            case "text":
                text += delta.text
            case "call":
                calls.append((delta.name, ""))
            case "arguments":
                calls[delta.index] = (calls[delta.index][0], calls[delta.index][1] + delta.text)
    return text, calls


values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=8),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
                      max_leaves=6)  # fmt: skip
arguments = st.dictionaries(st.text(max_size=5), values, max_size=3)
calls = st.builds(ToolCall, name=st.text(min_size=1, max_size=8), arguments=arguments)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(content=st.text(max_size=12), made=st.lists(calls, max_size=3))
def test_what_a_model_is_taught_reads_back(tokenizer, content, made):
    """Any text followed by any calls, as training writes them: the text, the names, the very JSON of the arguments."""
    ids = reply_ids(tokenizer, Message(role="assistant", content=content, tool_calls=tuple(made)))
    text, told = collected(read(tokenizer, ids))
    assert text == content.lstrip()
    assert [(name, json.loads(arguments)) for name, arguments in told] == [(call.name, call.arguments) for call in made]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(parts=st.lists(st.sampled_from(PARTS), max_size=8))
def test_anything_reads_as_the_parser_reads_it(tokenizer, parts):
    """Control tokens in any order, JSON whole, broken or turned round: text and calls agree with `parse_reply`."""
    ids = [id for part in parts for id in ([tokenizer.id(part)] if part in CONTROL else tokenizer.encode(part))]
    ids.append(tokenizer.id(TURN_END))
    text, told = collected(read(tokenizer, ids))
    whole = parse_reply(tokenizer, ids)
    taken = [(call.name, call.arguments) for call in whole.tool_calls]
    if len(told) == len(taken):
        assert [(name, json.loads(arguments)) for name, arguments in told] == taken
        assert text == whole.content
    else:  # the arguments of what turned out to be no call were already told; the parser makes it text
        left = iter([(name, arguments) for name, arguments in told])
        assert all(any((name, json.loads(text)) == call for name, text in left) for call in taken)
        assert CALL_START in whole.content


def test_arguments_are_told_as_they_come(tokenizer):
    """Not held back to the end, and nothing beyond the object is told."""
    call = ToolCall(name="f", arguments={"text": 'a "quoted" } brace \\ and {more}'})
    ids = reply_ids(tokenizer, Message(role="assistant", tool_calls=(call,)))
    parts = [delta.text for delta in read(tokenizer, ids) if delta.kind == "arguments"]
    assert len(parts) > 8
    assert json.loads("".join(parts)) == call.arguments


@pytest.mark.parametrize("count", [1, 2, 5])
def test_neighbours_are_joined(tokenizer, count):
    """Pieces that come together make one delta."""
    reader = Reader()
    assert reader.read([Piece("a")] * count) == [Delta("text", "a" * count)]
