"""The models of a service by name, each with its engine's driver, its tokenizer and where it comes from."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from nestling.core.config import nearest
from nestling.core.errors import UserError
from nestling.core.native import release_threads
from nestling.core.runtime import detect
from nestling.generation.engine import Engine
from nestling.model import checkpoint
from nestling.model.locate import MODEL, checkpoint_folder
from nestling.serving.driver import Driver
from nestling.serving.errors import ApiError
from nestling.serving.settings import ServeSettings
from nestling.tokenizer.bpe import Tokenizer
from nestling.tools import Toolbox

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
AUTO = "auto"
"""The name of no model: the router chooses."""


@dataclass(frozen=True)
class Served:
    """A model that answers under a name."""

    name: str
    driver: Driver
    tokenizer: Tokenizer
    provenance: Mapping[str, Any] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))
    """Unix seconds."""
    toolbox: Toolbox = field(default_factory=lambda: Toolbox({}))
    """What the service runs for this model by itself."""
    workers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(32, "nestling-tool"))
    """Where it runs: threads of its own, so that slow tools keep neither the store nor other replies waiting."""

    @property
    def kind(self) -> Literal["chat", "base"]:
        """Whether it holds conversations or only continues text."""
        return "base" if self.tokenizer.chat_template is None else "chat"

    @property
    def context(self) -> int:
        """Longest prompt with reply, in tokens."""
        return self.driver.engine.capacity

    @cached_property
    def fingerprint(self) -> str:
        """The same for the same checkpoint: what OpenAI calls system_fingerprint."""
        origin = [self.tokenizer.hash, self.driver.engine.model.parameter_count(), dict(self.provenance)]
        text = json.dumps(origin, sort_keys=True, default=str)
        return f"fp_{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}"


class Models:
    """What a service offers, in the order in which it was given; the first one is the default."""

    def __init__(self, served: Sequence[Served]) -> None:
        self._served = {one.name: one for one in served}
        if len(self._served) != len(served):
            raise UserError("two models have the same name", where="MODEL", fix="name them: small=FOLDER large=FOLDER")
        if AUTO in self._served:
            raise UserError("this name belongs to the router", where="MODEL", value=AUTO, fix="choose another")

    def __iter__(self) -> Iterator[Served]:
        return iter(self._served.values())

    @property
    def default(self) -> Served:
        """The model that answers where none is named.

        Raises:
            ApiError: 503, the service shows runs that have none yet.
        """
        if not self._served:
            raise ApiError("this service has no model yet", status=503, code="no_model")
        return next(iter(self))

    def get(self, name: str) -> Served:
        """The model called `name`.

        Raises:
            ApiError: 404, there is none.
        """
        if name not in self._served:
            fix = nearest(name, self._served)
            raise ApiError(
                f"the model {name!r} does not exist; {fix}", status=404, code="model_not_found", param="model"
            )
        return self._served[name]

    def chat(self, name: str) -> Served:
        """The model called `name`, which must hold conversations.

        Raises:
            ApiError: there is none, or it only continues text.
        """
        found = self.get(name)
        if found.kind == "base":
            what = f"{name!r} is a base model: it continues text, it does not chat; use /v1/completions"
            raise ApiError(what, code="unsupported_model", param="model")
        return found

    def start(self) -> None:
        """Let every driver work for the running event loop, whose thread may have loaded them."""
        release_threads()
        for one in self:
            one.driver.start()

    async def stop(self, seconds: float) -> None:
        """End every driver, each after at most so long, and begin no further tool."""
        for one in self:
            await one.driver.stop(seconds)
            one.workers.shutdown(wait=False, cancel_futures=True)


def open_models(
    paths: Sequence[str], settings: ServeSettings, device: str = "auto", toolbox: Toolbox | None = None
) -> Models:
    """Load the models that a command names: FOLDER, or NAME=FOLDER. They share the toolbox.

    Raises:
        UserError: no model there, one that scores instead of writing, or two of one name.
    """
    return Models([open_served(name, folder, settings, device, toolbox) for name, folder in map(named_folder, paths)])


def open_served(
    name: str, folder: Path, settings: ServeSettings, device: str = "auto", toolbox: Toolbox | None = None
) -> Served:
    """Load one model.

    Raises:
        UserError: as `open_models`.
    """
    place = checkpoint_folder(folder)
    found = checkpoint.load(place, detect(device).device)
    if found.head is not None:
        raise UserError("this is a reward model: it scores replies, it writes none", where=place, fix="name another")
    dtype = None if settings.dtype == "fp32" else DTYPES[settings.dtype]
    engine = Engine(
        found.model, found.tokenizer, rows=settings.rows, capacity=settings.capacity, dtype=dtype, frozen=True
    )
    created = int(place.stat().st_mtime)
    driver = Driver(engine, max_requests=settings.max_requests, flush_seconds=settings.flush_seconds)
    workers = ThreadPoolExecutor(settings.tool_threads, "nestling-tool")
    return Served(name, driver, found.tokenizer, found.provenance, created, toolbox or Toolbox({}), workers)


def named_folder(text: str) -> tuple[str, Path]:
    """(name, folder) of a MODEL: "runs/demo" is called demo, "runs/demo/sft/model" sft, "small=runs/demo" small."""
    name, mark, rest = text.partition("=")
    if mark and name and not Path(text).exists():
        return name, Path(rest)
    folder = Path(text).resolve()
    return (folder.parent if folder.name == MODEL else folder).name, Path(text)
