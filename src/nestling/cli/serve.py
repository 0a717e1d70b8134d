"""`nestling serve MODEL…`: the service and the page on one port."""

from __future__ import annotations

import gc
import logging
import os
import queue
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from logging.handlers import QueueHandler, QueueListener
from pathlib import Path
from typing import Annotated, Any

import typer
import uvicorn
import yaml
from fastapi import FastAPI

from nestling.core.config import parse
from nestling.core.errors import UserError
from nestling.core.metrics import say
from nestling.core.runtime import detect
from nestling.model.locate import checkpoint_folder
from nestling.serving.app import create_app
from nestling.serving.models import named_folder, open_models
from nestling.serving.moderation import Moderator
from nestling.serving.observing import LOG
from nestling.serving.router import Router
from nestling.serving.runs import RECIPE, Runs
from nestling.serving.settings import ServeSettings
from nestling.serving.store.store import Store
from nestling.tools import Toolbox

KEY_VARIABLE = "NESTLING_API_KEY"
KEYS = f"Lines NAME KEY, with the word runs behind those that may see training runs; {KEY_VARIABLE} gives one that may."
LOG_LINES = 10_000
"""That may wait to be written."""
SWITCH_SECONDS = 0.0005
"""How long the event loop may hold Python's lock while the engine waits for it between two operations; 0.005 costs 2 %."""
STORE, NO_STORE = "nestling.db", "none"
MODELS = typer.Argument(metavar="[MODEL…]", help="Run, checkpoint or Hugging Face folders; NAME=FOLDER names one.")


def serve(
    models: Annotated[list[str] | None, MODELS] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; others than loopback demand a key.")] = None,
    port: Annotated[int | None, typer.Option(help="Port, 8000 unless said; 0 takes a free one.")] = None,
    key_file: Annotated[Path | None, typer.Option(help=KEYS)] = None,
    tool: Annotated[list[str] | None, typer.Option(help="A file of tools/ that the service runs; may repeat.")] = None,
    store: Annotated[
        str, typer.Option(help="Database of conversations and feedback: a file or URL; none for none.")
    ] = STORE,
    moderation: Annotated[Path | None, typer.Option(help="Folder of a moderation model, for all that is said.")] = None,
    router: Annotated[Path | None, typer.Option(help="Folder of a router, for the model name auto.")] = None,
    runs: Annotated[
        Path | None, typer.Option(help="Folder of runs that the page shows; else that of the first MODEL, or ./runs.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML with any settings of the service; options go first.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    log_text: Annotated[bool, typer.Option("--log-text", help="Write prompts and replies to the log too.")] = False,
) -> None:
    """Serve models: an OpenAI-compatible API and a page on one port."""
    given = _read(config)
    given |= {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    given["keys"] = [*given.get("keys", []), *_keys(key_file)]
    given["tools"] = {**given.get("tools", {}), **{name: {} for name in tool or ()}}
    settings = parse(ServeSettings, given | ({"log_text": True} if log_text else {}), "serve")
    with ExitStack() as opened:
        toolbox = opened.enter_context(Toolbox.open(settings.tools, "serve.tools"))
        kept = None if store == NO_STORE else opened.enter_context(closing(Store.open(store)))
        named, shown = _asked(models or [], runs)
        served = open_models(named, settings, device, toolbox)
        app = create_app(
            settings, served, kept, runs=shown,
            moderator=Moderator.load(moderation, detect(device).device) if moderation else None,
            router=Router.load(router) if router else None,
        )  # fmt: skip
        _run(app, settings)


def _asked(models: Sequence[str], runs: Path | None) -> tuple[list[str], Runs]:
    """The models to open, without runs that have none yet, and the runs to show."""
    if runs is not None and not runs.is_dir():
        raise UserError("no such folder", where="--runs", value=runs)
    if not models and runs is None:
        raise UserError("what is to be served?", where="MODEL", fix="name a run or checkpoint folder, or give --runs")
    folders = [named_folder(model)[1] for model in models]
    early = [model for model, folder in zip(models, folders, strict=True) if _has_no_model_yet(folder)]
    for model in early:
        say(f"{model} has no model yet: only its run is shown")
    return [model for model in models if model not in early], Runs(runs) if runs else Runs.around(folders)


def _has_no_model_yet(folder: Path) -> bool:
    try:
        checkpoint_folder(folder)
    except UserError:
        return (folder / RECIPE).is_file()
    return False


def _run(app: FastAPI, settings: ServeSettings) -> None:
    """Listen until Ctrl-C; the port is taken first, so that it can be told."""
    with _listening(settings) as listener, _logging():
        name, port = listener.getsockname()[:2]
        shown = f"[{name}]" if ":" in name else name
        say(f"http://{shown}:{port} · API under /v1 · Ctrl-C ends it")
        seconds = int(settings.shutdown_seconds) + 1
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=seconds)
        sys.setswitchinterval(SWITCH_SECONDS)
        gc.freeze()  # the collector would read all that torch has, again and again, for nothing
        uvicorn.Server(config).run(sockets=[listener])


@contextmanager
def _logging() -> Iterator[None]:
    """Lines to standard error, written by a thread: whoever reads them slowly must not stop the service."""
    lines: queue.SimpleQueue[Any] = queue.SimpleQueue()  # a Queue costs a request a tenth of its time
    listener = QueueListener(lines, logging.StreamHandler())
    log = logging.getLogger(LOG)
    log.setLevel(logging.INFO)
    log.propagate = False
    handler = _DroppingHandler(lines)
    log.addHandler(handler)
    listener.start()
    try:
        yield
    finally:
        log.removeHandler(handler)
        listener.stop()


class _DroppingHandler(QueueHandler):
    """Leaves lines out while `LOG_LINES` of them wait."""

    queue: queue.SimpleQueue[Any]

    def enqueue(self, record: logging.LogRecord) -> None:
        """Called for each line."""
        if self.queue.qsize() < LOG_LINES:
            self.queue.put_nowait(record)


def _listening(settings: ServeSettings) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        what = f"can't listen there: {error.strerror or error}"
        raise UserError(
            what, where="serve", value=f"{settings.host}:{settings.port}", fix="choose another port"
        ) from None


def _read(path: Path | None) -> dict[str, Any]:
    """The settings of a YAML file."""
    if path is None:
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"can't be read: {error}", where=path) from None
    if not isinstance(found, dict):
        raise UserError("is no mapping of settings", where=path, fix="write lines such as rows: 32")
    return found


def _keys(path: Path | None) -> list[dict[str, Any]]:
    """Keys of the file and of the environment."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path else []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can't be read: {error}", where=path) from None
    rows = [line.split() for line in lines if line.strip() and not line.startswith("#")]
    if any(row[2:] not in ([], ["runs"]) or len(row) < 2 for row in rows):
        raise UserError("a line of it is not a name and a key", where=path, fix="write NAME KEY, or NAME KEY runs")
    alone = os.environ.get(KEY_VARIABLE)
    rows += [["default", alone, "runs"]] if alone else []
    return [{"name": name, "secret": secret, "runs": bool(more)} for name, secret, *more in rows]
