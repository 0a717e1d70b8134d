"""Tables of a moderation model and of a router, out of the reports that their stages write."""

from __future__ import annotations

import re

from nestling.report.grids import grid, moderation_tables, policies_table
from nestling.report.records import StageRecord

FIGURE = {"value": 0.9, "interval": [0.8, 1.0], "n": 10}
HATE = {"threshold": 0.25, "recall": FIGURE, "precision": FIGURE, "false_positive_rate": {"value": 0.0125},
        "auc": FIGURE, "calibration_error": {"value": None}, "positives": 1200}  # fmt: skip


def cells(html: str) -> list[list[str]]:
    """The words of every row of every table."""
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", html)]


def test_thresholds_confusion_and_reliability() -> None:
    report = {
        "categories": {"hate": HATE},
        "confusion": {"hate": {"hate": 7, "none": 2}, "violence": {}, "none": {"none": 30}},
        "reliability": [{"score": 0.04, "share": 0.05, "n": 4000}],
    }
    rows = cells(moderation_tables(StageRecord("guard", "moderation", report=report)))
    assert ["hate", "0.250", "0.900", "0.900", "0.013", "0.900", "–", "1,200"] in rows
    assert ["", "hate", "none"] in rows
    assert ["hate", "7", "2"] in rows
    assert ["none", "", "30"] in rows
    assert not any(row[0] == "violence" for row in rows)
    assert ["0.040", "0.050", "4,000"] in rows


def test_policies_stand_in_the_order_of_their_cost() -> None:
    policy = {"accuracy": 0.5, "interval": [0.4, 0.6], "cost": 9.0, "cost_share": 0.9, "shares": {"large": 1.0}}
    report = {"policies": {"always large": policy, "router": policy | {"cost": 3.0, "cost_share": 0.3}}}
    rows = cells(policies_table(StageRecord("router", "router", report=report)))
    assert [row[0] for row in rows] == ["policy", "router", "always large"]
    assert rows[1] == ["router", "0.500", "0.400 to 0.600", "0.300", "large 1.000"]


def test_a_stage_that_has_not_finished_has_empty_tables_and_names_are_escaped() -> None:
    assert len(cells(moderation_tables(StageRecord("guard", "moderation")))) == 3
    assert len(cells(policies_table(StageRecord("router", "router")))) == 1
    assert "<b>" not in grid("<b>", ["<b>"], [["<b>\x00"]])
