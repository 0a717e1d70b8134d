"""Several ways of decoding side by side on one prompt: what each writes, how likely that is, how varied, how fast.

Every method is asked for the same number of texts. One that always says the same is counted as saying it that often, and
one with beams gives its beams, so `distinct_2` compares like with like. All likelihoods are the model's own, at
temperature 1 and without filters, whatever the text was drawn from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import yaml

from nestling.core import registry
from nestling.core.config import nearest, parse
from nestling.core.errors import UserError
from nestling.generation.engine import Engine
from nestling.generation.sampling import Sampling
from nestling.generation.sequence import Completion, Request
from nestling.model.likelihood import token_logprobs

TREE_TOKENS = 6
"""How long the texts of exhaustive search are: two branches at each place give 64 texts with 32 beginnings."""


@dataclass(frozen=True)
class Method:
    """A way of decoding.

    >>> method("top_k=5,temperature=0.7").sampling.top_k
    5
    """

    name: str
    sampling: Sampling
    idea: str = ""


METHODS = {
    name: Method(name, Sampling(**settings), idea)
    for name, settings, idea in (
        ("greedy", {"temperature": 0.0}, "the likeliest token each time"),
        ("beam", {"strategy": "beam"}, "the likeliest whole text that a search with several hypotheses finds"),
        ("diverse-beam", {"strategy": "diverse_beam"}, "beams that avoid each other's words"),
        ("exhaustive", {"strategy": "exhaustive", "top_k": 2, "max_tokens": TREE_TOKENS},
         f"the likeliest of all texts of {TREE_TOKENS} tokens made of the 2 likeliest at each place"),
        ("contrastive", {"strategy": "contrastive"}, "likely tokens that are unlike what was said"),
        ("pure-sampling", {}, "each token as often as the model says"),
        ("temperature", {"temperature": 0.7}, "likely tokens more often than the model says"),
        ("top-k", {"top_k": 40}, "only the k likeliest tokens"),
        ("top-p", {"top_p": 0.9}, "only the likeliest tokens that reach a probability together"),
        ("min-p", {"min_p": 0.1}, "only tokens not much less likely than the likeliest"),
        ("typical", {"typical_p": 0.9}, "only tokens about as surprising as tokens are here"),
        ("epsilon", {"epsilon_cutoff": 0.01}, "only tokens above a probability"),
        ("eta", {"eta_cutoff": 0.01}, "as epsilon, with a lower bar where the model is unsure"),
        ("stochastic-beam", {"strategy": "stochastic_beam"}, "samples of which no two are the same"),
        ("repetition-penalty", {"temperature": 0.0, "repetition_penalty": 1.3}, "greedy, what was said costs"),
        ("frequency-penalty", {"temperature": 0.0, "frequency_penalty": 0.7}, "greedy, each repetition costs"),
    )
}  # fmt: skip
USUAL = ("greedy", "beam", "contrastive", "pure-sampling", "temperature", "top-k", "top-p", "min-p", "typical", "eta",
         "stochastic-beam")  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What a method wrote, in figures."""

    method: Method
    texts: tuple[str, ...]
    """As many as were asked for; the first is the method's answer."""
    tokens: float
    """Tokens of a text, on average."""
    logprob: float
    """Log-probability per token under the model, in nats, on average over tokens."""
    least: float
    """Log-probability of a text's least likely token, on average over texts: how far into the tail the method reaches."""
    repetition: float
    """Share of the runs of 4 tokens in a text that stood in it before, on average over texts (Welleck et al. 2020)."""
    distinct_1: float
    """Different tokens divided by tokens, over all texts together (Li et al. 2016)."""
    distinct_2: float
    """Different pairs of neighbouring tokens divided by pairs, over all texts together."""
    tokens_per_second: float | None
    """Of one text alone; None for a text that nobody decoded."""
    scored: tuple[tuple[str, float], ...]
    """The first text, token by token, with log-probabilities."""


def method(words: str) -> Method:
    """A method by its name, or by settings such as "top_p=0.5,temperature=0.7" or "strategy=beam,beams=8".

    A setting that `Sampling` does not have is an option of the strategy.

    Raises:
        UserError: neither a known name nor settings.
    """
    if "=" not in words:
        name = words.strip().replace("_", "-")
        if name not in METHODS:
            fix = f"{nearest(words, METHODS)}; or settings such as top_p=0.5,temperature=0.7"
            raise UserError("no such method", where="--method", value=words, fix=fix)
        return METHODS[name]
    given = {name.strip(): _value(text) for name, _, text in (part.partition("=") for part in words.split(","))}
    options = {name: given.pop(name) for name in list(given) if name not in Sampling.model_fields}
    sampling = parse(Sampling, {**given, "options": options}, "--method")
    registry.find("generation.strategies", sampling.strategy).Strategy(options)  # refuses what it does not have
    return Method(words, sampling)


def compare(
    engine: Engine,
    prompt: Sequence[int],
    methods: Sequence[Method],
    *,
    samples: int = 8,
    max_tokens: int = 60,
    seed: int = 1,
    progress: Callable[[str], object] = lambda name: None,
) -> list[Result]:
    """Run the methods one after the other, so that each one's speed is its own.

    Args:
        prompt: token ids.
        samples: texts of each method.
        max_tokens: most tokens of a text, unless the method has fewer.
        progress: called with each method's name before it runs.

    Raises:
        UserError: a prompt that does not fit, or a setting that a strategy refuses.
    """
    engine.generate([Request(prompt, Sampling(max_tokens=2))])  # the first call pays for what is allocated once
    results = []
    for each in methods:
        progress(each.name)
        results.append(_run(engine, prompt, _fitted(each, samples, max_tokens), samples, seed))
    return results


def rows(methods: Iterable[Method], samples: int) -> int:
    """Rows that an engine needs to run these methods."""
    fitted = [_fitted(each, samples, 1).sampling for each in methods]
    made = [registry.find("generation.strategies", s.strategy).Strategy(s.options) for s in fitted]
    return max([samples, *(strategy.rows for strategy in made)])


def reference(engine: Engine, prompt: Sequence[int], text: str) -> Result:
    """The figures of a text that a person wrote."""
    ids = engine.tokenizer.encode(text)
    if not ids:
        raise UserError("the reference is empty", where="--reference")
    written = Completion(ids, [True] * len(ids), [], text, "length")
    return _figures(engine, prompt, Method("reference", Sampling(), "a person's text"), [written], None)


def distinct(texts: Iterable[Sequence[int]], n: int) -> float:
    """Different runs of n tokens divided by all of them, over all texts; 1 where there is none.

    >>> distinct([[1, 2, 1, 2]], 2)
    0.6666666666666666
    """
    runs = [tuple(text[start : start + n]) for text in texts for start in range(len(text) - n + 1)]
    return len(set(runs)) / len(runs) if runs else 1.0


def markdown(prompt: str, results: Sequence[Result]) -> str:
    """The comparison as a page: a table, what the methods are, and every text."""
    lines = [f"# {_cell(prompt)}", "", f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(_cell(value) for value in row(result))} |" for result in results]
    lines += ["", *(f"- {line}" for line in [*LEGEND, *lessons(results)])]
    for result in results:
        lines += ["", f"## {result.method.name}", "", result.method.idea, ""]
        lines += [f"{number}. {_cell(text)}" for number, text in enumerate(result.texts, 1)]
    return "\n".join(lines) + "\n"


def plain(prompt: str, results: Sequence[Result]) -> dict[str, Any]:
    """The comparison as JSON values."""
    return {"prompt": prompt, "methods": [_plain(result) for result in results]}


COLUMNS = ("method", "log p / token", "least", "repeats", "distinct-2", "tokens/s", "text")
LEGEND = (
    "log p / token: how likely the model finds the text, at temperature 1; nearer to 0 is likelier",
    "least: log p of the text's least likely token; a method that cuts the tail off does not go far below 0",
    "repeats: share of the text's runs of 4 tokens that stood in it before",
    "distinct-2: different pairs of tokens over all texts of the method; low: it says the same each time it is asked",
)


def row(result: Result) -> tuple[str, ...]:
    """A line of the table, as `COLUMNS`."""
    speed = "" if result.tokens_per_second is None else f"{result.tokens_per_second:.0f}"
    likely, least, varied = f"{result.logprob:.2f}", f"{result.least:.1f}", f"{result.distinct_2:.2f}"
    return (result.method.name, likely, least, f"{result.repetition:.0%}", varied, speed, result.texts[0])


def settings(method: Method) -> str:
    """What is not as by default: "top_p=0.9", or "strategy=beam, beams=8"."""
    given = method.sampling.model_dump(exclude_defaults=True, exclude={"max_tokens", "options"})
    return ", ".join(f"{name}={value}" for name, value in {**given, **method.sampling.options}.items())


def lessons(results: Sequence[Result]) -> list[str]:
    """What the figures of these results say, in sentences."""
    decoded = [result for result in results if result.tokens_per_second is not None]
    if len(decoded) < 2:
        return []
    likely, varied = max(decoded, key=lambda r: r.logprob), max(decoded, key=lambda r: r.distinct_2)
    worn = max(decoded, key=lambda r: r.repetition)
    said = [
        f"likeliest: {likely.method.name} ({likely.logprob:.2f} per token, with distinct-2 of {likely.distinct_2:.2f})",
        f"most varied: {varied.method.name} (distinct-2 of {varied.distinct_2:.2f}, at {varied.logprob:.2f} per token)",
    ]
    if worn.repetition > 0:
        said.append(f"most repetitive: {worn.method.name} ({worn.repetition:.0%} of its runs of 4 tokens)")
    for person in results:
        if person.tokens_per_second is None and person.logprob < likely.logprob:
            said.append(
                f"a person's text has {person.logprob:.2f} per token: what people write is not the likeliest text"
            )
    return said


def _value(text: str) -> Any:
    return yaml.safe_load(text)


def _fitted(method: Method, samples: int, max_tokens: int) -> Method:
    """A method of the list with as many beams as texts are wanted; settings that were written out stay."""
    given = method.sampling
    changes: dict[str, Any] = {"max_tokens": max_tokens}
    if "max_tokens" in given.model_fields_set:
        changes["max_tokens"] = min(given.max_tokens, max_tokens)
    if method.name in METHODS:
        fields = registry.find("generation.strategies", given.strategy).Strategy.Settings.model_fields
        changes["options"] = {name: samples for name in ("beams", "groups") if name in fields}
    return replace(method, sampling=given.model_copy(update=changes))


def _run(engine: Engine, prompt: Sequence[int], method: Method, samples: int, seed: int) -> Result:
    start = time.perf_counter()
    first = engine.generate([Request(prompt, method.sampling, seed)])[0]
    speed = len(first.ids) / (time.perf_counter() - start)
    strategy = registry.find("generation.strategies", method.sampling.strategy).Strategy
    texts = [first, *first.others][:samples]
    if len(texts) == 1 and strategy.SAMPLES and not method.sampling.greedy:
        texts += engine.generate([Request(prompt, method.sampling, seed + n) for n in range(1, samples)])
    if len(texts) == 1:
        texts *= samples
    return _figures(engine, prompt, method, texts, speed)


def _figures(
    engine: Engine, prompt: Sequence[int], method: Method, texts: Sequence[Completion], speed: float | None
) -> Result:
    ids = [text.ids for text in texts]
    likelihoods = [_likelihood(engine, prompt, text) for text in ids]
    pieces = [piece.text for piece in engine.tokenizer.view(ids[0])]
    return Result(
        method=method,
        texts=tuple(text.text for text in texts),
        tokens=sum(map(len, ids)) / len(ids),
        logprob=sum(map(sum, likelihoods)) / sum(map(len, ids)),
        least=sum(map(min, likelihoods)) / len(ids),
        repetition=sum(1 - distinct([text], 4) for text in ids) / len(ids),
        distinct_1=distinct(ids, 1),
        distinct_2=distinct(ids, 2),
        tokens_per_second=speed,
        scored=tuple(zip(pieces, likelihoods[0], strict=True)),
    )


@torch.inference_mode()
def _likelihood(engine: Engine, prompt: Sequence[int], ids: Sequence[int]) -> list[float]:
    """The model's log-probability of each token of a continuation, at temperature 1."""
    text = torch.tensor([[*prompt, *ids]], device=engine.model.output_weight.device)
    return token_logprobs(engine.model, text[:, :-1], text[:, 1:])[0, len(prompt) - 1 :].tolist()


def _plain(result: Result) -> Mapping[str, Any]:
    figures = {name: value for name, value in vars(result).items() if name != "method"}
    settings = result.method.sampling.model_dump(exclude_defaults=True)
    return {"method": result.method.name, "idea": result.method.idea, "settings": settings, **figures}


def _cell(text: str) -> str:
    """A text on one line of Markdown."""
    return " ".join(text.split()).replace("|", "\\|")
