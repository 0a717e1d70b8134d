"""The folder is the registry: `training/schedules/cosine.py` *is* the schedule "cosine".

A new algorithm is one new file. A dotted name (`my_lab.schedules.bump`) works too, so an experiment can live outside.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from nestling.core.config import nearest
from nestling.core.errors import UserError


def names(folder: str) -> list[str]:
    """The names that a folder offers, sorted; files that begin with an underscore are the folder's own helpers.

    Args:
        folder: dotted path below `nestling`, such as "training.schedules".
    """
    package = importlib.import_module(f"nestling.{folder}")
    return sorted(item.name for item in pkgutil.iter_modules(package.__path__) if not item.name.startswith("_"))


def find(folder: str, name: str, where: str | None = None) -> ModuleType:
    """The module of `folder` called `name` (dashes read as underscores), or any importable dotted module.

    Args:
        where: the setting that holds the name, for the error.

    Raises:
        UserError: nothing has that name; lists the folder and suggests the nearest.
    """
    wanted = name.replace("-", "_")
    if wanted in names(folder):
        return importlib.import_module(f"nestling.{folder}.{wanted}")
    if "." in name:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise UserError("no such module", where=where, value=name, fix=str(error)) from None
    what = f"nothing in {folder.replace('.', '/')} has this name"
    raise UserError(what, where=where, value=name, fix=nearest(name, names(folder)))
