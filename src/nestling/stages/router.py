"""Train the router of model "auto" on trials, and replay it on others: accuracy against cost, beside one for all."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from nestling.core.config import Config, parse
from nestling.core.pipeline import StageContext
from nestling.core.storage import read_json
from nestling.evaluation.routing import Candidate, Table, Trial, choose
from nestling.model.locate import MODEL
from nestling.serving.router import fit
from nestling.stages._training import Bars, read_split
from nestling.stages.trials import CANDIDATES

VERSION = 1
READS = {"trials": "trials"}
MARGINS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class Settings(Config):
    """How it learns, and how much success it may give up for a cheaper answer."""

    margin: float = Field(0.05, ge=0, le=1, description="Predicted success that may be given up for a cheaper candidate.")
    features: int = Field(4096, ge=16, description="Buckets that words and pairs of words are hashed into.")
    penalty: float = Field(1e-4, ge=0, description="L2 penalty of the regressions.")
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
    router = fit(
        [row.prompt for row in train], learnt, candidates,
        margin=settings.margin, size=settings.features, penalty=settings.penalty,
    )  # fmt: skip
    router.save(context.folder / MODEL)
    success = router.success([row.prompt for row in test])
    order = learnt.mean_costs.argsort()
    cheap, dear = names[order[0]], names[order[-1]]
    reference = table.replay(table.always(dear))
    policies = {f"always {name}": table.replay(table.always(name)) for name in names}
    policies["router"] = table.replay(choose(success, router.costs, settings.margin))
    policies["oracle"] = table.replay(table.oracle())
    rows = {name: policy.to_row(reference) for name, policy in policies.items()}
    sweep = [table.replay(choose(success, router.costs, margin)) for margin in MARGINS]
    return {
        "train_prompts": len(train),
        "test_prompts": len(test),
        "always_small": cheap,
        "always_large": dear,
        "policies": rows,
        "router_accuracy": rows["router"]["accuracy"],
        "router_accuracy_interval": rows["router"]["interval"],
        "router_cost_share": rows["router"]["cost_share"],
        "gain_over_small": policies["router"].gain(policies[f"always {cheap}"])[0],
        "gain_over_large": rows["router"]["gain"],
        "brier_score": float(((success - table.scores) ** 2).mean()),
        "margins": [
            {"margin": margin, "accuracy": policy.accuracy, "cost": policy.cost}
            for margin, policy in zip(MARGINS, sweep, strict=True)
        ],
        "bars": settings.bars,
    }


def _candidates(settings: Settings, context: StageContext, rows: list[Trial]) -> dict[str, Candidate]:
    """By name, as the trials' stage left them or, for trials made elsewhere, as set here; a bare name is a model."""
    path = context.reads["trials"] / CANDIDATES
    known = read_json(path) if path.exists() else {name: {"model": name} for name in (rows[0].outcomes if rows else ())}
    found = {name: parse(Candidate, row, str(path)) for name, row in known.items()}
    return found | settings.candidates
