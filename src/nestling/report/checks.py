"""What looks wrong: plain sentences about a run, found by small rules over its curves, figures and answers.

A rule is a function of the run that yields findings; `RULES` lists them in the order of the page. A rule reads what is
recorded and stays silent where a stage or a number is missing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from nestling.report.records import Points, Row, Run, StageRecord
from nestling.report.table import TableRow
from nestling.training.health import Curve, Expected, smooth, symptoms

MOST_EPOCHS = 4
FEW_PROBLEMS = 50  # below this a share moves by several percent with each problem


@dataclass(frozen=True)
class Finding:
    """`Finding("wrong", "sft", "The loss …")`; "wrong" asks for something to be done, "note" only to be known."""

    weight: Literal["wrong", "note"]
    where: str
    text: str


def find_wrongs(run: Run, table: list[TableRow], answers: list[Row]) -> list[Finding]:
    """Every finding about a run, the serious ones first."""
    found = [finding for stage in run.stages for rule in STAGE_RULES for finding in rule(stage)]
    found += [*_missed_bars(table), *_rough_figures(table), *_answers(answers)]
    return sorted(found, key=lambda finding: finding.weight == "note")


def _unfinished(stage: StageRecord) -> Iterator[Finding]:
    if stage.finished is None:
        yield Finding("wrong", stage.name, "This stage was begun and not completed; run the recipe again to resume it.")


def _not_finite(stage: StageRecord) -> Iterator[Finding]:
    broken = [row.get("step") for row in stage.rows if "loss" in row and row["loss"] is None]
    if broken:
        text = f"The loss was not a number in {len(broken)} of {len(stage.rows)} rows, first at step {broken[0]}: "
        yield Finding("wrong", stage.name, text + "try a third of training.learning_rate, or training.precision: fp32.")


def _curve(stage: StageRecord) -> Iterator[Finding]:
    """What the loss and the gradients say: see `training.health`."""
    if stage.rows:
        for symptom in symptoms(curve_of(stage)):
            yield Finding("wrong", stage.name, f"{symptom.text} Try {symptom.fix}.")


def curve_of(stage: StageRecord) -> Curve:
    """A stage's rows beside what was expected of its loss."""
    expected, rate = Expected(**(stage.report.get("expected") or {})), stage.setting("learning_rate") or 0.0
    return Curve(stage.rows, expected, rate, stage.trains_policy, stage.figure("epochs"))


def _repeated(stage: StageRecord) -> Iterator[Finding]:
    """Text that is read more often than it should be, and held-out text that is no longer that."""
    if (share := stage.figure("leaked_share") or 0.0) > 0.01:
        text = f"{share:.0%} of the held-out documents stand in the training text word for word: held-out figures flatter. "
        yield Finding("wrong", stage.name, text + "Try the corpus' de-duplication, or another seed of its split.")
    if (share := stage.figure("copied_share") or 0.0) > 0.05:
        text = f"{share:.0%} of the training documents are copies of another one. Try the corpus' de-duplication."
        yield Finding("wrong", stage.name, text)
    if (share := stage.figure("repeated_share") or 0.0) > 0.01:
        epochs = stage.figure("epochs") or 0.0
        text = f"{share:.0%} of the rows came more often than {epochs:.2g} passes over the data explain: rows are copies of "
        yield Finding(
            "wrong", stage.name, text + "each other, or the loader repeats itself. Try the corpus' de-duplication."
        )
    if (epochs := stage.figure("epochs") or 0.0) > MOST_EPOCHS and stage.kind == "pretrain":
        text = (
            f"The text was read {epochs:.1f} times; beyond about {MOST_EPOCHS} a repetition teaches less than new text "
        )
        yield Finding("note", stage.name, text + "(Muennighoff et al. 2023). Try fewer training.steps, or most_epochs.")


def _overfitted(stage: StageRecord) -> Iterator[Finding]:
    held_out = stage.first_series("val_bpb", "val_loss")
    if len(held_out) < 4:
        return
    step, best = min(held_out, key=lambda point: point[1])
    last = held_out[-1][1]
    if last > 1.02 * best:
        text = f"On held-out text it was best at step {step:.0f} ({best:.3g}) and ended at {last:.3g}: "
        text += "it began to learn its training data by heart. Try more data, or fewer training.steps."
        yield Finding("wrong", stage.name, text)


def _no_better_than_counting(stage: StageRecord) -> Iterator[Finding]:
    model, ngram = stage.figure("val_bpb"), stage.figure("ngram_bpb")
    if model is not None and ngram is not None and model >= ngram:
        text = f"The network needs {model:.3f} bits per byte, the n-gram model only {ngram:.3f}: "
        yield Finding(
            "wrong", stage.name, text + "it has not learnt more than counting would. Try more training.steps."
        )


def _reward_by_chance(stage: StageRecord) -> Iterator[Finding]:
    accuracy = stage.figure("pairwise_accuracy")
    if accuracy is not None and accuracy < 0.55:
        text = f"It orders {accuracy:.0%} of held-out pairs rightly; guessing gives 50 %. "
        text += "Try more training.steps, and look at the rankings."
        yield Finding("wrong", stage.name, text)


def _over_optimised(stage: StageRecord) -> Iterator[Finding]:
    """The learnt reward still rises while the true one falls: the policy is exploiting the reward model."""
    proxy, true = smooth(_steadiest(stage, "proxy_reward")), smooth(_steadiest(stage, "true_reward"))
    if len(proxy) < 4 or len(true) < 4:
        return
    step, best = max(true, key=lambda point: point[1])
    spread = best - min(value for _, value in true)
    at_best = next((value for at, value in proxy if at >= step), proxy[-1][1])
    if best - true[-1][1] > max(0.25 * spread, 0.03 * abs(best)) and proxy[-1][1] > at_best:
        text = f"After step {step:.0f} the learnt reward rose on while the true reward fell from {best:.3g} to "
        text += f"{true[-1][1]:.3g}: the policy exploits the reward model. Try a lower objective.kl_budget."
        yield Finding("wrong", stage.name, text)


def _steadiest(stage: StageRecord, name: str) -> Points:
    """The series on held-out prompts where it was measured often enough, else the one of the training prompts."""
    held_out = stage.series(f"val_{name}")
    return held_out if len(held_out) >= 4 else stage.series(name)


def _lost_to_sft(stage: StageRecord) -> Iterator[Finding]:
    win_rate = stage.figure("win_rate_vs_sft")
    if win_rate is not None and win_rate < 0.5:
        text = f"Its answers win against the SFT model's in only {win_rate:.0%} of the prompts. Try a higher objective.beta."
        yield Finding("wrong", stage.name, text)


def _entropy_gone(stage: StageRecord) -> Iterator[Finding]:
    points = smooth(stage.series("entropy"))
    if len(points) >= 4 and points[0][1] > 0 and points[-1][1] < 0.2 * points[0][1]:
        text = f"Entropy fell from {points[0][1]:.2g} to {points[-1][1]:.2g}: "
        text += "the policy hardly varies any more. Try objective.entropy_bonus."
        yield Finding("note", stage.name, text)


def _length_drifted(stage: StageRecord) -> Iterator[Finding]:
    points = smooth(stage.series("response_tokens"))
    if len(points) >= 4 and points[0][1] > 0 and not 0.5 < points[-1][1] / points[0][1] < 2:
        text = f"Answers went from {points[0][1]:.0f} to {points[-1][1]:.0f} tokens: is length what is rewarded?"
        yield Finding("note", stage.name, text)


def _skipped_rows(stage: StageRecord) -> Iterator[Finding]:
    skipped = stage.figure("skipped_rows") or stage.figure("skipped")
    if skipped:
        yield Finding("note", stage.name, f"{skipped:.0f} bad rows of the input were skipped.")
    for figure, fate in (("dropped", "left out"), ("cut", "cut")):
        if count := stage.figure(figure):
            yield Finding("note", stage.name, f"{count:.0f} rows were longer than the context and were {fate}.")


def _missed_bars(table: list[TableRow]) -> Iterator[Finding]:
    for row in table:
        if row.met is False:
            text = f"{row.title} reached {row.value_text}, the bar is {row.bar_text}."
            yield Finding("wrong", "bars", text[:1].upper() + text[1:])


def _rough_figures(table: list[TableRow]) -> Iterator[Finding]:
    few = [row.title for row in table if row.n is not None and row.n < FEW_PROBLEMS]
    if few:
        yield Finding("note", "bars", f"Measured on fewer than {FEW_PROBLEMS} problems, so roughly: {', '.join(few)}.")


def _answers(answers: list[Row]) -> Iterator[Finding]:
    """A model that gives everybody one answer, or that repeats itself."""
    for model in answer_columns(answers):
        texts = [str(row[model]).strip() for row in answers if row.get(model)]
        if len(texts) < 4:
            continue
        text, times = Counter(texts).most_common(1)[0]
        if times > len(texts) / 2:
            sentence = f"gives the same answer to {times} of {len(texts)} prompts: “{text[:60]}”."
            yield Finding("note", model, f"The {model} model {sentence}")
        repeating = sum(bool(re.search(r"\b(\w+)(\W+\1\b){3}", answer)) for answer in texts)
        if repeating:
            text = f"The {model} model says one word over and over in {repeating} of its answers."
            yield Finding("note", model, text)


def answer_columns(answers: list[Row]) -> list[str]:
    """The models that answered, in the order in which the rows name them."""
    return list(dict.fromkeys(key for row in answers for key in row if key not in ("prompt", "kind")))


STAGE_RULES = (
    _unfinished, _not_finite, _curve, _repeated, _overfitted, _no_better_than_counting,
    _reward_by_chance, _over_optimised, _lost_to_sft, _entropy_gone, _length_drifted, _skipped_rows,
)  # fmt: skip
