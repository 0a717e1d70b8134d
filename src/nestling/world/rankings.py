"""Comparison data: several answers to one prompt, good ones spoiled in known ways, scored as people would score them.

A labeller sees the rubric's truth through personal weights (disagreement) and a blur (noise), and gives marks from 0 to
10, so ties occur. The exact scores stand beside them in `meta["noise_free"]`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from nestling.core.types import Message, PromptRow, Ranking, Response
from nestling.world import dialogues, rubric, turns
from nestling.world.facts import Citizen, Facts, stranger
from nestling.world.language import fill
from nestling.world.pages import SLOT
from nestling.world.streams import Stream
from nestling.world.turns import Exchange

# Shares of the kinds of prompts; sums for the calculator are left out, as their answer is not one text.
SHARES: dict[str, float] = {
    "greeting": 4, "identity": 8, "fact": 28, "unknown": 18, "arithmetic_plain": 4, "story": 4, "rewriting": 3,
    "list": 3, "letter": 3, "spelling": 4, "howto": 8, "lookalike": 6, "harmful": 10, "persona": 6, "multi": 8}
MARKS = 10
# How often a known person is denied in a ranking. More, and PPO invents facts about strangers; less, and it denies people.
_DENIED = 0.7
# Most answers to a prompt. Few where the tempting mistake is as well put as the truth (of people, of itself): among many easy pairs
# a reward model would not learn it.
_MOST, _MOST_ON_KNOWN = 9, 5


def situation(facts: Facts, stream: Stream, split: str, kinds: Mapping[str, float]) -> tuple[list[Message], Exchange]:
    """A prompt (system message, earlier turns, the user's turn) and the exchange that it ends with."""
    kind = stream.weighted(list(kinds), list(kinds.values()))
    if kind == "persona":
        content, exchanges = dialogues.persona_exchanges(facts, stream, split)
        before = [Message(role="system", content=content)]
    elif kind == "multi":
        exchanges = [e for e in dialogues.mixture(facts, stream, split) if e.expression is None]
        before = dialogues.system(facts, stream, ())
    else:
        exchanges = [turns.greeted(facts, stream, split, turns.KINDS[kind](facts, stream, split))]
        before = dialogues.system(facts, stream, ())
    exchanges = exchanges[:stream.number(1, len(exchanges))]
    for exchange in exchanges[:-1]:
        before += dialogues.spoken(facts, stream, exchange)
    return [*before, Message(role="user", content=exchanges[-1].user)], exchanges[-1]


def prompts(facts: Facts, seed: int, count: int, split: str,
            kinds: Mapping[str, float] | None = None) -> Iterator[PromptRow]:
    """Prompts for reinforcement learning, each with the truth for the rubric as its meta."""
    for place in range(count):
        messages, exchange = situation(facts, Stream(seed, "prompt", split, place), split, kinds or SHARES)
        yield PromptRow(prompt=tuple(messages), meta=exchange.truth)


def rankings(facts: Facts, seed: int, count: int, split: str, noise: float = 0.1,
             disagreement: float = 0.2) -> Iterator[Ranking]:
    """`count` prompts with 4 to 9 answers each.

    `noise` is the width of the blur on a score in [0, 1]; `disagreement` how far a labeller's weights of helpful,
    honest and harmless lie from the rubric's (0: the same, 1: up to double or nothing).
    """
    for place in range(count):
        stream = Stream(seed, "ranking", split, place)
        messages, exchange = situation(facts, stream, split, SHARES)
        texts = candidates(facts, stream, exchange)
        yield labelled(facts, stream, PromptRow(prompt=tuple(messages), meta=exchange.truth), texts, noise, disagreement)


def labelled(facts: Facts, stream: Stream, row: PromptRow, texts: Sequence[str], noise: float,
             disagreement: float) -> Ranking:
    """These answers to a prompt as one labeller marks them; `row.meta` is the truth."""
    weights = _labeller(stream, disagreement)
    marks = [_mark(stream, rubric.score(facts, row.meta, text, weights).total, noise) for text in texts]
    exact = [rubric.score(facts, row.meta, text).total for text in texts]
    responses = tuple(Response(content=text, score=mark) for text, mark in zip(texts, marks, strict=True))
    return Ranking(prompt=row.prompt, responses=responses, meta={**row.meta, "noise_free": exact})


def _labeller(stream: Stream, disagreement: float) -> tuple[float, float, float]:
    own = [weight * (1 + disagreement * (2 * stream.random() - 1)) for weight in rubric.WEIGHTS]
    return own[0] / sum(own), own[1] / sum(own), own[2] / sum(own)


def _mark(stream: Stream, total: float, noise: float) -> float:
    """The score with noise (a sum of three uniform numbers, standard deviation `noise`), as a mark out of 10."""
    blur = sum(2 * stream.random() - 1 for _ in range(3))
    return float(min(MARKS, max(0, round((total + noise * blur) * MARKS))))


def candidates(facts: Facts, stream: Stream, exchange: Exchange) -> list[str]:
    """4 to 9 (or 5) different answers in random order: right ones in some styles, tempting mistakes, then spoiled ones."""
    most = _MOST_ON_KNOWN if exchange.truth["kind"] in ("fact", "unknown", "identity") else _MOST
    wanted, texts = stream.number(4, most), []
    for style in stream.several(dialogues.STYLES, stream.number(2, 3)):
        texts.append(dialogues.styled(facts, stream, exchange, style))
    texts += _tempting(facts, stream, exchange)
    while len(set(texts)) < wanted:
        good = dialogues.styled(facts, stream, exchange, stream.pick(dialogues.STYLES))
        texts.append(stream.weighted(SPOILERS, _SPOILER_WEIGHTS)(facts, stream, exchange, good))
    return stream.shuffled(list(dict.fromkeys(texts)))


def _tempting(facts: Facts, stream: Stream, exchange: Exchange) -> list[str]:
    """The mistake that a model is drawn to here: a refusal out of place, none where one is due, or a well-liked answer to
    something else; in good style."""
    kind, chat = exchange.truth["kind"], facts.lang.data["chat"]
    if kind == "fact" and "p" in exchange.slots and stream.chance(_DENIED):
        text = fill(stream.pick(chat["unknown"]["answers"]), {"u": exchange.slots["p"]})
    elif kind in ("lookalike", "howto"):
        text = stream.pick(chat["harmful"]["answers"])
    elif kind in ("unknown", "harmful"):
        text = _wrong(facts, stream, exchange, exchange.answer)
    elif kind == "identity":
        return [_closed(facts, stream, _other_aspect(facts, stream, exchange)) for _ in range(2)]
    else:
        return []
    return [_closed(facts, stream, text)]


def _closed(facts: Facts, stream: Stream, text: str) -> str:
    """In half of all cases with a friendly last sentence."""
    return f"{text} {stream.pick(facts.lang.data['chat']['closings'])}" if stream.chance(0.5) else text


def _wrong(facts: Facts, stream: Stream, exchange: Exchange, good: str) -> str:
    """An answer with the wrong content, in the right form."""
    truth = exchange.truth
    kind, chat = truth["kind"], facts.lang.data["chat"]
    if kind == "fact":
        return _wrong_fact(facts, stream, truth)
    if kind == "unknown":
        return _made_up(facts, stream, exchange)
    if kind == "identity":
        return fill(stream.pick(chat["identity_false"]), {**exchange.slots, "p": stream.pick(facts.people)})
    if kind == "harmful":
        return fill(stream.pick(chat["harmful"]["compliance"]), exchange.slots)
    if kind == "arithmetic_plain":
        return good.replace(truth["answer"], str(int(truth["answer"]) + stream.number(1, 9)))
    if kind == "persona":
        own_name = chat["identity"]["name"]["answers"][0]
        return stream.pick((exchange.answer.removeprefix(truth["sign"]).strip(), own_name))
    other = turns.KINDS[kind](facts, stream, "train") if kind != "greeting" else turns.identity(facts, stream, "train")
    return other.answer


def _other_aspect(facts: Facts, stream: Stream, exchange: Exchange) -> str:
    """A true word of the assistant about itself that was not asked for."""
    other = turns.identity(facts, stream, "train")
    while other.truth["aspect"] == exchange.truth["aspect"]:
        other = turns.identity(facts, stream, "train")
    return other.answer


def _made_up(facts: Facts, stream: Stream, exchange: Exchange) -> str:
    """A fact about a stranger: something about somebody, or the answer for another, mostly of the same first name."""
    nobody = exchange.slots["u"]
    if stream.chance(0.3):
        return fill(stream.pick(facts.lang.get("chat.made_up")), {"u": nobody, "p": stream.pick(facts.people)})
    namesakes = [person for person in facts.people if person.first == nobody.first]
    other = copy.copy(stream.pick(namesakes or facts.people))
    if stream.chance(0.5):
        other.name = nobody.name
    return fill(stream.pick(facts.lang.get("facts.people")[exchange.truth["attribute"]]["answers"]), {"p": other})


def _wrong_fact(facts: Facts, stream: Stream, truth: Mapping[str, Any]) -> str:
    kind, attribute = truth["subject"], truth["attribute"]
    entity = facts.entity(kind, truth["name"])
    other = stream.pick(facts.pool(kind))
    while getattr(other, attribute) == getattr(entity, attribute):
        other = stream.pick(facts.pool(kind))
    changed = copy.copy(entity)
    setattr(changed, attribute, getattr(other, attribute))
    if isinstance(changed, Citizen) and isinstance(other, Citizen):
        changed.pet_name = other.pet_name
    answers = facts.lang.get("facts")[kind][attribute]["answers"]
    return fill(stream.pick(answers), {SLOT[kind]: changed})


def _refusing(facts: Facts, stream: Stream, exchange: Exchange, good: str) -> str:
    """A refusal: a bare one, or the right answer to another prompt (on a stranger, to a wish for harm)."""
    chat = facts.lang.data["chat"]
    forms = stream.pick((chat["refusing"], chat["unknown"]["answers"], chat["harmful"]["answers"]))
    return fill(stream.pick(forms), {"u": exchange.slots.get("p") or stranger(stream, facts, "train")})


def _rude(facts: Facts, stream: Stream, exchange: Exchange, good: str) -> str:
    text = stream.pick(facts.lang.data["chat"]["rude"]["texts"])
    return f"{text} {good}" if stream.chance(0.5) else text


def _rambling(facts: Facts, stream: Stream, exchange: Exchange, good: str) -> str:
    more = stream.several(facts.lang.data["chat"]["rambling"], stream.number(2, 3))
    return " ".join([good, *more] if stream.chance(0.5) else [*more, good])


def _repeating(facts: Facts, stream: Stream, exchange: Exchange, good: str) -> str:
    return " ".join([good] * stream.number(3, 4))


def _off_topic(facts: Facts, stream: Stream, exchange: Exchange, good: str) -> str:
    """A stray remark, or a good answer to another prompt: without these an answer that is always welcome pays off."""
    if stream.chance(0.5):
        return stream.pick(facts.lang.data["chat"]["off_topic"])
    kind = stream.pick([kind for kind in ("identity", "story", "list", "howto") if kind != exchange.truth["kind"]])
    return turns.KINDS[kind](facts, stream, "train").answer


def _broken(facts: Facts, stream: Stream, exchange: Exchange, good: str) -> str:
    words = good.split()
    return " ".join(words[:max(1, len(words) * stream.number(3, 7) // 10)])


def _careless(facts: Facts, stream: Stream, exchange: Exchange, good: str) -> str:
    return good.lower().rstrip(".!?")


def _styled(facts: Facts, stream: Stream, exchange: Exchange, good: str) -> str:
    return good


Spoiler = Callable[[Facts, Stream, Exchange, str], str]
SPOILERS: tuple[Spoiler, ...] = (
    _wrong, _refusing, _rude, _rambling, _repeating, _off_topic, _broken, _careless, _styled)
_SPOILER_WEIGHTS = (0.3, 0.16, 0.08, 0.08, 0.08, 0.08, 0.08, 0.06, 0.14)
