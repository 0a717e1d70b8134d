"""Is my loss normal? What a curve says about its run, in words: while it runs, and afterwards in the report.

A rule looks at the rows logged so far and at what was `Expected` of the loss before the first step: guessing (ln V), the
unigram entropy, a 5-gram model. What it finds is a sentence and the setting to try; it stays silent where it can't know.

The reference band. "Progress" is 0 where the loss is that of unigram counts and 1 where it is that of the 5-gram model of
the same text. Over tokens seen, progress hardly depends on text or size: `BAND` holds the lowest and the highest of 19
own healthy pre-trainings (four texts: the world, Gutenberg books, Tang poems, one author; 0.04 to 5.9 million parameters;
1,500 to 8,192 tokens a step; Muon). benchmarks/reference_band.py prints it from run folders. It is used with a margin,
and only where something like it was measured: more than 100 steps, a text of at most `CORPUS` tokens.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nestling.core import ranks
from nestling.core.metrics import read_metrics, say
from nestling.training.hooks import Hook, Run

Points = list[tuple[float, float]]
BAND = ((1e5, 0.31, 0.53), (3e5, 0.48, 0.86), (1e6, 0.67, 1.25), (3e6, 0.91, 1.24), (7e6, 1.08, 1.17))
"""(tokens seen, lowest, highest progress)."""
MARGIN, STEP, CORPUS = 0.15, 8192, 3e7  # of progress; most tokens that a step counts for; tokens of text
ENOUGH = 20  # logged rows below which a curve says nothing
SPIKE = 10.0  # times its usual size that a gradient's norm must reach
NO_GRADIENT = 1e-7  # of the largest norm


@dataclass(frozen=True)
class Expected:
    """Losses to compare with, in nats per unit of the objective; None where nobody knows.

    >>> Expected(chance=6.24, unigram=5.3, ngram=2.1, corpus_tokens=60_000).progress(3.7)
    0.5
    """

    chance: float | None = None
    unigram: float | None = None
    ngram: float | None = None
    corpus_tokens: float | None = None

    def progress(self, loss: float) -> float | None:
        """The share of the way from unigram counts to the 5-gram model."""
        if self.unigram is None or self.ngram is None or self.ngram >= self.unigram:
            return None
        return (self.unigram - loss) / (self.unigram - self.ngram)


@dataclass(frozen=True)
class Symptom:
    """`Symptom("diverging", "The loss rose …", "training.learning_rate: 0.007")`: what is seen and what to try."""

    kind: str
    text: str
    fix: str


@dataclass(frozen=True)
class Curve:
    """A run so far. `policy`: learns from rewards, so that its loss has no floor to fall to."""

    rows: Sequence[Mapping[str, Any]]
    expected: Expected = field(default_factory=Expected)
    rate: float = 0.0
    policy: bool = False
    epochs: float | None = None

    def series(self, name: str) -> Points:
        """(step, value) of one logged number, where it was finite."""
        pairs = ((row.get("step"), row.get(name)) for row in self.rows)
        return [
            (s, v) for s, v in pairs if isinstance(s, (int, float)) and isinstance(v, (int, float)) and math.isfinite(v)
        ]

    def level(self, until: float = 1.0) -> float:
        """The loss at a share of the rows: a mean over a twentieth of them, at least three."""
        losses = [value for _, value in self.series("loss")]
        end = max(1, round(until * len(losses)))
        return statistics.fmean(losses[max(0, end - max(3, len(losses) // 20)) : end])

    @property
    def tokens(self) -> float:
        """Tokens seen, where a step counts for no more than those of the reference runs."""
        return min(float(self.rows[-1].get("tokens", 0)), STEP * float(self.rows[-1]["step"]))

    def rates(self, factor: float) -> str:
        """The setting with another learning rate."""
        return f"training.learning_rate: {self.rate * factor:.2g}"


def diverging(curve: Curve) -> Iterator[Symptom]:
    """The loss ended clearly above the best it had been, and so lost a good part of what had been learnt."""
    points = curve.series("loss")
    width = max(5, len(points) // 20)
    means = [statistics.fmean(value for _, value in points[n - width : n]) for n in range(width, len(points) + 1)]
    best, last = min(means), means[-1]
    if last - best > max(0.3 * abs(best), 0.1, 0.15 * (points[0][1] - best)):
        step = points[means.index(best) + width - 1][0]
        text = f"The loss rose from {best:.3g} at step {step:.0f} to {last:.3g}: training came apart."
        yield Symptom("diverging", text, curve.rates(1 / 3))


def exploded(curve: Curve) -> Iterator[Symptom]:
    """The loss was once far above guessing, and little has been learnt since."""
    losses = [value for _, value in curve.series("loss")][3:]
    peak = max((statistics.fmean(losses[n : n + 3]) for n in range(len(losses) - 2)), default=0.0)
    chance, level = curve.expected.chance, curve.level()
    if chance is not None and peak > 1.1 * chance and level > 0.9 * min(chance, curve.expected.unigram or chance):
        text = f"The loss went up to {peak:.3g}, where guessing gives {chance:.3g}, and is {level:.3g}: the first steps threw "
        yield Symptom(
            "rate too high", f"{text}the weights far off.", f"{curve.rates(0.1)}, or a longer training.warmup"
        )


def at_chance(curve: Curve) -> Iterator[Symptom]:
    """Nothing beyond guessing has been learnt."""
    chance, level = curve.expected.chance, curve.level()
    if chance is not None and level >= 0.97 * chance and curve.rows[-1]["step"] >= 50:
        text = f"The loss is {level:.3g} and guessing gives {chance:.3g}: nothing has been learnt. A much larger rate tells "
        text += "whether the weights are trained at all; if nothing changes, inputs and targets don't belong together."
        yield Symptom("at chance", text, curve.rates(10))


def at_unigram(curve: Curve) -> Iterator[Symptom]:
    """How frequent tokens are has been learnt, and nothing since."""
    unigram, level = curve.expected.unigram, curve.level()
    if unigram is None or curve.rows[-1]["step"] < 100 or abs(level - unigram) > 0.05 * unigram:
        return
    if curve.level(0.5) - level < 0.02 * unigram:
        text = f"The loss stays at {level:.3g}, the entropy of single tokens ({unigram:.3g}): the model knows how frequent "
        text += (
            "they are and not what stands before. A lower rate helps if it was too high; else look at the attention."
        )
        yield Symptom("at unigram", text, curve.rates(1 / 3))


def flat(curve: Curve) -> Iterator[Symptom]:
    """Nothing was learnt at all; a curve that has flattened after learning is how training ends."""
    points = smooth(curve.series("loss"))
    first, last = points[0][1], points[-1][1]
    if abs(first - last) < 0.01 * abs(first) and curve.rows[-1]["step"] >= 50:
        text = f"The loss hardly moved ({first:.3g} to {last:.3g}): nothing was learnt."
        yield Symptom("flat", text, curve.rates(10))


def spikes(curve: Curve) -> Iterator[Symptom]:
    """The gradient's norm jumped, again and again, beyond what it was shortly before."""
    usual = [value for _, value in curve.series("grad_norm")]
    largest = [row.get("grad_norm_max") or row.get("grad_norm") or 0.0 for row in curve.rows]
    if len(usual) != len(largest):
        return
    high = [n for n in range(10, len(usual)) if largest[n] > SPIKE * statistics.median(usual[max(0, n - 20) : n])]
    if len(high) >= max(3, 0.01 * len(usual)):
        text = (
            f"The gradient's norm jumped to more than {SPIKE:.0f} times its usual size in {len(high)} of {len(usual)} "
        )
        text += f"logged rows, first at step {curve.rows[high[0]]['step']}."
        yield Symptom("gradient spikes", text, f"{curve.rates(1 / 3)}, or training.clip: 0.3")


def no_gradient(curve: Curve) -> Iterator[Symptom]:
    """A layer got no gradient in three looks running."""
    looks = [set(str(row.get("dead_layers", "")).split(", ")) - {""} for row in list(curve.rows)[-3:]]
    if len(curve.rows) > 5 and (dead := set.intersection(*looks)):
        text = f"No gradient reaches {', '.join(sorted(dead))}: it learns nothing."
        yield Symptom(
            "dead layers", text, f"{curve.rates(1 / 3)}; or another model.activation, model.init or model.norm"
        )


def below_band(curve: Curve) -> Iterator[Symptom]:
    """Less was learnt than by any reference run of this length."""
    progress, band = curve.expected.progress(curve.level()), band_of(curve)
    if progress is None or band is None or progress >= band[0] - MARGIN:
        return
    falling = _falls([value for _, value in curve.series("loss")])
    text = f"{summary(curve)} It still falls steadily: the learning rate is probably too low."
    if not falling:
        text = f"{summary(curve)} It has stopped falling early: the learning rate is probably too high."
    yield Symptom("rate too low" if falling else "rate too high", text, curve.rates(3 if falling else 1 / 3))


def _falls(losses: list[float]) -> bool:
    """Whether the loss still falls, beyond its noise, once the first steep steps are over and before the rate decays."""
    early, late = (losses[round(a * len(losses)) : round((a + 0.2) * len(losses))] for a in (0.1, 0.4))
    error = math.sqrt(statistics.pvariance(early) / len(early) + statistics.pvariance(late) / len(late))
    return statistics.fmean(early) - statistics.fmean(late) > 2 * error


def too_good(curve: Curve) -> Iterator[Symptom]:
    """Far below what counting gives: own runs end at half the 5-gram's loss, and no model comes near a fifth of it."""
    held_out = curve.series("val_loss")
    seen_once = curve.epochs is not None and curve.epochs <= 1.5
    found = held_out[-1][1] if held_out else curve.level() if seen_once else None
    if found is not None and curve.expected.ngram is not None and found < 0.2 * curve.expected.ngram:
        text = f"The loss of {found:.3g} is far below a 5-gram model's ({curve.expected.ngram:.3g}): the answer leaks into the "
        text += "input (a mask that lets the model see what comes), or held-out text stands in the training text."
        yield Symptom("too good", text, "look at the attention mask, and at the split of the corpus")


Rule = Callable[[Curve], Iterator[Symptom]]
LEARNING: tuple[Rule, ...] = (exploded, at_chance, at_unigram, flat, below_band)
"""How little was learnt, the plainest first: one that applies says it all."""


def symptoms(curve: Curve) -> list[Symptom]:
    """Everything that looks wrong; nothing while there are too few rows."""
    if len(curve.series("loss")) < ENOUGH:
        return []
    found = [*spikes(curve), *no_gradient(curve)]
    if not curve.policy:
        little = next(((symptom,) for rule in LEARNING for symptom in rule(curve)), ())
        found = [*diverging(curve), *little, *too_good(curve), *found]
    return found


def band_of(curve: Curve) -> tuple[float, float] | None:
    """Lowest and highest progress of reference runs that had seen as many tokens; None where none was like this one."""
    beyond = (curve.expected.corpus_tokens or math.inf) > CORPUS or curve.rows[-1]["step"] < 100
    if beyond or curve.tokens < BAND[0][0]:
        return None
    place = min(bisect_left([tokens for tokens, _, _ in BAND], curve.tokens), len(BAND) - 1)
    (t0, *low), (t1, *high) = BAND[max(place - 1, 0)], BAND[place]
    share = min(1.0, math.log(curve.tokens / t0) / math.log(t1 / t0)) if place else 0.0
    below, above = (a + share * (b - a) for a, b in zip(low, high, strict=True))
    return below, above


def summary(curve: Curve) -> str | None:
    """Where the loss stands, in a sentence; None without baselines."""
    if not curve.series("loss") or (progress := curve.expected.progress(level := curve.level())) is None:
        return None
    known = curve.expected
    text = f"The loss of {level:.3g} is {progress:.0%} of the way from unigram counts ({known.unigram:.3g}) to a 5-gram model "
    text += f"({known.ngram:.3g})"
    if band := band_of(curve):
        text += f"; reference runs were at {band[0]:.0%} to {band[1]:.0%} after {curve.tokens:.1e} tokens"
    return f"{text}."


def smooth(points: Points, share: float = 0.02) -> Points:
    """Exponential moving average over about `share` of the points, started without bias towards the first one."""
    decay = 1 - 1 / max(1.0, share * len(points))
    total = weight = 0.0
    smoothed = []
    for step, value in points:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        smoothed.append((step, total / weight))
    return smoothed


def without_gradient(norms: Mapping[str, float]) -> list[str]:
    """Repeated blocks none of whose parameters has a gradient to speak of; what an objective leaves unused is no block."""
    layers: dict[str, float] = {}
    for name, norm in norms.items():
        parts = name.split(".")
        if number := next((n for n, part in enumerate(parts) if part.isdigit()), 0):
            layer = ".".join(parts[: number + 1])
            layers[layer] = max(layers.get(layer, 0.0), norm)
    largest = max(norms.values(), default=0.0)
    return [name for name, norm in layers.items() if norm <= NO_GRADIENT * largest < math.inf]


class Watching(Hook):
    """Looks at the curve about a hundred times in a run, says each thing that looks wrong once, and a verdict at the end."""

    def __init__(self, expected: Expected, quiet: bool = False, policy: bool = False) -> None:
        self.expected, self.quiet, self.policy = expected, quiet, policy
        self.rows: list[dict[str, Any]] = []
        self.said: set[str] = set()

    def on_start(self, run: Run) -> None:
        """Take up the rows of an earlier attempt."""
        log = run.folder / "metrics.jsonl"
        self.rows = [row for row in read_metrics(log) if row["step"] <= run.step] if log.exists() else []

    def on_step(self, run: Run) -> None:
        """Note what will be logged; now and then judge it."""
        if not run.every(run.settings.log_every):
            return
        if dead := without_gradient(run.gradients()):
            run.row["dead_layers"] = ", ".join(dead)
        self.rows.append(run.row)
        looks = max(run.settings.log_every, run.settings.steps // 100)
        past_warmup = run.step > 2 * run.settings.warmup * run.settings.steps
        if past_warmup and (run.last or run.step % looks < run.settings.log_every):
            self._judge(run)

    def on_end(self, run: Run) -> None:
        """Where the loss stands."""
        if verdict := summary(self._curve(run)):
            self._say(run, verdict)

    def _curve(self, run: Run) -> Curve:
        return Curve(self.rows, self.expected, run.settings.learning_rate, self.policy)

    def _judge(self, run: Run) -> None:
        for symptom in symptoms(self._curve(run)):
            if symptom.kind not in self.said:
                self.said.add(symptom.kind)
                self._say(run, f"step {run.step}: {symptom.text} Try {symptom.fix}.")

    def _say(self, run: Run, text: str) -> None:
        if ranks.is_main() and not self.quiet:
            say(f"{run.folder.name}: {text}")
