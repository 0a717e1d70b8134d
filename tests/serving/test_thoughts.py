"""Thoughts that are cut, never opened, opened by the template or closed twice: no mark of theirs stands in an answer.

Every case is asked for at both endpoints, whole and as a stream; the two must say the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import openai
import pytest
import torch
from families import FORMS, make
from taught import Service, running, say, teach

from nestling.core.types import Message, PromptRow, ToolCall
from nestling.generation.engine import Engine
from nestling.generation.sampling import Sampling
from nestling.generation.sequence import Completion
from nestling.model.config import DecoderConfig
from nestling.model.decoder import build
from nestling.serving.answering import Question
from nestling.serving.app import create_app
from nestling.serving.driver import Driver
from nestling.serving.models import Models, Served
from nestling.serving.protocol.messages import ChatMessage, to_messages
from nestling.serving.protocol.responses import ResponsesRequest
from nestling.serving.settings import ServeSettings
from nestling.stages.trials import _thoughtful
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.conversation import between, render
from nestling.tokenizer.special import CHAT, THINK_END, THINK_START, TURN_END
from nestling.tools import Toolbox

END = "{{- '<|im_start|>assistant\\n' }}{%- endif %}"
OPENING = END.replace("assistant\\n", "assistant\\n<think>\\n")
THOUGHT = "it is easy and quick"
LESSONS = {  # what is asked -> what is written behind the beginning of the turn
    "Think.": (THINK_START, THOUGHT, THINK_END, "Done."),
    "Twice.": (THINK_START, "it is easy", THINK_END, "and quick", THINK_END, "Done."),
    "Never.": ("it is easy", THINK_END, "Done."),
}
CALL = ToolCall(name="calculator", arguments={"expression": "2 + 3"})
SUM = "What is 2 + 3?"
Told = tuple[str, str]
"""The thought and the answer."""


def written(tokenizer: Tokenizer, parts: tuple[str, ...]) -> list[int]:
    control = (THINK_START, THINK_END)
    return [id for part in parts for id in ([tokenizer.id(part)] if part in control else tokenizer.encode(part))]


def lessons(tokenizer: Tokenizer, *, opened: bool) -> list[list[int]]:
    """What the model learns by heart; where the template opens thoughts, without the first token of those."""
    end = tokenizer.id(TURN_END)
    talks = []
    for asked, parts in LESSONS.items():
        begun = render(tokenizer, [say("user", asked)], prompt=True).ids
        talks.append([*begun, *written(tokenizer, parts[1:] if opened and parts[0] == THINK_START else parts), end])
    if not opened:  # thinks, calls, thinks again
        question, call = say("user", SUM), say("assistant", "", CALL)
        first = [*written(tokenizer, (THINK_START, "it is easy", THINK_END))]
        called = [*render(tokenizer, [question, call], ["calculator"]).ids]
        begun = render(tokenizer, [question], ["calculator"], prompt=True).ids
        after = between(tokenizer, [question], call, [say("tool", "5")], ["calculator"])
        talks.append([*begun, *first, *called[len(begun) : -1], *after, *tokenizer.encode("It is 5."), end])
    return talks


def start(tokenizer: Tokenizer, *, opened: bool, **settings) -> Iterator[Service]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        sizes = {"d_model": 64, "n_layers": 2, "n_heads": 4, "context": 256}
        model = build(DecoderConfig(vocab_size=tokenizer.vocab_size, **sizes))
        teach(model, lessons(tokenizer, opened=opened), steps=120)
    engine = Engine(model.eval(), tokenizer, frozen=True)
    chosen = ServeSettings(flush_seconds=0, opens_thought=True, **settings)
    served = Served("tiny", Driver(engine), tokenizer, {}, 1, Toolbox.open(chosen.tools))
    with running(create_app(chosen, Models([served])), served.driver) as service:
        yield service


@pytest.fixture(scope="module")
def own() -> Iterator[Service]:
    """A model in our own form, which opens its thoughts itself unless the request asks for effort."""
    texts = [*LESSONS, THOUGHT, "Done.", SUM, "It is 5.", "system user assistant tool", "Tools: calculator"]
    texts.append('{"name": "calculator", "arguments": {"expression": "2 + 3"}}')
    tokenizer = Tokenizer.train(texts * 3, vocab_size=360).with_special(CHAT)
    yield from start(tokenizer, opened=False, tools={"calculator": {}})


@pytest.fixture(scope="module")
def opening(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A model whose chat template opens the thought of every reply, as DeepSeek's R1 and Qwen3-Thinking do."""
    template = FORMS["qwen"]["template"].replace(END, OPENING)
    assert template != FORMS["qwen"]["template"]
    folder = make(tmp_path_factory.mktemp("opening"), {**FORMS["qwen"], "template": template})
    yield from start(Tokenizer.load(folder), opened=True)


def chat(client: openai.OpenAI, asked: str, effort: str = "", most: int = 60) -> Told:
    given = {"model": "tiny", "messages": [{"role": "user", "content": asked}], "temperature": 0, "max_tokens": most}
    given |= {"reasoning_effort": effort} if effort else {}
    message = client.chat.completions.create(**given).choices[0].message
    deltas = [part.choices[0].delta for part in client.chat.completions.create(**given, stream=True)]
    thought = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    told = (thought, "".join(delta.content or "" for delta in deltas))
    assert told == (getattr(message, "reasoning_content", ""), message.content)
    return told


def respond(client: openai.OpenAI, asked: str, effort: str = "", most: int = 60) -> Told:
    given = {"model": "tiny", "input": asked, "temperature": 0, "max_output_tokens": most}
    given |= {"reasoning": {"effort": effort}} if effort else {}
    events = list(client.responses.create(**given, stream=True))
    whole = client.responses.create(**given)
    thought = "".join(item.content[0].text for item in whole.output if item.type == "reasoning")
    for kind, text in (("reasoning_text", thought), ("output_text", whole.output_text)):
        assert "".join(event.delta for event in events if event.type == f"response.{kind}.delta") == text
    return thought, whole.output_text


def remembered(service: Service, name: str) -> tuple[Message, ...]:
    [kept] = service.app.state.memory._kept.values()
    return kept[name].messages


@pytest.fixture(params=[chat, respond])
def ask(request: pytest.FixtureRequest) -> Callable[..., Told]:
    return request.param


def test_a_thought_closed_twice(own, ask):
    """What stands between the two marks is answer; the second mark is nothing."""
    assert ask(own.client(), "Twice.") == ("it is easy", "and quickDone.")


def test_a_thought_that_was_never_opened(own, ask):
    assert ask(own.client(), "Never.") == ("", "it is easyDone.")


def test_a_thought_cut_by_its_limit(own, ask):
    """The model closes it once more when it has come to its own end."""
    thought, answer = ask(own.client(), "Think.", effort="low", most=24)
    assert 0 < len(thought) < len(THOUGHT)
    assert "<" not in answer
    assert answer


def test_a_thought_cut_by_the_end_of_the_room(own, opening, ask):
    """It stays a thought, and there is no answer."""
    for service in (own, opening):
        thought, answer = ask(service.client(), "Think.", most=3)
        assert thought
        assert THOUGHT.startswith(thought)
        assert answer == ""


def test_a_thought_that_the_template_opened(opening, ask):
    """What is written up to its end is the thought."""
    assert ask(opening.client(), "Think.") == (THOUGHT, "Done.")
    assert ask(opening.client(), "Twice.") == ("it is easy", "and quickDone.")


def test_effort_bounds_a_thought_that_the_template_opened(opening, ask):
    """It is not opened once more, and closed after its share of the room."""
    assert ask(opening.client(), "Think.", effort="high") == (THOUGHT, "Done.")
    thought, answer = ask(opening.client(), "Think.", effort="low", most=24)
    assert 0 < len(thought) < len(THOUGHT)
    assert "<" not in answer


def test_what_is_remembered_is_what_was_told(own, opening):
    """A response that is gone on from holds the answer as its client saw it."""
    for service, asked in ((own, "Twice."), (own, "Never."), (opening, "Think."), (opening, "Twice.")):
        client = service.client()
        told = client.responses.create(model="tiny", input=asked, temperature=0, max_output_tokens=60)
        assert remembered(service, told.id)[-1].content == told.output_text


def test_a_thought_before_a_call_is_no_part_of_the_step(own):
    """The turn was begun with <think>; what it calls is shown, what it thought is not said."""
    client = own.client()
    given = {"model": "tiny", "input": SUM, "temperature": 0, "tools": [{"type": "calculator"}]}
    told = client.responses.create(**given, reasoning={"effort": "high"})
    assert told.output_text == "It is 5."
    assert [(one.role, one.content, len(one.tool_calls)) for one in remembered(own, told.id)] == [
        ("user", SUM, 0), ("assistant", "", 1), ("tool", "5", 0), ("assistant", "It is 5.", 0)]  # fmt: skip


def test_a_reply_that_ends_after_a_tool_is_remembered_once(own):
    """The room was over when the result was there: the call is not repeated as the reply."""
    client = own.client()
    asked = {"model": "tiny", "input": SUM, "temperature": 0, "tools": [{"type": "calculator"}]}
    tokens = range(1, client.responses.create(**asked).usage.output_tokens)
    cut = (client.responses.create(**asked, max_output_tokens=most) for most in tokens)
    told = next(one for one in cut if any(item.type == "mcp_call" for item in one.output))
    assert (told.status, told.output_text) == ("incomplete", "")
    assert [len(one.tool_calls) for one in remembered(own, told.id)] == [0, 1, 0, 0]


TOOL = {"type": "function", "function": {"name": "calculator"}}


@pytest.fixture
def sent(own, monkeypatch):
    """The prompts that the engine was given."""
    driver, prompts = own.driver, []
    submit = driver.submit

    async def noting(request, **more):
        prompts.append(list(request.ids))
        return await submit(request, **more)

    monkeypatch.setattr(driver, "submit", noting)
    return prompts


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_a_client_that_sends_back_what_it_got_gets_the_tokens_of_training(own, sent, field):
    """Within a round of its tools the thought stays; when the next question comes it is history, and left out."""
    client, tokenizer = own.client(), own.app.state.models.default.tokenizer
    lesson = lessons(tokenizer, opened=False)[-1]
    given = {"model": "tiny", "temperature": 0, "tools": [TOOL], "max_tokens": 60}
    asked = [{"role": "user", "content": SUM}]
    message = client.chat.completions.create(**given, messages=asked).choices[0].message
    back = message.model_dump(exclude_none=True)
    back[field] = back.pop("reasoning_content")
    assert back[field] == "it is easy"
    asked += [back, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "5"}]
    last = client.chat.completions.create(**given, messages=asked).choices[0].message
    answer = [*tokenizer.encode("It is 5."), tokenizer.id(TURN_END)]
    assert last.content == "It is 5."
    assert sent[-1] == lesson[: -len(answer)]
    asked += [last.model_dump(exclude_none=True), {"role": "user", "content": SUM}]
    client.chat.completions.create(**given | {"max_tokens": 1}, messages=asked)
    assert tokenizer.id(THINK_START) not in sent[-1]
    assert "easy" not in tokenizer.decode(sent[-1])


@pytest.mark.parametrize("by_id", [False, True])
def test_items_sent_back_make_the_tokens_of_training(own, sent, by_id):
    """The same of /v1/responses: the thought is an item before its call, or remembered with it; history has none."""
    client, tokenizer = own.client(), own.app.state.models.default.tokenizer
    lesson = lessons(tokenizer, opened=False)[-1]
    given = {"model": "tiny", "temperature": 0, "tools": [{"type": "function", "name": "calculator"}]}
    asked = [{"role": "user", "content": SUM}]
    first = client.responses.create(**given, input=asked, max_output_tokens=60)
    assert [item.type for item in first.output] == ["reasoning", "function_call"]
    result = {"type": "function_call_output", "call_id": first.output[1].call_id, "output": "5"}
    history = [*asked, *(item.model_dump(exclude_none=True) for item in first.output), result]
    then = {"input": [result], "previous_response_id": first.id} if by_id else {"input": history}
    last = client.responses.create(**given, **then, max_output_tokens=60)
    assert last.output_text == "It is 5."
    answer = [*tokenizer.encode("It is 5."), tokenizer.id(TURN_END)]
    assert sent[-1] == lesson[: -len(answer)]
    history += [*(item.model_dump(exclude_none=True) for item in last.output), *asked]
    then = {"input": asked, "previous_response_id": last.id} if by_id else {"input": history}
    client.responses.create(**given, **then, max_output_tokens=16)
    assert tokenizer.id(THINK_START) not in sent[-1]
    assert tokenizer.decode(sent[-1]).count(SUM) == 2


def test_a_thought_after_which_nothing_was_said_is_left_out():
    """And all of them are, for a model that has none."""
    thought = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]}
    said = [thought, {"role": "assistant", "content": "Hi"}, thought, {"role": "user", "content": "Yes?"}, thought]
    base = Tokenizer.train(["Hi"], vocab_size=260)
    body = ResponsesRequest.model_validate({"model": "tiny", "input": said})
    assert [one.content for one in body.messages(base)] == ["Hi", "Yes?"]
    assert [one.content for one in body.messages(base.with_special(CHAT))] == ["<think>hm</think>Hi", "Yes?"]


def test_thoughts_are_for_models_that_think():
    """Any other would read the marks as text; and only an assistant thinks."""
    said = [ChatMessage(role=role, content="Hi", reasoning="hm") for role in ("user", "assistant")]
    base = Tokenizer.train(["Hi"], vocab_size=260)
    assert [one.content for one in to_messages(said, base)] == ["Hi", "Hi"]
    assert [one.content for one in to_messages(said, base.with_special(CHAT))] == ["Hi", "<think>hm</think>Hi"]


def test_trials_open_a_thought_only_once(opening, own):
    """What a candidate for the router is tried with is what the service sends."""
    for service, begun in ((opening, "<think>\n"), (own, "<think>")):
        tokenizer, asked = service.app.state.models.default.tokenizer, []

        def generate(requests, asked=asked):
            asked += requests
            return [Completion([], [], [], "", "length")]

        engine = SimpleNamespace(tokenizer=tokenizer, generate=generate)
        _thoughtful(engine, [PromptRow(prompt=(say("user", "Think."),))], Sampling(max_tokens=8), seed=1)
        assert tokenizer.decode(asked[0].ids, control=True).endswith(f"assistant\n{begun}")


def test_effort_opens_a_thought_only_once(opening):
    """Where the template has opened it, the prompt stays as it is."""
    served = opening.app.state.models.default
    messages = (say("user", "Think."),)
    plain = Question(messages).prompt(served)
    assert Question(messages, effort="high", opens_thought=True).prompt(served) == plain
