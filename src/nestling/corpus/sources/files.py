"""The user's own data: text files, JSON lines (.gz, .zst), Parquet, or folders of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field

from nestling.core.config import Config
from nestling.core.errors import UserError
from nestling.core.storage import BadRows, read_rows, write_rows
from nestling.core.types import Conversation, Document, Labelled, Message, Problem, PromptRow, Ranking, Row
from nestling.corpus.paragraphs import cut_paragraphs
from nestling.corpus.reading import ROWS, TABLES, kind_of, list_files, read_table, read_text
from nestling.corpus.splits import Split, split_rows, split_text

T = TypeVar("T")
R = TypeVar("R", bound=Row)


class Settings(Config):
    """Where the data lies and how its rows are read."""

    paths: tuple[str, ...] = Field(min_length=1, description="files, or folders that are searched for files")
    text_field: str = Field("text", description="the field of a row that holds its text")
    id_field: str = Field("id", description="the field that names a row; rows without it are named by file and line")
    template: str | None = Field(None, description="text of a row from several fields, as in '{title}\\n\\n{text}'")
    label_fields: dict[str, str] = Field(
        {}, description="columns of 0 and 1 that hold a category, with its name: {threat: harassment/threatening}"
    )
    val_share: float = Field(0.1, ge=0, lt=1, description="share held out: the end of each text file, rows by hash")
    document_characters: int = Field(
        20_000, ge=0, description="longer texts become several documents, cut between paragraphs; 0 keeps them whole"
    )
    replace: dict[str, str] = Field({}, description="words put in place of others in every row, such as a name")
    limit: int | None = Field(None, ge=1, description="take at most so many items of a split")
    on_bad_row: BadRows = Field("stop", description="at a bad row: stop, or skip and count it")


def files(settings: Settings) -> list[Path]:
    """The files behind the settings: when one of them changes, what was made from them is out of date."""
    return list_files(settings.paths)


def documents(settings: Settings, seed: int, split: Split, skipped: list[str]) -> Iterator[Document]:
    """Texts: whole files of running text, or a field of rows."""
    yield from islice(_documents(settings, split, skipped), settings.limit)


def conversations(settings: Settings, seed: int, split: Split, skipped: list[str]) -> Iterator[Conversation]:
    """Rows `{messages, tools?}`. All that begin with the same words fall on one side of the split."""
    yield from _rows(settings, split, skipped, Conversation, lambda row: _first_words(row.messages))


def rankings(settings: Settings, seed: int, split: Split, skipped: list[str]) -> Iterator[Ranking]:
    """Rows `{prompt, responses}` or `{prompt, chosen, rejected}`. A prompt is never in both splits."""
    yield from _rows(settings, split, skipped, Ranking, lambda row: _first_words(row.prompt))


def prompts(settings: Settings, seed: int, split: Split, skipped: list[str]) -> Iterator[PromptRow]:
    """Rows with a `prompt` (rankings will do), or conversations, of which the last answer is left out."""
    yield from _rows(settings, split, skipped, PromptRow, lambda row: _first_words(row.prompt), _as_prompt)


def problems(settings: Settings, seed: int, split: Split, skipped: list[str]) -> Iterator[Problem]:
    """Rows `{prompt, answer, verifier}`."""
    yield from _rows(settings, split, skipped, Problem, lambda row: _first_words(row.prompt))


def labels(settings: Settings, seed: int, split: Split, skipped: list[str]) -> Iterator[Labelled]:
    """Rows `{text, labels}`, or with a column for each category. A group (`meta.group`, or a text) is never cut."""

    def shape(row: Mapping[str, Any]) -> Mapping[str, Any]:
        return _as_labelled(row, settings)

    yield from _rows(settings, split, skipped, Labelled, lambda row: str(row.meta.get("group") or row.text), shape)


def toy(folder: Path, what: str) -> Settings:
    """Settings for the contract test: a file of twelve rows of the kind that `what` reads."""
    turn = {"role": "user", "content": "Question"}
    row: dict[str, Any] = {"prompt": [turn], "chosen": "yes", "rejected": "no", "answer": "yes", "verifier": "exact"}
    row |= {"labels": ["hate"]}
    row |= {"messages": [turn, {"role": "assistant", "content": "Answer"}]} if what == "conversations" else {}
    rows = [row | {"id": str(n), "text": f"Text {n}.", "meta": {"n": n}} for n in range(12)]
    for n, item in enumerate(rows):
        for key in ("prompt", "messages"):
            if key in item:
                item[key] = [{**turn, "content": f"Question {n}"}, *item[key][1:]]
    write_rows(folder / "toy.jsonl", rows)
    return Settings(paths=(str(folder / "toy.jsonl"),), val_share=0.5)


# ---- texts ----


def _documents(settings: Settings, split: Split, skipped: list[str]) -> Iterator[Document]:
    found = files(settings)
    for path in (path for path in found if kind_of(path) not in ROWS + TABLES):
        text = split_text(_replaced(read_text(path), settings.replace), settings.val_share, split)
        yield from _pieces(Document(id=path.name, text=text, source=path.name), settings)
    tables = [path for path in found if kind_of(path) in ROWS + TABLES]
    rows = (row for path in tables for row in _text_rows(path, settings, skipped))
    for document in split_rows(rows, lambda row: row.id, settings.val_share, split):
        yield from _pieces(document, settings)


def _pieces(document: Document, settings: Settings) -> Iterator[Document]:
    """A document, or the several that a long one becomes."""
    pieces = list(cut_paragraphs(document.text, settings.document_characters))
    for number, piece in enumerate(pieces):
        name = document.id if len(pieces) == 1 else f"{document.id}#{number}"
        yield document.model_copy(update={"id": name, "text": piece})


def _text_rows(path: Path, settings: Settings, skipped: list[str]) -> Iterator[Document]:
    """The rows of one file; a row without words is left out and noted, never an error."""
    number = 0

    def parse(row: Mapping[str, Any]) -> Document:
        nonlocal number
        number += 1
        return _document(row, f"{path.name}:{number}", path.name, settings)

    for document in _parsed(path, parse, settings, skipped):
        if document.text.strip():
            yield document
        else:
            skipped.append(f"{path}: row {document.id} has no text")


def _document(row: Mapping[str, Any], name: str, source: str, settings: Settings) -> Document:
    if settings.template is not None:
        try:
            text: Any = settings.template.format_map(row)
        except (KeyError, IndexError, ValueError) as error:
            raise UserError(f"the template does not fit the row: {error}", fix=f"it has {', '.join(row)}") from None
    elif settings.text_field not in row:
        has = ", ".join(row) or "nothing"
        raise UserError(f"field {settings.text_field!r} is missing", fix=f"the row has {has}; set text_field")
    else:
        text = row[settings.text_field]
    if not isinstance(text, str):
        raise UserError(f"field {settings.text_field!r} is not text", value=text)
    checked = _valid(text)
    return Document(id=str(row.get(settings.id_field) or name), text=checked, source=source, url=row.get("url"))


def _valid(text: str) -> str:
    """JSON can spell half a character (a lone surrogate), which no tokenizer can take."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"lone surrogate U+{ord(text[error.start]):04X} at character {error.start}") from None
    return text


# ---- rows ----


def _rows(
    settings: Settings, split: Split, skipped: list[str], kind: type[R], key: Callable[[R], str],
    shape: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
) -> Iterator[R]:  # fmt: skip
    """The rows of all files as values of one kind."""
    found = files(settings)
    for path in found:
        if kind_of(path) not in ROWS + TABLES:
            raise UserError(f"{kind.__name__.lower()}s are read from rows", where=path, fix="give .jsonl or .parquet")

    def parse(row: Mapping[str, Any]) -> R:
        return kind.from_row(shape(row))

    rows = (row for path in found for row in _parsed(path, parse, settings, skipped))
    yield from islice(split_rows(rows, key, settings.val_share, split), settings.limit)


def _first_words(messages: tuple[Message, ...]) -> str:
    """What a conversation is known by: all up to and with the first thing that the user says."""
    said = [message.role == "user" for message in messages]
    end = said.index(True) + 1 if any(said) else len(messages)
    return "\x1e".join(message.content for message in messages[:end])


def _as_prompt(row: Mapping[str, Any]) -> Mapping[str, Any]:
    if "prompt" in row or not isinstance(row.get("messages"), list):
        return row
    messages = list(row["messages"])
    while messages and isinstance(messages[-1], Mapping) and messages[-1].get("role") in ("assistant", "tool"):
        messages.pop()
    if not messages:
        raise UserError("a conversation without a question makes no prompt")
    tools = {"tools": row["tools"]} if row.get("tools") else {}
    return {"prompt": messages, "meta": {**row.get("meta", {}), **tools}}


def _as_labelled(row: Mapping[str, Any], settings: Settings) -> Mapping[str, Any]:
    text = _document(row, "", "", settings).text
    if not settings.label_fields:
        return {**row, "text": text}
    if missing := [name for name in settings.label_fields if name not in row]:
        raise UserError(f"field {missing[0]!r} is missing", fix=f"the row has {', '.join(row)}; set label_fields")
    return {**row, "text": text, "labels": {name: row[field] for field, name in settings.label_fields.items()}}


def _parsed(path: Path, parse: Callable[[Mapping[str, Any]], T], settings: Settings, skipped: list[str]) -> Iterator[T]:
    """The rows of one file, parsed; bad ones stop or are noted. A file without any row is an error."""

    def clean(row: Mapping[str, Any]) -> T:
        return parse(_replaced(row, settings.replace))

    before, count = len(skipped), 0
    reader = _table_rows if kind_of(path) in TABLES else read_rows
    for value in reader(path, clean, settings.on_bad_row, skipped):
        count += 1
        yield value
    if count == 0 and len(skipped) == before:
        raise UserError("the file is empty", where=path, fix="give a file with rows in it")


def _table_rows(
    path: Path, parse: Callable[[Mapping[str, Any]], T], on_bad_row: BadRows, skipped: list[str]
) -> Iterator[T]:
    for number, row in enumerate(read_table(path), start=1):
        try:
            yield parse(row)
        except UserError as error:
            reason = f"{path}: row {number}: {error}"
            if on_bad_row == "stop":
                raise UserError(reason, fix="mend the row or pass --on-bad-row skip") from None
            skipped.append(reason)


def _replaced(value: Any, words: Mapping[str, str]) -> Any:
    """The value with words replaced in every text inside it."""
    if not words:
        return value
    if isinstance(value, str):
        for old, new in words.items():
            value = value.replace(old, new)
        return value
    if isinstance(value, Mapping):
        return {key: _replaced(item, words) for key, item in value.items()}
    return [_replaced(item, words) for item in value] if isinstance(value, list) else value
