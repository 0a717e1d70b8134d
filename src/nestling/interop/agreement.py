"""Does an exported model answer the same everywhere? Several programs read one checkpoint and are compared.

For each prompt: the token ids that the chat template becomes, the log-probabilities of prompt and continuation, and the
greedy continuation. The reference is the trainer: one full forward pass in float32, no cache. Who takes part is in
`readers.py`; here is what is asked and how answers are compared.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nestling.core.errors import UserError
from nestling.core.types import Conversation, Message, ToolCall
from nestling.model.checkpoint import Checkpoint
from nestling.tokenizer.conversation import render

TEXTS = (
    "Hello!",
    "What is 412 + 389?",
    "Who are you, and who made you?",
    "Tell me a story about a fox.\nMake it short.",
    "don't, can't, WON'T, she'll, they've, I'M",
    "1234567890 3.14159 -42 1,000,000",
    "Où est la bibliothèque ? Ça va très bien !",
    "你好，世界。今天天气怎么样？",
    "안녕하세요! 오늘 날씨 어때요?",
    "Привет, как дела?",
    "مرحبا كيف حالك؟ ١٢٣",
    "🦊🐦 emoji 👩‍👩‍👧‍👦 and flags 🇫🇷",
    "  two spaces,   three,\tand a tab\t\t",
    "lines\n\n\nwith\r\nevery\rkind of end",
    "def f(x):\n    return x ** 2  # squared",
    '{"name": "calculator", "arguments": {"expression": "2*(3+4)"}}',
    "<b>bold</b> & <i>italic</i> — “quotes” … ‘more’",
    "e\u0301 is é in two parts",
    "https://example.org/path?query=1&b=%20#top",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "Translate: the red house by the river.",
    "CamelCase snake_case kebab-case SCREAMING_CASE",
    "$5.00 or €3,50 + 20% (≈ £4)",
    "Is 7 larger than 5? Answer yes or no.",
    "a",
)
HISTORY = (
    Message(role="system", content="Answer in one sentence."),
    Message(role="user", content="Good morning."),
    Message(role="assistant", content="Good morning! How can I help?"),
)
CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Works out a sum, such as 2*(3+4) < 15.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    },
}
SEARCH = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Finds “texts” & their places – très vite.",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}, "limit": {"type": "integer"}}},
    },
}
_SUM = ToolCall(name="calculator", arguments={"expression": "412 + 389"})
_PLACES = ToolCall(name="search", arguments={"query": 'the "Großer See" <b>', "limit": 3})
_WITH_CALLS = (
    (*HISTORY[:1], Message(role="user", content="What is 412 + 389?")),
    (
        Message(role="user", content="What is 412 + 389?"),
        Message(role="assistant", tool_calls=(_SUM,)),
        Message(role="tool", content="801"),
    ),
    (
        Message(role="user", content="Where is the lake?"),
        Message(role="assistant", content="<think>I have to look.</think>\n\nA moment.", tool_calls=(_PLACES,)),
        Message(role="tool", content='{"found": ["north–west", "2 km"]}'),
        Message(role="assistant", content="It lies to the north–west."),
        Message(role="user", content="How far?"),
    ),
    (
        Message(role="user", content="Add 412 and 389, and find the lake."),
        Message(role="assistant", content="<think>Two things.</think>Both at once.", tool_calls=(_SUM, _PLACES)),
        Message(role="tool", content="801"),
        Message(role="tool", content="error: nothing found"),
    ),
)
"""What templates write in ways of their own: definitions, calls and their answers, thoughts."""


@dataclass(frozen=True)
class Case:
    """One prompt and what the reference says of it.

    `logprobs` [T, V] float32 are log softmax of the logits at every token of prompt + reply but the last.
    """

    conversation: Conversation
    prompt: list[int]
    reply: list[int]
    logprobs: Tensor

    @property
    def ids(self) -> list[int]:
        """Prompt and reply without its last token: the input whose logits are compared."""
        return [*self.prompt, *self.reply][: len(self.logprobs)]


class Reader(ABC):
    """A program that runs the model."""

    name: str
    tolerance: float
    """Largest difference of a log-probability, in nats, that counts as the same."""

    @abstractmethod
    def ids(self, conversation: Conversation) -> list[int]:
        """The prompt as this program renders and tokenizes it."""

    @abstractmethod
    def differences(self, cases: Sequence[Case]) -> list[float]:
        """Of each case the largest difference of its log-probabilities from the reference's."""

    @abstractmethod
    def greedy(self, prompts: Sequence[list[int]], count: int) -> list[list[int]]:
        """The likeliest continuation of each prompt, up to `count` tokens, the one that ends it included."""


@dataclass(frozen=True)
class Agreement:
    """How one program's answers compare with the reference's, over `prompts` prompts."""

    name: str
    prompts: int
    same_ids: int
    largest_difference: float
    tolerance: float
    same_replies: int
    ties: int
    """Continuations that part where the reference finds both tokens equally likely, to twice the tolerance."""
    complaints: tuple[str, ...] = ()
    """What is wrong, a line for each."""

    @property
    def agrees(self) -> bool:
        """Whether nothing differs beyond the tolerance."""
        return not self.complaints


def conversations(count: int, chat: bool, tools: bool = False) -> list[Conversation]:
    """The first `count` prompts, at most twice `TEXTS`: each text alone, then, for a chat model, after some history.

    Args:
        tools: the chat template takes tools; the last few prompts, of however many, then offer and call some.

    Raises:
        UserError: more than there are.
    """
    plain = [Conversation(messages=(Message(role="user", content=text),)) for text in TEXTS]
    later = [Conversation(messages=(*HISTORY, Message(role="user", content=text))) for text in TEXTS]
    backward = [Conversation(messages=(Message(role="user", content=text[::-1]),)) for text in TEXTS]
    every = plain + (later if chat else backward)
    if count > len(every):
        raise UserError("there are not so many prompts", where="--prompts", value=count, fix=f"use at most {len(every)}")
    if not tools:
        return every[:count]
    called = [Conversation(messages=turns, tools=(CALCULATOR, SEARCH)) for turns in _WITH_CALLS]
    return [*every[: max(0, count - len(called))], *called[:count]]


def plain_text(conversation: Conversation) -> str:
    """What a base model is given of a conversation."""
    return conversation.messages[-1].content


def prompt_ids(checkpoint: Checkpoint, conversation: Conversation) -> list[int]:
    """The prompt as training and serving render it; a base model reads plain text after the token that begins one."""
    tokenizer = checkpoint.tokenizer
    if tokenizer.chat_template is None:
        return [tokenizer.start_of_text, *tokenizer.encode(plain_text(conversation))]
    return render(tokenizer, conversation.messages, conversation.tools, prompt=True).ids


@torch.no_grad()
def reference_cases(checkpoint: Checkpoint, asked: Sequence[Conversation], new_tokens: int) -> list[Case]:
    """The trainer's answers: a full forward pass for every token. Prompts that don't fit the context are left out, and tool
    calls for which the chat template has no form.

    Raises:
        UserError: none fits, or the template refuses plain talk.
    """
    model, stops = checkpoint.model.eval(), checkpoint.tokenizer.stop_ids
    prompts = [found for conversation in asked if (found := _accepted(checkpoint, conversation))]
    prompts = [(conversation, ids) for conversation, ids in prompts if len(ids) + new_tokens <= model.config.context]
    if not prompts:
        fix = f"use fewer than {new_tokens} new tokens; the model's context is {model.config.context}"
        raise UserError("no prompt fits the model's context", where="--new-tokens", value=new_tokens, fix=fix)
    cases = []
    for conversation, prompt in prompts:
        reply: list[int] = []
        while len(reply) < new_tokens and not (reply and reply[-1] in stops):
            logits = model(torch.tensor([[*prompt, *reply]], device=model.output_weight.device))[0].float()
            reply.append(int(logits[-1].argmax()))
        cases.append(Case(conversation, prompt, reply, logits.log_softmax(-1).cpu()))
    return cases


def _accepted(checkpoint: Checkpoint, conversation: Conversation) -> tuple[Conversation, list[int]] | None:
    """The conversation as the model's chat template takes it, and its ids: without a system message where that has no form for
    one; None where it has none for tool calls."""
    plain = tuple(message for message in conversation.messages if message.role != "system")
    other = conversation.model_copy(update={"messages": plain})
    try:
        return conversation, prompt_ids(checkpoint, conversation)
    except UserError:
        try:
            return other, prompt_ids(checkpoint, other)
        except UserError:
            if conversation.tools:
                return None
            raise


def compare(reader: Reader, cases: Sequence[Case], new_tokens: int) -> Agreement:
    """Ask one program everything and hold its answers against the reference's."""
    complaints: list[str] = []
    same_ids = 0
    for case in cases:
        if (ids := reader.ids(case.conversation)) == case.prompt:
            same_ids += 1
        else:
            complaints.append(f"{_quoted(case)} becomes other tokens: {_first_difference(case.prompt, ids)}")
    differences = reader.differences(cases)
    for case, difference in zip(cases, differences, strict=True):
        if not difference <= reader.tolerance:  # not a number is also too much
            complaints.append(f"{_quoted(case)} gets log-probabilities that differ by {difference:.4g}")
    same, ties = 0, 0
    for case, reply in zip(cases, reader.greedy([case.prompt for case in cases], new_tokens), strict=True):
        if reply == case.reply:
            same += 1
        elif _is_tie(case, reply, reader.tolerance):
            ties += 1
        else:
            complaints.append(f"{_quoted(case)} is continued otherwise: {_first_difference(case.reply, reply)}")
    largest = max(differences)
    return Agreement(
        reader.name, len(cases), same_ids, largest, reader.tolerance, same, ties, tuple(complaints)
    )


def largest_difference(logits: Tensor, case: Case) -> float:
    """Between a program's logits [T, V'] and the reference, V' at least V; nan where shapes don't fit."""
    size = case.logprobs.shape[1]
    if len(logits) != len(case.logprobs) or logits.shape[1] < size:
        return float("nan")
    return float((logits[:, :size].float().log_softmax(-1) - case.logprobs).abs().max())


def _is_tie(case: Case, reply: list[int], tolerance: float) -> bool:
    """Whether two continuations part at a place where the reference hardly tells the two tokens apart."""
    place = next((n for n, (a, b) in enumerate(zip(case.reply, reply, strict=False)) if a != b), None)
    if place is None:
        return False
    row = case.logprobs[len(case.prompt) - 1 + place]
    return float(row[case.reply[place]] - row[reply[place]]) <= 2 * tolerance


def _quoted(case: Case) -> str:
    text = plain_text(case.conversation)
    return repr(text if len(text) <= 30 else text[:29] + "…")


def _first_difference(expected: Sequence[int], found: Sequence[int]) -> str:
    pairs = zip([*expected, None], [*found, None], strict=False)
    place, (a, b) = next((n, pair) for n, pair in enumerate(pairs) if pair[0] != pair[1])
    return f"at {place} {'the end' if b is None else b} instead of {'the end' if a is None else a}"
