"""The curves of a run as SVG text that takes its colours and fonts from the page around it.

matplotlib draws with stand-in colours; `_adopt` replaces each by a CSS variable, so one figure serves light and dark.
What is plotted from which stage stands in `plots`; how it is drawn, in `draw`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from nestling.report.records import Points, Run, StageRecord, number
from nestling.training.health import smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, GRID = "#010203", "#010204"
LINES = ("#010205", "#010206", "#010207", "#010208")
VARIABLES = {INK: "ink", GRID: "grid", **{colour: f"line{n}" for n, colour in enumerate(LINES, 1)}}
MOST_POINTS = 300  # more than a figure of this width can show


@dataclass(frozen=True)
class Curve:
    """One line of a plot; a noisy one is drawn faintly, with its moving average on top."""

    label: str
    points: Points
    noisy: bool = False


@dataclass(frozen=True)
class Plot:
    """A figure to draw: `Plot("pretrain", "Training loss", "nats per token", [Curve("loss", [(1, 7.6), (2, 7.1)])])`.

    `levels` are horizontal lines to compare with, as (label, value).
    """

    stage: str
    title: str
    unit: str
    curves: list[Curve]
    levels: list[tuple[str, float]] = field(default_factory=list)


def plots(run: Run) -> list[Plot]:
    """Every plot that the run has numbers for, in the order of its stages."""
    found = []
    for stage in run.stages:
        usual = _policy if stage.trains_policy else _loss_only
        special = {"pretrain": _pretrain, "reward": _reward}.get(stage.kind, usual)
        found += [plot for plot in special(stage) if any(len(curve.points) > 1 for curve in plot.curves)]
    return found


def _loss_only(stage: StageRecord) -> Iterator[Plot]:
    curves = [Curve("training", stage.series("loss"), noisy=True), Curve("held out", stage.series("val_loss"))]
    counted = number((stage.report.get("expected") or {}).get("ngram"))
    levels = [] if counted is None else [("n-gram model", counted)]
    yield Plot(stage.name, "Loss", "nats per token", curves, levels)


def _pretrain(stage: StageRecord) -> Iterator[Plot]:
    yield from _loss_only(stage)
    ngram = number(stage.report.get("ngram_bpb"))
    levels = [] if ngram is None else [("n-gram model", ngram)]
    yield Plot(stage.name, "Held-out text", "bits per byte", [Curve("network", stage.series("val_bpb"))], levels)


def _reward(stage: StageRecord) -> Iterator[Plot]:
    curves = [
        Curve("training", stage.series("pairwise_accuracy"), noisy=True),
        Curve("held out", stage.series("val_pairwise_accuracy")),
        Curve("held out, without labelling noise", stage.series("val_noise_free_pairwise_accuracy")),
    ]
    yield Plot(stage.name, "Pairs ordered rightly", "share", curves, [("guessing", 0.5)])
    held_out = Curve("held out", stage.first_series("val_pair_loss", "val_loss"))
    losses = [Curve("training", stage.series("loss"), noisy=True), held_out]
    yield Plot(stage.name, "Loss", "nats per pair", losses)


def _policy(stage: StageRecord) -> Iterator[Plot]:
    yield Plot(stage.name, "Reward while learning", "mean per answer", _rewards(stage, "", noisy=True))
    yield Plot(stage.name, "Reward on held-out prompts", "mean per answer", _rewards(stage, "val_", noisy=False))
    budget = stage.setting("kl_budget")
    levels = [] if budget is None else [("budget", budget)]
    yield Plot(stage.name, "Distance from the SFT model", "KL, nats", [Curve("KL", stage.series("kl"), True)], levels)
    yield Plot(stage.name, "Entropy", "nats per token", [Curve("entropy", stage.series("entropy"), noisy=True)])
    length = stage.series("response_tokens")
    yield Plot(stage.name, "Answer length", "tokens", [Curve("length", length, noisy=True)])


def _rewards(stage: StageRecord, prefix: str, noisy: bool) -> list[Curve]:
    """The reward that is learnt from beside the one that is meant."""
    names = {"learnt reward (proxy)": "proxy_reward", "true reward": "true_reward"}
    return [Curve(label, stage.series(prefix + name), noisy) for label, name in names.items()]


def draw(plot: Plot, number_on_page: int) -> str:
    """An `<svg>` element; `number_on_page` keeps its ids apart from those of the page's other figures."""
    import matplotlib as mpl  # half a second; only the report needs it
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "nestling",
        "font.size": 9,
        "axes.unicode_minus": True,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(4.8, 2.7), layout="constrained")
        FigureCanvasSVG(figure)
        _fill(figure.add_subplot(), plot)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _adopt(file.getvalue(), f"f{number_on_page}", f"{plot.stage}: {plot.title}")


def _fill(axes: Axes, plot: Plot) -> None:
    shown = [curve for curve in plot.curves if curve.points]
    for curve, colour in zip(shown, LINES, strict=False):
        line = thin(smooth(curve.points) if curve.noisy else curve.points)
        if curve.noisy:
            axes.plot(*zip(*thin(curve.points), strict=True), color=colour, linewidth=0.8, alpha=0.3)
        marker = "o" if len(line) <= 40 and not curve.noisy else None
        axes.plot(*zip(*line, strict=True), color=colour, linewidth=1.8, label=curve.label, marker=marker, markersize=3)
    for label, value in plot.levels:
        axes.axhline(value, color=INK, linewidth=1.2, linestyle=(0, (5, 3)), label=f"{label} {value:.3g}")
    low, high = _range(shown, [value for _, value in plot.levels])
    axes.set_ylim(low, high)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel(plot.unit, color=INK)
    axes.tick_params(colors=INK, length=0, labelsize=8)
    axes.grid(True, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
    if len(shown) + len(plot.levels) > 1:
        axes.legend(frameon=False, labelcolor=INK, fontsize=8)


def _range(curves: list[Curve], levels: list[float]) -> tuple[float, float]:
    """Limits that show the curves' course; the steep first steps of training may leave the picture."""
    values = list(levels)
    for curve in curves:
        calm = smooth(curve.points) if curve.noisy else curve.points
        values += [value for _, value in calm[len(calm) // 25 :]]
    low, high = min(values), max(values)
    margin = 0.07 * (high - low) or 0.05 * abs(high) or 0.05
    return low - margin, high + margin


def thin(points: Points) -> Points:
    """At most `MOST_POINTS` points: means of equal runs of neighbours."""
    if len(points) <= MOST_POINTS:
        return points
    edges = [round(n * len(points) / MOST_POINTS) for n in range(MOST_POINTS + 1)]
    groups = [points[start:end] for start, end in pairwise(edges)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _adopt(svg: str, prefix: str, title: str) -> str:
    """Make matplotlib's file a part of the page: no prolog, own ids, the page's fonts, CSS variables for colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r"font: (?:\d+ )?([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"(font-size: [\d.]+px); font-family: [^;\"]*", r"\1", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    box = re.search(r'viewBox="([^"]+)"', svg)
    start = f'<svg viewBox="{box[1] if box else ""}" role="img" aria-label="{escape(title)}">'
    return start + svg[svg.index(">") + 1 :]
