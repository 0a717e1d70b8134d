"""Replies with tools, and sessions; what the model writes is scripted, everything else is real."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from toys.models import random_model

from nestling.cli.chat import ChatOptions, run_chat
from nestling.core.errors import UserError
from nestling.core.storage import read_rows
from nestling.core.types import Conversation, Message, PromptRow, ToolCall
from nestling.generation.chat import MALFORMED, replies
from nestling.generation.engine import Engine
from nestling.generation.sampling import Sampling
from nestling.generation.session import ChatSession, Event
from nestling.model import checkpoint
from nestling.model.decoder import Decoder
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.conversation import render, reply_ids
from nestling.tokenizer.special import CALL_END, CALL_START, THINK_END, THINK_START, TURN_END

ASK = [Message(role="user", content="What is 12 + 3?")]
PLAIN = PromptRow(prompt=tuple(ASK))
OFFERED = PromptRow(prompt=tuple(ASK), meta={"tools": ["calculator"]})


def writes(*ids: int, **changes: object) -> Sampling:
    return Sampling(strategy="toys.scripted", options={"ids": ids}, **{"max_tokens": 200, **changes})


def calling(expression: str, name: str = "calculator", content: str = "") -> Message:
    call = ToolCall(name=name, arguments={"expression": expression})
    return Message(role="assistant", content=content, tool_calls=(call,))


def said(text: str) -> Message:
    return Message(role="assistant", content=text)


def script(tokenizer: Tokenizer, *messages: Message) -> list[int]:
    return [token for message in messages for token in reply_ids(tokenizer, message)]


def test_a_call_is_answered_and_the_model_goes_on(engine: Engine, tokenizer: Tokenizer) -> None:
    call, answer = calling("12 + 3", content="Let me see. "), said("12 + 3 = 15.")
    reply = replies(engine, [OFFERED], writes(*script(tokenizer, call, answer)), 0)[0]
    assert reply.messages == (call, Message(role="tool", content="15"), answer)
    assert (reply.text, reply.completion.finish) == ("12 + 3 = 15.", "stop")


def test_the_tokens_are_those_of_the_rendered_conversation(engine: Engine, tokenizer: Tokenizer) -> None:
    """What the model saw while it wrote is exactly what it is trained on, mask included."""
    sampling = writes(*script(tokenizer, calling("12 + 3"), calling("7 * 6"), said("15 and 42")))
    reply = replies(engine, [OFFERED], sampling, 0)[0]
    prompt = render(tokenizer, ASK, ("calculator",), prompt=True).ids
    whole = render(tokenizer, [*ASK, *reply.messages], ("calculator",))
    newline = len(tokenizer.encode("\n"))
    assert [*prompt, *reply.completion.ids] == whole.ids[:-newline]
    assert reply.completion.sampled == whole.mask[len(prompt) : -newline]


def test_several_calls_in_one_turn(engine: Engine, tokenizer: Tokenizer) -> None:
    calls = (*calling("1 + 1").tool_calls, *calling("2 + 2").tool_calls)
    both = Message(role="assistant", tool_calls=calls)
    reply = replies(engine, [OFFERED], writes(*script(tokenizer, both, said("2, 4"))), 0)[0]
    assert [m.content for m in reply.messages if m.role == "tool"] == ["2", "4"]


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ('{"name": "calculator", "arguments"', MALFORMED),
        ('["calculator"]', MALFORMED),
        ('{"name": "calculator", "arguments": {"expression": "1 / 0"}}', "error: division by zero"),
        ('{"name": "calculator", "arguments": {"expr": "1"}}', "error: argument expression: field required"),
        ('{"name": "rm", "arguments": {}}', "error: no tool 'rm' on offer; there is calculator"),
    ],
)
def test_a_bad_call_is_told_to_the_model(engine: Engine, tokenizer: Tokenizer, text: str, result: str) -> None:
    turn = [tokenizer.id(CALL_START), *tokenizer.encode(text), tokenizer.id(CALL_END), tokenizer.id(TURN_END)]
    sampling = writes(*turn, *script(tokenizer, said("sorry")))
    reply = replies(engine, [OFFERED], sampling, 0)[0]
    assert [m.content for m in reply.messages if m.role == "tool"] == [result]
    assert reply.text == "sorry"


def test_rounds_are_bounded(engine: Engine, tokenizer: Tokenizer) -> None:
    sampling = writes(*script(tokenizer, *[calling("1 + 1")] * 3))
    reply = replies(engine, [OFFERED], sampling, 0, max_rounds=2)[0]
    assert [m.role for m in reply.messages] == ["assistant", "tool", "assistant", "tool", "assistant"]
    assert reply.messages[-1] == calling("1 + 1")


def test_a_result_that_does_not_fit_ends_the_reply(model: Decoder, tokenizer: Tokenizer) -> None:
    turn = script(tokenizer, calling("1 + 1"))
    room = len(render(tokenizer, ASK, ("calculator",), prompt=True).ids) + len(turn) + 5
    engine = Engine(model, tokenizer, capacity=room)
    reply = replies(engine, [OFFERED], writes(*turn), 0)[0]
    assert reply.messages == (calling("1 + 1"),)
    assert reply.completion.finish == "length"


def test_without_tools_a_call_ends_the_reply(engine: Engine, tokenizer: Tokenizer) -> None:
    reply = replies(engine, [PLAIN], writes(*script(tokenizer, calling("1 + 1"))), 0)[0]
    assert reply.messages == (calling("1 + 1"),)


def test_each_prompt_has_its_own_tools(engine: Engine, tokenizer: Tokenizer) -> None:
    rows = [OFFERED, PLAIN, OFFERED]
    together = replies(engine, rows, writes(*script(tokenizer, calling("12 + 3"), said("15"))), 0)
    assert [reply.text for reply in together] == ["15", "", "15"]
    assert [len(reply.messages) for reply in together] == [3, 1, 3]


def test_stop_texts_are_not_part_of_the_reply(engine: Engine, tokenizer: Tokenizer) -> None:
    sampling = writes(*script(tokenizer, calling("1 + 1"), said("the cat. sat")), stop=(".",))
    reply = replies(engine, [OFFERED], sampling, 0)[0]
    assert reply.text == "the cat"


def test_each_prompt_has_its_own_stream(engine: Engine) -> None:
    sampling = Sampling(max_tokens=12)
    first, second = replies(engine, [PLAIN, PLAIN], sampling, 7)
    again = replies(engine, [PLAIN], sampling, 7)[0]
    assert first.completion.ids == again.completion.ids != second.completion.ids


# ---- sessions ----


def test_a_session_with_an_unknown_tool_is_refused(engine: Engine) -> None:
    with pytest.raises(UserError, match="did you mean 'calculator'"):
        ChatSession(engine, tools=("calculater",))


def session(engine: Engine, *ids: int, **changes: object) -> ChatSession:
    return ChatSession(engine, sampling=writes(*ids), tools=("calculator",), **changes)


def test_events_of_a_streamed_reply(engine: Engine, tokenizer: Tokenizer) -> None:
    thought = [tokenizer.id(THINK_START), *tokenizer.encode("hm"), tokenizer.id(THINK_END)]
    talk = session(engine, *thought, *script(tokenizer, calling("12 + 3", content="So: "), said("It is 15 🙂")))
    events = list(talk.say("What is 12 + 3?"))
    kinds = [e.kind for e in events]
    assert [k for i, k in enumerate(kinds) if i == 0 or k != kinds[i - 1]] == [
        "thought",
        "text",
        "call",
        "result",
        "text",
    ]
    assert "".join(e.text for e in events if e.kind == "text") == "So: It is 15 🙂"
    assert Event("result", "15") in events
    assert Event("thought", "hm") in events
    assert [m.role for m in talk.history] == ["user", "assistant", "tool", "assistant"]


def test_regenerate_reset_and_save(engine: Engine, tmp_path: Path) -> None:
    talk = ChatSession(engine, system="Be brief.", sampling=Sampling(max_tokens=10), seed=4)
    list(talk.say("one"))
    list(talk.say("two"))
    before = talk.history[:]
    list(talk.regenerate())
    assert talk.history[:3] == before[:3]
    assert talk.history[3] != before[3]
    talk.save(tmp_path / "talk.jsonl")
    (saved,) = read_rows(tmp_path / "talk.jsonl", Conversation.from_row)
    assert list(saved.messages) == [Message(role="system", content="Be brief."), *talk.history]
    talk.reset()
    assert talk.messages == [Message(role="system", content="Be brief.")]
    with pytest.raises(UserError, match="nothing to answer"):
        talk.regenerate()


def test_the_same_seed_gives_the_same_conversation(engine: Engine) -> None:
    texts = []
    for seed in (1, 1, 2):
        talk = ChatSession(engine, sampling=Sampling(max_tokens=10), seed=seed)
        texts.append([e.text for word in ("one", "two") for e in talk.say(word)])
    assert texts[0] == texts[1] != texts[2]


def test_an_interrupted_reply_keeps_what_was_written(engine: Engine, tokenizer: Tokenizer) -> None:
    talk = session(engine, *tokenizer.encode("the cat sat on the mat"))
    events = talk.say("go")
    shown = next(events).text + next(events).text
    events.close()
    assert talk.history[-1].content.startswith(shown)
    assert len(talk.history[-1].content) < len("the cat sat on the mat")
    assert not engine.busy


def test_a_long_conversation_forgets_its_beginning(engine: Engine) -> None:
    talk = ChatSession(engine, system="Be brief.", sampling=Sampling(max_tokens=20))
    for turn in range(12):
        list(talk.say(f"number {turn}, the cat sat on the mat"))
    assert talk.forgotten > 0
    assert len([m for m in talk.history if m.role == "user"]) == 12
    with pytest.raises(UserError, match="longer than the context"):
        talk.say("word " * 400)
    assert len([m for m in talk.history if m.role == "user"]) == 12


def test_parameters(engine: Engine) -> None:
    talk = ChatSession(engine)
    talk.set("temperature", "0.25")
    talk.set("top_k", "7")
    assert (talk.sampling.temperature, talk.sampling.top_k) == (0.25, 7)
    with pytest.raises(UserError, match="temperature"):
        talk.set("temprature", "1")
    with pytest.raises(UserError, match="top_p"):
        talk.set("top_p", "much")


# ---- the terminal ----


@pytest.fixture
def folder(tmp_path: Path, model: Decoder, tokenizer: Tokenizer) -> Path:
    checkpoint.save(tmp_path / "model", model, tokenizer, {})
    return tmp_path / "model"


def test_scripted_chat(folder: Path) -> None:
    out = io.StringIO()
    run_chat(folder, ChatOptions(scripted=True, params={"max_tokens": 5}), Console(file=out, width=80))
    assert out.getvalue().count("you  ") == out.getvalue().count("bot  ") == 4


def test_commands(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(
        ["hello", "/params max_tokens 3", "/system Be kind.", "hi", "/regenerate", f"/save {tmp_path / 't.jsonl'}",
         "/history", "/help", "/nonsense", "/params top_p 7", "/reset", "/save", "", "/quit", "never read"]
    )  # fmt: skip
    out = io.StringIO()
    console = Console(file=out, width=100)
    monkeypatch.setattr(console, "input", lambda _: next(lines))
    run_chat(folder, ChatOptions(scripted=False), console)
    shown = out.getvalue()
    (saved,) = read_rows(tmp_path / "t.jsonl", Conversation.from_row)
    assert [m.role for m in saved.messages] == ["system", "user", "assistant"]
    assert "no such command" in shown
    assert "/regenerate" in shown
    assert "params.top_p" in shown
    assert next(lines) == "never read"


def test_a_base_model_does_not_chat(tmp_path: Path) -> None:
    base = Tokenizer.train(["the cat"], vocab_size=257)
    checkpoint.save(tmp_path / "base", random_model(base.vocab_size), base, {})
    with pytest.raises(UserError, match="base model"):
        run_chat(tmp_path / "base", ChatOptions(scripted=True))
