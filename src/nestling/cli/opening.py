"""Opening the model that a command names."""

from __future__ import annotations

from pathlib import Path

from nestling.core.errors import UserError
from nestling.core.runtime import detect
from nestling.model import checkpoint
from nestling.model.checkpoint import Checkpoint
from nestling.model.locate import checkpoint_folder


def open_writer(path: Path, device: str) -> Checkpoint:
    """The model of a run, checkpoint or Hugging Face folder, to write text with.

    Raises:
        UserError: no model there, or one that scores instead of writing.
    """
    folder = checkpoint_folder(path)
    found = checkpoint.load(folder, detect(device).device)
    if found.head is not None:
        fix = "name the run, or its sft or ppo folder"
        raise UserError("this is a reward model: it scores replies, it writes none", where=folder, fix=fix)
    return found
