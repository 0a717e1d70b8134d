"""Train the router of model "auto" on trials, and replay it on others: accuracy against cost, beside one for all."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from nestling.core.config import parse
from nestling.core.pipeline import StageContext
from nestling.core.storage import read_json
from nestling.evaluation.classification import calibration_error
from nestling.evaluation.routing import Candidate, Policy, Table, Trial, choose
from nestling.model.locate import MODEL
from nestling.serving.router import MARGINS, Learning, fit
from nestling.stages._training import Bars, read_split
from nestling.stages.trials import CANDIDATES

VERSION = 2
READS = {"trials": "trials"}


class Settings(Learning):
    """How it learns, and who answers."""

    candidates: dict[str, Candidate] = Field(
        {}, description="Model and effort behind a name of the trials, where the served model is called otherwise."
    )
    bars: Bars = Field({}, description="Limits that the report holds figures to.")


def run(settings: Settings, context: StageContext) -> dict[str, Any]:
    """Fit on the training trials; report every policy on the held-out ones."""
    train, test = (read_split(context.reads["trials"], split, Trial) for split in ("train", "val"))
    candidates = _candidates(settings, context, train)
    names = list(candidates)
    learnt, table = Table.of(train, names), Table.of(test, names)
    router = fit([row.prompt for row in train], learnt, candidates, settings)
    router.save(context.folder / MODEL)
    success = router.success([row.prompt for row in test])
    cheap, *_, dear = (names[place] for place in learnt.mean_costs.argsort())
    policies = _policies(table, choose(success, router.costs, router.margin))
    others = {"small": policies[f"always {cheap}"], "large": policies[f"always {dear}"], "coin": policies["coin"]}
    gains = {name: policies["router"].gain(other) for name, other in others.items()}
    rows = {name: policy.to_row(others["large"]) for name, policy in policies.items()}
    sweep = {margin: table.replay(choose(success, router.costs, margin)) for margin in MARGINS}
    errors = [calibration_error(success[:, n], table.scores[:, n] > 0.5) for n in range(len(names))]
    return {
        "train_prompts": len(train),
        "test_prompts": len(test),
        "always_small": cheap,
        "always_large": dear,
        "policies": rows,
        "margin": router.margin,
        "router_accuracy": rows["router"]["accuracy"],
        "router_accuracy_interval": rows["router"]["interval"],
        "router_cost_share": rows["router"]["cost_share"],
        **{f"gain_over_{name}": gain for name, (gain, _) in gains.items()},
        **{f"gain_over_{name}_interval": list(interval) for name, (_, interval) in gains.items()},
        "brier_score": float(((success - table.scores) ** 2).mean()),
        "calibration_error": float(np.mean(errors)),
        "calibration_errors": dict(zip(names, errors, strict=True)),
        "margins": [
            {"margin": margin, "accuracy": policy.accuracy, "cost": policy.cost} for margin, policy in sweep.items()
        ],
        "bars": settings.bars,
    }


def _policies(table: Table, chosen: NDArray[np.intp]) -> dict[str, Policy]:
    """One candidate for all, the router, the best coin for the router's cost, chance, and what no router can beat."""
    router = table.replay(chosen)
    return {
        **{f"always {name}": table.replay(table.always(name)) for name in table.names},
        "router": router,
        "coin": table.coin(router.cost),
        "random": table.random(),
        "oracle": table.replay(table.oracle()),
    }


def _candidates(settings: Settings, context: StageContext, rows: list[Trial]) -> dict[str, Candidate]:
    """By name, as the trials' stage left them or, for trials made elsewhere, as set here; a bare name is a model."""
    path = context.reads["trials"] / CANDIDATES
    known = read_json(path) if path.exists() else {name: {"model": name} for name in (rows[0].outcomes if rows else ())}
    found = {name: parse(Candidate, row, str(path)) for name, row in known.items()}
    return found | settings.candidates
