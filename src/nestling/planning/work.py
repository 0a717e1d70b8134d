"""What a training stage runs through its models, as far as it is known before it runs: the measure of its time and memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from nestling.model.adapters import AdapterSettings
from nestling.model.config import DecoderConfig
from nestling.planning.activations import Microbatch
from nestling.planning.flops import flops_per_token
from nestling.planning.memory import Learning, Memory, Weights, cache_memory, reading_memory, training_memory

Known = Mapping[str, DecoderConfig | int]
"""What is known of a stage's inputs by role: a model's configuration, or a tokenizer's number of tokens."""


@dataclass(frozen=True)
class Work:
    """Each step reads `sequences` of `width` tokens and learns from them in `minibatches` of `microbatches` pieces.

    Pre-training 900 steps of 32 rows: `Work((model,), steps=900, sequences=32, width=256, packed=True)`.
    """

    models: tuple[DecoderConfig, ...]
    """That learn; the first is what the stage leaves."""
    steps: int
    sequences: int
    width: int
    minibatches: int = 1
    microbatches: int = 1
    epochs: int = 1
    """How often a step learns from its sequences."""
    readers: tuple[DecoderConfig, ...] = ()
    """Models that read (or write) every sequence once per step, those that learn included where they do."""
    frozen: tuple[DecoderConfig, ...] = ()
    """Models that are there beside the learning ones."""
    written: int = 0
    """Sequences whose keys and values are held while they are written."""
    packed: bool = False
    logits: bool = True
    exact: bool = True
    """Whether the sequences are known from the settings alone, or taken to be as long as they can be."""
    pieces_setting: str = "objective.microbatches"
    """The setting that divides a step further without another gradient."""
    adapters: AdapterSettings | None = None
    """That learn in the place of the models' weights."""

    @property
    def tokens(self) -> int:
        """Slots that are learnt from in all steps."""
        return self.steps * self.epochs * self.sequences * self.width

    @property
    def rows(self) -> int:
        """Sequences of one microbatch."""
        return -(-self.sequences // (self.minibatches * self.microbatches))

    def flops(self, recompute: bool = False) -> float:
        """Operations of all steps."""
        counted = [flops_per_token(model, self.width, self.logits) for model in self.models]
        learning = sum(found.recomputed() if recompute else found.training for found in counted)
        if self.adapters:
            learning -= sum(found.weight_gradients for found in counted)
            learning += sum(6 * Weights.of(model, self.adapters).used for model in self.models)
        reading = sum(flops_per_token(model, self.width).forward for model in self.readers)
        return float(self.steps * self.sequences * self.width) * (self.epochs * learning + reading)

    def memory(self, how: Way, weights: Weights | None = None) -> Memory:
        """Bytes at the worst moment of a step, on each of the processes that share its sequences.

        Args:
            weights: of all that learns, where not all of it does.
        """
        batch = Microbatch(-(-self.rows // how.processes), self.width, how.dtype, how.device, self.packed)
        learning = Learning(
            batch, how.optimiser, self.microbatches, how.recompute, self.logits, how.heap, self.adapters
        )
        held = Memory(cache=sum(cache_memory(m, self.written, dtype=how.dtype) for m in self.models[:1]))
        for number, model in enumerate(self.models):
            mine = Weights(0, 0, 0) if weights and number else weights
            held += training_memory(model, learning, mine)
        return sum((reading_memory(model, how.dtype) for model in self.frozen), held)

    def divided(self, pieces: int) -> Work:
        """The same step in so many microbatches."""
        return replace(self, microbatches=pieces)


@dataclass(frozen=True)
class Way:
    """How work is done: `Way(torch.bfloat16, "cpu", ADAMW)`. `processes` share the sequences of each step."""

    dtype: torch.dtype
    device: str
    optimiser: Mapping[str, int]
    recompute: bool = False
    processes: int = 1
    heap: bool = True
    """As in `Learning`."""
