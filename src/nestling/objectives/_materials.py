"""What a stage hands to an objective: folders to read, models, loaders, and where and with which seed it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nestling.core.config import nearest
from nestling.core.errors import UserError
from nestling.core.runtime import Runtime
from nestling.model import checkpoint
from nestling.model.adapters import adaptation, copied
from nestling.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class Materials:
    """Inputs of an objective, by role.

    >>> Materials(runtime, seed=1, folder=out, paths={"policy": sft}, given={"prompts": loader})    # doctest: +SKIP

    Args:
        folder: of the stage, for whatever the objective writes.
        paths: folders that the stage reads, by role.
        models: checkpoints that exist only in memory, by role (the fresh model of pre-training, one with adapters).
        given: what the stage made for the objective: loaders, held-out rows, scorers.
    """

    runtime: Runtime
    seed: int
    folder: Path
    paths: Mapping[str, Path] = field(default_factory=dict)
    models: Mapping[str, Checkpoint] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)

    def path(self, role: str) -> Path:
        """The folder of a role.

        Raises:
            UserError: the stage has no such input.
        """
        return _pick(self.paths, role, "this objective needs an input that the stage doesn't have")

    def model(self, role: str) -> Checkpoint:
        """A fresh copy of a role's model to train, on the runtime's device. Two calls share only what is frozen.

        Raises:
            UserError: no such role, or its folder is no checkpoint.
        """
        if role in self.models:
            return _moved(_copied(self.models[role]), self.runtime)
        return checkpoint.load(self.path(role), self.runtime.device)

    def frozen(self, role: str) -> Checkpoint:
        """A role's model to read only: in the runtime's fast dtype, without gradient and dropout.

        Raises:
            UserError: no such role, or its folder is no checkpoint.
        """
        if role in self.models:
            found = self.model(role)
            if adaptation(found.model) is None:  # otherwise its frozen weights are also those of the one that learns
                found.model.to(self.runtime.dtype)
        else:
            found = checkpoint.load(self.path(role), self.runtime.device, self.runtime.dtype)
        for part in (found.model, found.head):
            if part is not None:
                part.requires_grad_(False).eval()
        return found

    def need(self, name: str) -> Any:
        """Something the stage made for the objective.

        Raises:
            UserError: the stage gave nothing of this name.
        """
        return _pick(self.given, name, "this objective needs something that the stage doesn't give")


def _copied(found: Checkpoint) -> Checkpoint:
    return replace(found, model=copied(found.model), head=None if found.head is None else copied(found.head))


def _moved(found: Checkpoint, runtime: Runtime) -> Checkpoint:
    found.model.to(runtime.device)
    if found.head is not None:
        found.head.to(runtime.device)
    return found


def _pick(among: Mapping[str, Any], name: str, what: str) -> Any:
    if name not in among:
        raise UserError(what, value=name, fix=nearest(name, among) if among else "the stage gives none")
    return among[name]
