"""One dial for a whole model: `depth` layers, 64 times as wide, one head for every 64 of the width.

    depth   width   heads   weights of the blocks          (12 · depth · width² of them, about 49 k · depth³)
        2     128       2     0.4 M
        4     256       4     3.2 M
        8     512       8    25   M
       12     768      12    85   M

The rates of training go with it. Muon's steps have a fixed size as maps (spectral norm), whatever the shape of the matrix,
and hidden matrices begin at N(0, 1/fan_in) with the residual branches at zero (`initialisation.py`): so one rate serves
every width (Yang et al., 2023, arXiv 2310.17813; Jordan et al., 2024). AdamW's steps have a fixed size per weight, and the
output layer sums D of them: beyond the widths where it was measured, the rate of embeddings and output layer falls.

Held-out loss after 100 steps of 4,096 tokens of the embedded world (vocabulary 2,048, wsd, one run each): AdamW's best rate
doesn't move with the width, Muon's by half from depth 4 on, where it makes 0.016 at most. Of Muon, with AdamW at 0.01, then
of AdamW, with Muon at 0.02:

    depth   0.005   0.01    0.02    0.04    0.08            0.0025  0.005   0.01    0.02    0.04
        1   2.898   2.801   2.726   2.741   2.953           3.757   3.113   2.726   2.651   2.647
        2   2.362   2.213   2.172   2.239   2.344           2.788   2.358   2.172   2.142   2.137
        4   1.927   1.907   1.923   1.952   1.938           2.174   1.965   1.923   1.864   1.842

At depth 6, both at 0.02: 1.775; Muon at 0.01: 1.763; AdamW at 0.04: 1.755.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nestling.core.errors import UserError

ASPECT = HEAD = 64
MUON_RATE = 0.02
ADAM_RATE, TUNED_WIDTH, FALL = 0.02, 384, 0.5
"""AdamW's rate up to the widest model that it was looked for in (half of what was best in so short a run), and the power of
the width with which it falls beyond: between none and the 1 of theory, as others have chosen who share one rate."""
TOKENS_PER_WEIGHT = 20
"""That a model of a given cost is best trained on (Hoffmann et al., 2022, arXiv 2203.15556)."""


def with_depth(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a model in which `depth` has become sizes; what is named beside it stays as it is.

    >>> with_depth({"depth": 6, "n_layers": 8})
    {'d_model': 384, 'n_layers': 8, 'n_heads': 6}

    Raises:
        UserError: no whole number of layers, or the sizes are named already.
    """
    given = {name: value for name, value in settings.items() if name != "depth"}
    depth = settings["depth"]
    if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1:
        raise UserError("the number of layers is a whole number from 1", where="depth", value=depth)
    if {"d_model", "n_layers", "n_heads"} <= given.keys():
        fix = "leave out depth, or d_model, n_layers and n_heads"
        raise UserError("depth has nothing left to set beside all three sizes", where="depth", value=depth, fix=fix)
    width, head = given.get("d_model", ASPECT * depth), given.get("head_size") or HEAD
    for name, size in {"d_model": width, "head_size": head}.items():
        if not isinstance(size, int) or size < 1:
            raise UserError("sizes are whole numbers from 1", where=name, value=size)
    return {"d_model": width, "n_layers": depth, "n_heads": max(1, width // head), **given}


def rates(width: int) -> dict[str, float]:
    """Peak learning rates for a model of this width: Muon's for hidden matrices, AdamW's for the rest.

    >>> rates(256)
    {'learning_rate': 0.02, 'adam_learning_rate': 0.02}
    """
    return {"learning_rate": MUON_RATE, "adam_learning_rate": round(ADAM_RATE * min(1.0, TUNED_WIDTH / width) ** FALL, 4)}
