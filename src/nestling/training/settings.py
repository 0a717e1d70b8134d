"""The settings of a training run, with defaults that suit small models and short runs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from nestling.core.config import Config
from nestling.core.registry import find


class ParallelSettings(Config):
    """How the processes of a run share its work; on a single process all of it is nothing.

    data x tensor processes take part. Processes that share the layers of one model (`tensor`) are neighbours.
    """

    data: Literal["auto"] | int = Field(
        default="auto", description="Shares that each batch is divided into; auto uses all processes there are."
    )
    shard: Literal["none", "full", "hybrid"] = Field(
        default="none",
        description="Who holds weights, gradients and optimiser state: each process all of them; all processes one piece "
        "each (full); or the processes of each machine together (hybrid).",
    )
    shard_size: int = Field(
        default=0, ge=0, description="Processes that hold one copy together under hybrid; 0: those of one machine."
    )
    tensor: int = Field(default=1, ge=1, description="Processes that share every layer's heads and features.")


class TrainSettings(Config):
    """How to train. What to train on and what to minimise belong to the objective.

    >>> TrainSettings(steps=2000).optimizer
    'muon'
    """

    steps: int = Field(ge=1, description="Steps of the loop; an on-policy objective may take several updates in each.")
    optimizer: str = Field(default="muon", description="A file of training/optimizers/: muon, adamw.")
    learning_rate: float = Field(default=0.02, gt=0, description="Peak learning rate; of hidden matrices under muon.")
    adam_learning_rate: float | None = Field(
        default=None, gt=0, description="Peak rate of what Muon leaves to AdamW; a fifth of learning_rate if not set."
    )
    weight_decay: float = Field(default=0.01, ge=0, description="Decoupled weight decay, on matrices only.")
    momentum: float = Field(default=0.95, ge=0, lt=1, description="Momentum of Muon.")
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="Decay rates of AdamW's two moments.")
    epsilon: float = Field(default=1e-8, gt=0, description="Added to AdamW's denominator.")
    schedule: str = Field(default="wsd", description="A file of training/schedules/: wsd, cosine, constant.")
    warmup: float = Field(default=0.02, ge=0, le=1, description="Share of the steps in which the rate rises from zero.")
    decay: float = Field(default=0.4, ge=0, le=1, description="Share of the steps, at the end, in which wsd falls.")
    floor: float = Field(default=0.0, ge=0, le=1, description="Share of the peak rate that is left at the last step.")
    clip: float = Field(default=1.0, ge=0, description="Largest global norm of the gradient; 0 doesn't clip.")
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = Field(
        default="auto",
        description="Matmul precision; auto takes the runtime's: bf16 where the hardware is fast at it. fp8 is for compiled "
        "runs of large models on GPUs that have units for it.",
    )
    compile: Literal["auto", "on", "off"] = Field(
        default="auto", description="Compile the repeated block; auto does where the run is long enough to gain by it."
    )
    # These change who computes and what is kept, not what comes out, so a stage's key leaves them out: a run goes on
    # with another number of processes.
    recompute: Literal["none", "blocks"] = Field(
        default="none",
        exclude=True,
        description="What the backward pass computes again instead of remembering: nothing, or the repeated blocks, "
        "for a third more work and a fraction of the memory.",
    )
    ignore_memory: bool = Field(
        default=False, exclude=True, description="Start even where the memory that is free will not do."
    )
    parallel: ParallelSettings = Field(
        default=ParallelSettings(), exclude=True, description="How several processes (torchrun) share the work."
    )
    log_every: int = Field(default=10, ge=1, description="Steps between rows of metrics.jsonl.")
    validate_every: int = Field(default=0, ge=0, description="Steps between validations; 0 validates only at the end.")
    save_every: float = Field(default=60.0, ge=0, description="Seconds between saved states; 0 saves after every step.")
    keep: int = Field(default=2, ge=1, description="How many saved states are kept.")

    @field_validator("compile", mode="before")
    @classmethod
    def _yaml_reads_on_as_true(cls, choice: object) -> object:
        return {True: "on", False: "off"}[choice] if isinstance(choice, bool) else choice

    @field_validator("optimizer")
    @classmethod
    def _known_optimizer(cls, name: str) -> str:
        find("training.optimizers", name)
        return name

    @field_validator("schedule")
    @classmethod
    def _known_schedule(cls, name: str) -> str:
        find("training.schedules", name)
        return name
