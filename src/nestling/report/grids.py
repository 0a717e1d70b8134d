"""Tables of what sorts texts: a moderation model's thresholds, confusion and reliability, and a router's policies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from nestling.report.records import StageRecord, number
from nestling.report.table import spoken

NOT_TEXT = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\ud800-\\udfff\\ufffe\\uffff]")
FIGURES = ("threshold", "recall", "precision", "false_positive_rate", "auc", "calibration_error")


def text(value: object) -> str:
    """Escaped for HTML; control characters and lone surrogates, which no page may hold, become �."""
    return escape(NOT_TEXT.sub("�", str(value)))


def grid(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column names the rows and whose others are figures."""
    names = "".join(f"<th{' class=right' if place else ''}>{text(name)}</th>" for place, name in enumerate(head))
    lines = (
        "".join(f"<td{' class=right' if place else ''}>{text(cell)}</td>" for place, cell in enumerate(row))
        for row in rows
    )
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<h3>{text(title)}</h3><div class="card scroll"><table><tr>{names}</tr>{body}</table></div>'


def moderation_tables(stage: StageRecord) -> str:
    """Threshold and figures of each category, what was taken for what, and how often a score was right."""
    categories, confusion = stage.report.get("categories") or {}, stage.report.get("confusion") or {}
    said = [name for name in confusion if any(name in row for row in confusion.values())]
    head = ["category", *map(spoken, FIGURES), "texts"]
    found = [
        [name, *(_share(row.get(one)) for one in FIGURES), f"{row.get('positives', 0):,}"]
        for name, row in categories.items()
    ]
    taken = [[name, *(str(row.get(other, "")) for other in said)] for name, row in confusion.items() if row]
    reliable = [
        [f"{row['score']:.3f}", f"{row['share']:.3f}", f"{row['n']:,}"] for row in stage.report.get("reliability") or ()
    ]
    return (
        grid(f"{stage.name}: thresholds", head, found)
        + grid(f"{stage.name}: what was (rows) and what was said", ["", *said], taken)
        + grid(
            f"{stage.name}: reliability, all categories", ["mean score", "share that applied", "judgements"], reliable
        )
    )


def policies_table(stage: StageRecord) -> str:
    """Accuracy against cost of each way of choosing who answers."""
    policies = sorted((stage.report.get("policies") or {}).items(), key=lambda item: item[1]["cost"])
    rows = [
        [name, _share(row["accuracy"]), " to ".join(map(_share, row["interval"])), _share(row["cost_share"]),
         ", ".join(f"{who} {_share(share)}" for who, share in row["shares"].items())]
        for name, row in policies
    ]  # fmt: skip
    return grid(stage.name, ["policy", "accuracy", "95 % interval", "cost", "who answers"], rows)


def _share(value: Any) -> str:
    """A share with three digits, also of a figure with its interval; a dash for one that could not be measured."""
    found = number(value)
    return "–" if found is None else f"{found:.3f}"
