"""Conversations: exchanges put together with system messages, tool turns, personas and answers of mixed quality.

The tone of the answers varies on purpose (from one word to a friendly answer with a closing), so that preference
training has something to gain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nestling.core.errors import UserError
from nestling.core.types import Conversation, Message, ToolCall
from nestling.world import turns
from nestling.world.facts import Facts, coined_name
from nestling.world.language import fill, wording
from nestling.world.streams import Stream
from nestling.world.turns import Exchange

CALCULATOR = "calculator"
# Shares of the kinds of conversations when none are asked for.
SHARES: dict[str, float] = {
    "greeting": 4, "identity": 7, "fact": 20, "unknown": 9, "arithmetic": 15, "arithmetic_plain": 4, "story": 3,
    "rewriting": 4, "list": 2, "letter": 3, "spelling": 2, "howto": 3, "lookalike": 9, "harmful": 8, "persona": 17,
    "multi": 16}
STYLES = ("terse", "plain", "courteous", "closing", "warm")
_STYLE_WEIGHTS = (0.27, 0.38, 0.1, 0.17, 0.08)


def dialogues(facts: Facts, seed: int, count: int, split: str,
              kinds: Mapping[str, float] | None = None) -> Iterator[Conversation]:
    """`count` conversations; number i is a pure function of seed, split, kinds and i.

    Raises:
        UserError: an unknown kind.
    """
    shares = dict(SHARES if kinds is None else kinds)
    for kind in shares:
        if kind not in SHARES:
            raise UserError("unknown kind of dialogue", value=kind, fix=f"use some of {', '.join(SHARES)}")
    for place in range(count):
        stream = Stream(seed, "dialogue", split, place)
        yield dialogue(facts, stream, split, stream.weighted(list(shares), list(shares.values())))


def dialogue(facts: Facts, stream: Stream, split: str, kind: str) -> Conversation:
    """One conversation of this kind."""
    if kind == "persona":
        return _persona(facts, stream, split)
    if kind == "multi":
        return _multi(facts, stream, split)
    exchange = turns.greeted(facts, stream, split, turns.KINDS[kind](facts, stream, split))
    tools = _tools(stream, [exchange])
    messages = [*system(facts, stream, tools), *spoken(facts, stream, exchange)]
    return Conversation(messages=tuple(messages), tools=tools, meta=exchange.truth)


def _tools(stream: Stream, exchanges: list[Exchange]) -> tuple[str, ...]:
    """The calculator is offered where a sum needs it, and sometimes where nothing does; never with plain sums."""
    if any(exchange.expression for exchange in exchanges):
        return (CALCULATOR,)
    plain = any(exchange.truth["kind"] == "arithmetic_plain" for exchange in exchanges)
    return (CALCULATOR,) if not plain and stream.chance(0.3) else ()


def system(facts: Facts, stream: Stream, tools: tuple[str, ...]) -> list[Message]:
    """The system message, often none; with tools it often speaks of them (the renderer lists them in any case)."""
    forms = facts.lang.get("chat.system")
    if tools and stream.chance(0.4):
        return [Message(role="system", content=forms["calculator"])]
    return [Message(role="system", content=stream.pick(forms["plain"]))] if stream.chance(0.4) else []


def spoken(facts: Facts, stream: Stream, exchange: Exchange, style: str | None = None) -> list[Message]:
    """The messages of an exchange: user, tool call and result if any, answer."""
    return [Message(role="user", content=exchange.user), *answered(facts, stream, exchange, style)]


def answered(facts: Facts, stream: Stream, exchange: Exchange, style: str | None = None) -> list[Message]:
    """The assistant's side of an exchange."""
    reply = Message(role="assistant", content=styled(facts, stream, exchange, style))
    if exchange.expression is None:
        return [reply]
    call = ToolCall(name=CALCULATOR, arguments={"expression": exchange.expression})
    result = Message(role="tool", content=exchange.truth["answer"])
    return [Message(role="assistant", tool_calls=(call,)), result, reply]


def styled(facts: Facts, stream: Stream, exchange: Exchange, style: str | None = None) -> str:
    """The right answer in a style of STYLES (drawn when None): always true, not always nice."""
    style = style or stream.weighted(STYLES, _STYLE_WEIGHTS)
    if style == "terse":
        return exchange.terse
    answer, chat = exchange.answer, facts.lang.data["chat"]
    if exchange.exact:
        return answer
    if style in ("courteous", "warm") and exchange.truth["kind"] not in ("unknown", "identity"):
        answer = f"{stream.pick(chat['opening_courtesy'])} {answer}"
    if style in ("closing", "warm"):
        answer = f"{answer} {stream.pick(chat['closings'])}"
    return answer


def _multi(facts: Facts, stream: Stream, split: str) -> Conversation:
    exchanges = mixture(facts, stream, split)
    tools = _tools(stream, exchanges)
    messages = system(facts, stream, tools)
    for exchange in exchanges:
        messages += spoken(facts, stream, exchange)
    return Conversation(messages=tuple(messages), tools=tools,
                        meta={"kind": "multi", "truths": [exchange.truth for exchange in exchanges]})


def mixture(facts: Facts, stream: Stream, split: str) -> list[Exchange]:
    """2 to 8 exchanges: perhaps a greeting, questions that follow each other or other kinds, perhaps a thank-you."""
    exchanges = [turns.greeting(facts, stream, split)] if stream.chance(0.35) else []
    if stream.chance(0.4):
        exchanges += turns.followups(facts, stream, split, stream.number(2, 3))
    else:
        sums = stream.pick(("arithmetic", "arithmetic_plain"))
        pool = ("fact", "unknown", "identity", "story", "rewriting", "spelling", "howto", "harmful", "lookalike", "list",
                sums)
        exchanges += [turns.KINDS[kind](facts, stream, split) for kind in stream.several(pool, stream.number(2, 4))]
        if stream.chance(0.35):  # late in a talk, a stranger is still a stranger
            exchanges.append(turns.unknown(facts, stream, split))
    exchanges[0] = turns.greeted(facts, stream, split, exchanges[0])
    plain = any(exchange.truth["kind"] == "arithmetic_plain" for exchange in exchanges)
    if not plain and stream.chance(0.25):  # a sum for the calculator, after turns that needed none
        exchanges.append(turns.arithmetic(facts, stream, split))
    if stream.chance(0.35):
        exchanges.append(turns.greeting(facts, stream, split, stream.pick(("thanks", "goodbye"))))
    return exchanges


def persona_exchanges(facts: Facts, stream: Stream, split: str) -> tuple[str, list[Exchange]]:
    """A system message that makes the model a character, and 2 to 4 exchanges in which it stays that character."""
    forms = facts.lang.data["personas"]
    role = stream.pick(forms["roles"])
    slots = {**role, "name": f"{role['title']} {coined_name(stream, facts.lang, split)}"}
    aspects = ["name", *stream.several(("role", "greeting", "day", "fact", "sum"), stream.number(1, 3))]
    aspects = stream.shuffled(aspects) + (["bye"] if stream.chance(0.3) else [])
    exchanges = [_in_character(facts, stream, split, slots, aspect) for aspect in aspects]
    return fill(wording(stream, forms["systems"], split), slots), exchanges


def _in_character(facts: Facts, stream: Stream, split: str, slots: dict[str, Any], aspect: str) -> Exchange:
    truth = {"kind": "persona", "name": slots["name"], "sign": slots["sign"], "role": slots["role"], "aspect": aspect}
    if aspect in ("fact", "sum"):
        inner = turns.fact(facts, stream, split) if aspect == "fact" else turns.arithmetic_plain(facts, stream, split)
        answer = f"{slots['sign']} {inner.answer}"
        return Exchange(inner.user, answer, answer, truth | {"inner": inner.truth}, exact=True)
    form = facts.lang.get("personas.turns")[aspect]
    answer = f"{slots['sign']} {fill(stream.pick(form['answers']), slots)}"
    return Exchange(wording(stream, form["users"], split), answer, answer, truth, exact=True)


def _persona(facts: Facts, stream: Stream, split: str) -> Conversation:
    content, exchanges = persona_exchanges(facts, stream, split)
    messages = [Message(role="system", content=content)]
    for exchange in exchanges:
        messages += spoken(facts, stream, exchange)
    return Conversation(messages=tuple(messages),
                        meta={"kind": "persona", "truths": [exchange.truth for exchange in exchanges]})
