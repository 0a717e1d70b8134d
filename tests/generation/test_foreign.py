"""Replies in the forms of other families: where they end, their tool calls, their streams. What is written is scripted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from families import FORMS, make
from toys.models import random_model

from nestling.core.types import Conversation, Message, PromptRow, ToolCall
from nestling.generation.chat import offered, prompt_ids, replies
from nestling.generation.engine import Engine
from nestling.generation.listening import Listener
from nestling.generation.sampling import Sampling
from nestling.generation.sequence import Piece, Request
from nestling.generation.session import ChatSession, Event
from nestling.objectives._episodes import collect
from nestling.stages._training import told
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.conversation import render, reply_ids
from nestling.tools import schema

CALL = ToolCall(name="calculator", arguments={"expression": "12 + 3"})
ASK = (Message(role="user", content="What is 12 + 3?"),)
CALLING, SAID = Message(role="assistant", tool_calls=(CALL,)), Message(role="assistant", content="It is 15.")
ROW = PromptRow(prompt=ASK, meta={"tools": ["calculator"]})


def writes(ids: list[int], **changes: object) -> Sampling:
    return Sampling(strategy="toys.scripted", options={"ids": ids}, **{"max_tokens": 300, **changes})


@pytest.fixture(scope="module", params=["qwen", "llama3", "mistral", "llama2", "gemma"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Engine]:
    tokenizer = Tokenizer.load(make(tmp_path_factory.mktemp("family"), FORMS[request.param]))
    return request.param, Engine(random_model(tokenizer.vocab_size, context=1024), tokenizer, rows=2)


def test_a_reply_ends_with_the_familys_token(family: tuple[str, Engine]) -> None:
    _, engine = family
    tokenizer = engine.tokenizer
    [episode] = collect(engine, tokenizer, [PromptRow(prompt=ASK)], writes(reply_ids(tokenizer, SAID)), 0)
    assert episode.ended
    assert episode.reply[-1] == tokenizer.turn_end
    assert episode.prompt + episode.reply == render(tokenizer, [*ASK, SAID]).ids[: len(episode.prompt + episode.reply)]
    assert episode.text.strip() == "It is 15."
    for stop in tokenizer.stop_ids:
        done = replies(engine, [PromptRow(prompt=ASK)], writes([*tokenizer.encode("a"), stop]), 0)[0].completion
        assert (done.ids[-1], done.finish) == (stop, "stop")


def test_calls_are_answered_in_the_familys_form(family: tuple[str, Engine]) -> None:
    name, engine = family
    tokenizer = engine.tokenizer
    if name in ("llama2", "gemma"):  # their templates know no tools: nothing is offered and nothing run
        reply = replies(engine, [ROW], writes(reply_ids(tokenizer, SAID)), 0)[0]
        assert [m.content.strip() for m in reply.messages] == ["It is 15."]
        return
    script = [*reply_ids(tokenizer, CALLING), *reply_ids(tokenizer, SAID)]
    reply = replies(engine, [ROW], writes(script), 0)[0]
    calling, result, last = reply.messages
    assert (calling.tool_calls, result.content, last.content.strip()) == ((CALL,), "15", "It is 15.")
    if name != "qwen":  # whose template writes a call otherwise once it was answered: without the empty thought
        tools = offered(tokenizer, ["calculator"])
        whole = render(tokenizer, [*ASK, CALLING, result, SAID], tools).ids
        prompt = render(tokenizer, ASK, tools, prompt=True).ids
        assert prompt + reply.completion.ids == whole[: len(prompt + reply.completion.ids)]


def test_names_and_definitions_of_tools_come_to_the_same(family: tuple[str, Engine]) -> None:
    """In what is learnt, in what is asked, and in what is answered."""
    _, engine = family
    tokenizer = engine.tokenizer
    prompt = prompt_ids(tokenizer, ASK, ["calculator"])
    named = Conversation(messages=(*ASK, SAID), tools=("calculator",))
    for row in told([named, named.offering([schema("calculator")])], tokenizer):
        assert render(tokenizer, row.messages[:1], row.tools, prompt=True).ids == prompt
    script = [*reply_ids(tokenizer, CALLING), *reply_ids(tokenizer, SAID)] if tokenizer.takes_tools else reply_ids(tokenizer, SAID)
    rows = [ROW, ROW.offering([schema("calculator")])]
    by_name, by_definition = (replies(engine, [row], writes(script), 0)[0] for row in rows)
    assert by_name.completion.ids == by_definition.completion.ids
    assert by_name.messages == by_definition.messages


def test_who_streams_sees_calls_and_results(family: tuple[str, Engine]) -> None:
    name, engine = family
    tokenizer = engine.tokenizer
    tools = () if name in ("llama2", "gemma") else ("calculator",)
    script = [*(reply_ids(tokenizer, CALLING) if tools else []), *reply_ids(tokenizer, SAID)]
    session = ChatSession(engine, tools=("calculator",), sampling=writes(script))
    events = [event for event in session.say(ASK[0].content) if event.kind != "thought"]
    text = "".join(event.text for event in events if event.kind == "text")
    assert text.rstrip() == "It is 15."
    found = [event.kind for event in events if event.kind != "text"]
    assert found == (["call", "result"] if tools else [])
    if tools:
        assert Event("result", "15") in events
        assert [message.role for message in session.history] == ["user", "assistant", "tool", "assistant"]
        assert session.history[1].tool_calls == (CALL,)


THOUGHT = 'hm, {"name": "calculator"'
END = "<|im_start|>assistant\\n' }}{%- endif %}"
OPENING = FORMS["qwen"]["template"].replace(END, END.replace("assistant\\n", "assistant\\n<think>\\n"))


def test_a_thought_that_the_template_opened_is_a_thought(tmp_path: Path) -> None:
    """Shown as one, whole or cut, before a call and after its result; what looks like a call in it is none."""
    assert FORMS["qwen"]["template"] != OPENING
    tokenizer = Tokenizer.load(make(tmp_path, {**FORMS["qwen"], "template": OPENING}))
    engine = Engine(random_model(tokenizer.vocab_size, context=1024), tokenizer, rows=2)
    end, done = tokenizer.turn_end, tokenizer.special["</think>"]
    thought, call = tokenizer.encode(THOUGHT), [n for n in reply_ids(tokenizer, CALLING) if n != end]
    call = call[call.index(tokenizer.special["<tool_call>"]) :]
    script = [*thought, done, *call, end, *thought, done, *tokenizer.encode("It is 15."), end]
    session = ChatSession(engine, tools=("calculator",), sampling=writes(script))
    events = list(session.say(ASK[0].content))
    kinds = [event.kind for n, event in enumerate(events) if n == 0 or event.kind != events[n - 1].kind]
    assert kinds == ["thought", "call", "result", "thought", "text"]
    assert [event.text.strip() for event in events if event.kind == "thought"] == [THOUGHT, THOUGHT]
    assert "".join(event.text for event in events if event.kind == "text") == "It is 15."
    assert [message.content for message in session.history[1:]] == ["", "15", "It is 15."]
    cut = ChatSession(engine, tools=("calculator",), sampling=writes(thought, max_tokens=len(thought)))
    assert list(cut.say("Well?")) == [Event("thought", THOUGHT)]
    assert cut.history[-1].content == ""


def test_the_model_reads_definitions_where_it_is_not_ours(family: tuple[str, Engine]) -> None:
    name, engine = family
    assert offered(engine.tokenizer, ["calculator", "elsewhere"]) == [schema("calculator"), "elsewhere"]
    ids = render(engine.tokenizer, ASK, offered(engine.tokenizer, ["calculator"]), prompt=True).ids
    told = schema("calculator")["function"]["description"] in engine.tokenizer.decode(ids)
    assert told == (name not in ("llama2", "gemma"))


def listen(tokenizer: Tokenizer, *texts: str, tools: tuple[str, ...] = ("add",)) -> list[str]:
    """What a listener tells after each piece; the last entry at the end."""
    listener = Listener(tokenizer, tools)
    told = [listener.read([Piece(text)]) for text in texts] + [listener.end()]
    return ["".join(piece.text for piece in pieces) for pieces in told]


def test_a_listener_holds_back_no_more_than_it_must(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(make(tmp_path, FORMS["llama3"]))
    assert listen(tokenizer, " \n", " Hello", " {", tools=()) == ["", "Hello", " {", ""]
    assert listen(tokenizer, "Hello", " {", "x") == ["Hello", " {", "x", ""]
    assert listen(tokenizer, "a <", "b") == ["", "a <b", ""]
    assert listen(tokenizer, "{", '"b": 1}') == ["", "", '{"b": 1}']
    assert listen(tokenizer, "{", '"b": 1}', tools=()) == ["{", '"b": 1}', ""]
    call = '<tool_call>{"name": "add", "arguments": {"x": 1}}</tool_call>'
    assert listen(tokenizer, '{"name": "add", ', '"parameters": {"x": 1}}') == ["", "", call]
    assert listen(tokenizer, "So ", call[:9], call[9:]) == ["So ", "", "", call]


def test_a_text_is_gone_on_with_where_it_stands(family: tuple[str, Engine]) -> None:
    """The space that a tokenizer puts before a text belongs to no text; one inside a text does."""
    _, engine = family
    tokenizer = engine.tokenizer
    whole = tokenizer.encode("the fox over")
    prompt, rest = [tokenizer.start_of_text, *whole[:-4]], whole[-4:]
    texts = [engine.generate([Request(prompt, writes(rest, max_tokens=4))])[0].text]
    texts.append("".join(engine.stream(Request(prompt, writes(rest, max_tokens=4)))))
    for text in texts:
        assert tokenizer.decode(prompt) + text == "the fox over"
    fresh = engine.generate([Request(prompt[:1], writes(whole, max_tokens=len(whole)))])[0].text
    assert fresh == "the fox over"


def test_a_listener_keeps_tokens_with_their_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(make(tmp_path, FORMS["llama3"]))
    pieces = [Piece("{", token=5), Piece("}", token=6)]
    listener = Listener(tokenizer, ["add"])
    assert [*listener.listen(pieces)] == pieces


@pytest.mark.parametrize(
    ("constraint", "form"),
    [
        ({"choice": ["yes please", "no"]}, r"yes please|no"),
        ({"regex": "[0-9]{3}-[a-z]{4}"}, r"[0-9]{3}-[a-z]{4}"),
        ({"json_schema": {"type": "object", "properties": {"a": {"enum": ["red", "blue"]}}, "required": ["a"],
                          "additionalProperties": False}}, r'\{"a": ?"(red|blue)"\}'),
    ],
)  # fmt: skip
def test_constraints_hold_whatever_the_pieces(family: tuple[str, Engine], constraint: dict, form: str) -> None:
    """SentencePiece's models put a space before a text, but not inside one."""
    _, engine = family
    ids = render(engine.tokenizer, ASK, prompt=True).ids
    for seed in range(3):
        done = engine.generate([Request(ids, Sampling(max_tokens=60, constraint=constraint), seed)])[0]
        assert re.fullmatch(form, done.text), done.text


def test_nothing_is_banned_in_a_foreign_form(family: tuple[str, Engine]) -> None:
    """Greedy text must be that of transformers; a checkpoint of our own never begins a turn by itself."""
    assert family[1]._banned is None
