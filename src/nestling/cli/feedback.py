"""`nestling feedback export|stats|review|delete STORE`: what people said, as data, as figures, looked at, or gone."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nestling.core.errors import UserError
from nestling.core.metrics import say
from nestling.serving.store.export import Counts, Filters
from nestling.serving.store.export import export as write
from nestling.serving.store.store import Store

Action = Literal["export", "stats", "review", "delete"]


def feedback(
    action: Annotated[Action, typer.Argument(help="export, stats, review or delete.")],
    store: Annotated[str, typer.Argument(metavar="STORE", help="A file, sqlite:///… or postgresql://…")],
    out: Annotated[Path | None, typer.Option(help="export: folder for the files.")] = None,
    since: Annotated[
        str | None, typer.Option(help="export: judgements from this day or time on, as 2026-01-31.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="export: only replies of this model.")] = None,
    with_flagged: Annotated[
        bool, typer.Option("--with-flagged", help="export: rankings and conversations with reported messages too.")
    ] = False,
    clean: Annotated[
        float, typer.Option(min=0, help="export: most labels of clean messages for each label that was reviewed.")
    ] = 1.0,
    trust_reports: Annotated[
        bool, typer.Option("--trust-reports", help="export: reports that nobody reviewed count as upheld.")
    ] = False,
    uphold: Annotated[list[str] | None, typer.Option(help="review: this report or verdict is right.")] = None,
    reject: Annotated[list[str] | None, typer.Option(help="review: this report or verdict is wrong.")] = None,
    owner: Annotated[str | None, typer.Option(help="Only what the holder of this API key wrote.")] = None,
    conversation: Annotated[str | None, typer.Option(help="delete: this conversation.")] = None,
    before: Annotated[
        str | None, typer.Option(help="delete: conversations not touched since this day or time.")
    ] = None,
    everything: Annotated[bool, typer.Option("--everything", help="delete: all conversations.")] = False,
) -> None:
    """Export what people said as training data, count it, review reports and verdicts, or delete conversations."""
    if action == "export" and out is None:
        raise UserError("where to?", where="--out", fix="name a folder: --out feedback")
    if action == "delete" and [conversation is None, before is None, not everything].count(False) != 1:
        raise UserError("delete what?", where="delete", fix="give one of --conversation, --before, --everything")
    start, end = _seconds("--since", since), _seconds("--before", before)
    opened = _open(store, owner)
    try:
        if action == "export" and out is not None:
            _show(write(opened, out, Filters(start or 0.0, model, with_flagged, clean, trust_reports)), out)
        elif action == "stats":
            _stats(opened)
        elif action == "review":
            _review(opened, {**dict.fromkeys(uphold or (), True), **dict.fromkeys(reject or (), False)})
        elif conversation is not None:
            opened.conversations.delete(conversation)
            say("deleted 1 conversation")
        else:
            conversations, responses = opened.conversations.delete_all(end), opened.responses.forget_all(end)
            verdicts = _forget(opened, owner, end)
            say(f"deleted {conversations:,} conversations, {responses:,} responses, {verdicts:,} verdicts")
    finally:
        opened.close()


def _open(address: str, owner: str | None) -> Store:
    """The store, which must be there: a misspelt name would make an empty one."""
    path = address.removeprefix("sqlite:///")
    if "://" not in path and not Path(path).expanduser().is_file():
        raise UserError("no such store", where=address, fix="name the file that nestling serve --store wrote")
    store = Store.open(address)
    return store if owner is None else store.of(owner)


def _forget(store: Store, owner: str | None, before: float | None) -> int:
    """Verdicts on texts outside any conversation belong to nobody, so they go only when everybody's do."""
    return store.moderation.forget(before) if owner is None else 0


def _show(counts: Counts, out: Path) -> None:
    table = Table(title=str(out))
    for name in ("", "rows"):
        table.add_column(name, justify="right" if name else "left")
    for kind, count in sorted(counts.written.items()):
        table.add_row(kind, f"{count:,}")
    for reason, count in sorted(counts.left_out.items()):
        table.add_row(f"left out: {reason}", f"{count:,}")
    Console(highlight=False).print(table)


def _review(store: Store, said: dict[str, bool]) -> None:
    """Note what the operator says, then list what is left to look at."""
    for id, upheld in said.items():
        store.moderation.review(id, upheld)
    table = Table(title="to look at: --uphold ID or --reject ID")
    for name in ("id", "what", "categories", "text"):
        table.add_column(name, no_wrap=name == "id")
    for case in store.moderation.cases():
        told = f"{case.text}\n({case.comment})" if case.comment else case.text
        table.add_row(case.id, case.kind, ", ".join(case.categories), Text(told))
    Console(highlight=False).print(table)


def _stats(store: Store) -> None:
    table = Table(show_header=False)
    for name, count in store.feedback.stats().model_dump().items():
        table.add_row(name.replace("_", " "), f"{count:,}")
    console = Console(highlight=False)
    console.print(table)
    standings = store.arena.table().data
    if standings:
        arena = Table(title="blind comparisons: ratings by Bradley and Terry")
        for name in ("model", "rating", "95 % interval", "won", "tied", "lost"):
            arena.add_column(name, justify="left" if name == "model" else "right")
        for row in standings:
            cells = (row.model, f"{row.rating:.0f}", f"{row.low:.0f} … {row.high:.0f}", row.wins, row.ties, row.losses)
            arena.add_row(*map(str, cells))
        console.print(arena)


def _seconds(option: str, text: str | None) -> float | None:
    """Unix seconds of a day or time in ISO's form; UTC unless it says otherwise."""
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(
            "not a day or time", where=option, value=text, fix="write 2026-01-31 or 2026-01-31T14:00"
        ) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
