"""What the training loop asks of an objective, and nothing else.

The loop knows no model and no algorithm. It asks for updates, makes one number of their terms, and steps the optimiser:

    for step in 1..steps:
        for update in objective.updates(step):              # an offline objective yields one, PPO epochs x minibatches
            for microbatch in update.microbatches:
                terms = objective.terms(microbatch)
                (sum(t.weight * t.sum / update.counts[t.per] for t in terms)).backward()
            optimizer.step()

Because every term is a *sum* and is divided once by a *global* count, accumulation, packing and data parallelism give
the gradient of the large batch exactly; a mean of microbatch means does not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

MICROBATCH = "microbatch"


@dataclass(frozen=True)
class Term:
    """One addend of the loss: a differentiable sum over units, and the unit that it is counted in.

    >>> Term("cross_entropy", token_losses.sum(), per="tokens")             # doctest: +SKIP

    `per` names an entry of `Update.counts` (`tokens`, `pairs`, `sequences`) or is `"microbatch"` for a term that
    doesn't decompose into units (expert balance, in-batch contrast): such a term is averaged over microbatches.
    `weight` 0.0 reports a sum without training on it.
    """

    name: str
    sum: Tensor
    per: str
    weight: float = 1.0


@dataclass(frozen=True)
class Update:
    """All data of one optimiser step.

    `counts` holds the number of each unit over the whole update and **all ranks** (`core.ranks.sum_over_ranks`), known
    before the first backward: `Update([rows[0:8], rows[8:16]], {"tokens": 4096})`. The count of `microbatch` is
    added by the loop. `tokens` is also what throughput is measured in, where present.
    """

    microbatches: Sequence[Any]
    counts: Mapping[str, float] = field(default_factory=dict)


class Objective(ABC):
    """What is learnt: the modules, the data of each step, and the terms of the loss.

    The loop calls `updates`, `terms` and `validate` in the precision context it trains in, so that experience is scored
    exactly as it is learnt from. Anything random is drawn from streams named by (seed, step), never from state that a
    resumed run would lack; state that must survive a restart (an adaptive coefficient) goes through `state_dict`.
    """

    fixed_shapes: ClassVar[bool] = True
    """Whether every microbatch has the same shape. `compile: auto` leaves others alone: each width compiles anew."""

    @abstractmethod
    def trainable(self) -> dict[str, nn.Module]:
        """The modules whose parameters are trained, by name; two modules may share parameters."""

    @abstractmethod
    def updates(self, step: int) -> Iterable[Update]:
        """The updates of one step (counted from 1).

        May be a generator: the loop takes an optimiser step before it asks for the next update, and exhausts the
        generator, so code after the last `yield` sees the policy after the step's learning.
        """

    @abstractmethod
    def terms(self, microbatch: Any) -> list[Term]:
        """The terms of the loss on one microbatch, as sums."""

    def metrics(self) -> dict[str, float]:
        """Further numbers of the step that was just learnt (KL, entropy, reward …); asked once after each step."""
        return {}

    def validate(self) -> dict[str, float]:
        """Held-out figures with the current weights; asked by the validation hook, without gradient and dropout.

        Their names begin with `val_` (`val_loss`, `val_bpb`): they share the row with the step's own numbers.
        """
        return {}

    def finished(self) -> str | None:
        """A sentence why training should end after this step (a KL budget is spent), or None to go on.

        Asked after each step and after each validation.
        """
        return None

    def flops_per_token(self) -> float | None:
        """Forward + backward FLOPs per counted token; None lets the loop use 6 x trainable parameters."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """JSON values and tensors that `load_state_dict` needs to go on exactly; parameters are saved by the loop."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
