"""The table of what a run can do: each figure beside the bar it was held to, for the page and for the console."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nestling.core.intervals import wilson
from nestling.report.records import number

SPOKEN = {
    "bpb_against_ngram": "bits per byte ÷ n-gram's",
    "val_bpb": "bits per byte",
    "pairwise_accuracy": "pairs ordered rightly",
    "noise_free_pairwise_accuracy": "pairs ordered rightly, without noise",
    "win_rate_vs_sft": "wins against SFT",
}  # figures whose key is too short to be understood


@dataclass(frozen=True)
class TableRow:
    """One line: `TableRow("identity", "identity", value=0.97, bar=0.95, n=100, met=True, interval=(0.92, 0.99))`.

    `met` is None where no bar was set. `higher_is_better` False reads the bar as "at most". `is_share` says that
    the value is a share of `n` problems, shown in percent.
    """

    key: str
    title: str
    value: float | None
    bar: float | None = None
    higher_is_better: bool = True
    n: int | None = None
    interval: tuple[float, float] | None = None
    is_share: bool = True

    @property
    def met(self) -> bool | None:
        """Whether the value is on the right side of the bar; a bar without a value is missed."""
        if self.bar is None:
            return None
        if self.value is None:
            return False
        return self.value >= self.bar if self.higher_is_better else self.value <= self.bar

    @property
    def value_text(self) -> str:
        """Such as "97.0 %", "0.72", or a dash where nothing was measured."""
        return "–" if self.value is None else self._written(self.value, places=1)

    @property
    def bar_text(self) -> str:
        """Such as "≥ 95 %", "≤ 0.75", or "reported" where there is no bar."""
        if self.bar is None:
            return "reported"
        return f"{'≥' if self.higher_is_better else '≤'} {self._written(self.bar, places=0)}"

    @property
    def interval_text(self) -> str:
        """Such as "92 – 99 %", or nothing."""
        if self.interval is None:
            return ""
        low, high = self.interval
        return f"{100 * low:.0f} – {100 * high:.0f} %" if self.is_share else f"{low:.3g} – {high:.3g}"

    @property
    def met_text(self) -> str:
        """The word "met", "missed", or nothing."""
        return {True: "met", False: "missed", None: ""}[self.met]

    def _written(self, value: float, places: int) -> str:
        if not self.is_share:
            return short(value)
        exact = places or (0 if abs(100 * value - round(100 * value)) < 1e-9 else 1)
        return f"{100 * value:.{exact}f} %"


def capability_table(report: Mapping[str, Any]) -> list[TableRow]:
    """The rows of a report as `build_report` gives it: the stages' figures that have a bar, then every capability."""
    return [*_stage_rows(report), *_capability_rows(report)]


def _stage_rows(report: Mapping[str, Any]) -> Iterator[TableRow]:
    """Figures that a stage was held to: its report or settings carry `bars: {figure: at least | {at_most: x}}`."""
    for name, stage in report["stages"].items():
        for figure, bar in (stage.get("bars") or {}).items():
            limit, higher = _limit(bar)
            bounds = stage.get(f"{figure}_interval") or [stage.get(f"{figure}_low"), stage.get(f"{figure}_high")]
            yield TableRow(
                key=f"{name}.{figure}",
                title=f"{name}: {SPOKEN.get(figure, spoken(figure))}",
                value=number(stage.get(figure)),
                bar=limit,
                higher_is_better=higher,
                n=_count(stage.get(f"{figure}_n")),
                interval=_bounds(bounds),
                is_share=figure.endswith(("accuracy", "rate")) or "win_rate" in figure,
            )


def _capability_rows(report: Mapping[str, Any]) -> Iterator[TableRow]:
    for name, entry in report["capabilities"].items():
        value = number(entry)
        limit, higher = _limit(entry.get("bar"))
        yield TableRow(
            key=name,
            title=spoken(name),
            value=value,
            bar=limit,
            higher_is_better=higher and bool(entry.get("higher_is_better", True)),
            n=_count(entry.get("n")),
            interval=_interval(entry, share=value),
        )


def _limit(bar: object) -> tuple[float | None, bool]:
    """(limit, higher is better) of 0.95, {"at_least": 0.95}, {"at_most": 0.05} or None."""
    if isinstance(bar, Mapping):
        return (number(bar["at_most"]), False) if "at_most" in bar else (number(bar.get("at_least")), True)
    return number(bar), True


def _count(value: object) -> int | None:
    count = number(value)
    return None if count is None else int(count)


def _interval(entry: Mapping[str, Any], share: float | None) -> tuple[float, float] | None:
    """The 95 % interval that the entry carries; else Wilson's, when the value is a share of n."""
    if (given := _bounds(entry.get("interval") or ())) is not None:
        return given
    count = _count(entry.get("n"))
    if share is None or not count or not 0 <= share <= 1:
        return None
    low, high = wilson(share * count, count)
    return low, high


def _bounds(bounds: Sequence[object]) -> tuple[float, float] | None:
    """Two numbers, or nothing."""
    found = [value for bound in bounds if (value := number(bound)) is not None]
    return (found[0], found[1]) if len(found) == 2 else None


def short(value: float) -> str:
    """A number for reading: "12,345", "0.8341", "6.1"."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def spoken(name: str) -> str:
    """A key as words."""
    return name.replace("_", " ")
