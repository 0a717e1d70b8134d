"""The reference band of training/health.py from finished runs: how far pre-training had come after so many tokens.

    python benchmarks/reference_band.py runs/demo runs/books …

Progress is 0 at the loss of unigram counts and 1 at that of the n-gram model of the same text. A run folder needs the
stages tokenize, ngram and pretrain. Prints each run's progress, and the lowest and highest of all: the rows of `BAND`.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from nestling.core.metrics import read_metrics
from nestling.core.storage import read_json
from nestling.training.health import BAND, Expected

NEAR = 0.12  # in the logarithm of tokens: rows that are averaged


def progress(run: Path) -> list[float | None]:
    """At each token count of the band, None where the run had no row near it."""
    tokens, ngram = (read_json(run / name / "stage.json")["report"] for name in ("tokenize", "ngram"))
    unigram = ngram["unigram_bits_per_token"] * math.log(2)
    counted = ngram["val_bpb"] * math.log(2) * tokens["val_bytes"] / tokens["val_tokens"]
    expected, found = Expected(unigram=unigram, ngram=counted), []
    rows = [row for row in read_metrics(run / "pretrain" / "metrics.jsonl") if row["loss"] is not None]
    for wanted, _, _ in BAND:
        near = [row["loss"] for row in rows if abs(math.log(row["tokens"] / wanted)) < NEAR]
        found.append(expected.progress(sum(near) / len(near)) if near else None)
    return found


def main() -> None:
    """A line for each run and the band."""
    print(f"{'tokens seen':32}", *(f"{tokens:8.0e}" for tokens, _, _ in BAND))
    table = {name: progress(Path(name)) for name in sys.argv[1:]}
    for name, row in table.items():
        print(f"{name[-32:]:32}", *(f"{value:8.3f}" if value is not None else " " * 8 for value in row))
    for label, choose in (("lowest", min), ("highest", max)):
        known = [[value for value in column if value is not None] for column in zip(*table.values(), strict=True)]
        print(f"{label:32}", *(f"{choose(column):8.3f}" if column else " " * 8 for column in known))


if __name__ == "__main__":
    main()
