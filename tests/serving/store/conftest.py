"""A store in SQLite and one in PostgreSQL (a private server; skipped where the machine has none)."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from nestling.serving.store.records import ConversationChanges, MessageRecord, ModelVersion, Written
from nestling.serving.store.store import Store

KINDS = ("sqlite", "postgresql")


def programs() -> Path | None:
    """Where PostgreSQL's server programs are: on the path, or where Debian puts them."""
    found = shutil.which("initdb")
    places = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return places[-1] if places else None


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The address of an empty database on a private server."""
    place = programs()
    if place is None:
        pytest.skip("PostgreSQL's server (initdb) is not installed")
    root = os.geteuid() == 0
    user = next((u.pw_name for u in pwd.getpwall() if u.pw_name in ("postgres", "nobody")), None) if root else None
    if root and user is None:
        pytest.skip("PostgreSQL refuses to run as root, and there is no other user")
    folder = Path(tempfile.mkdtemp(prefix="nestling-pg-", dir="/tmp"))  # short: a socket's path has 107 characters
    if user:
        shutil.chown(folder, user)

    def call(program: str, *words: str) -> None:
        subprocess.run([place / program, *words], check=True, user=user, cwd=folder, capture_output=True)

    options = f"-k {folder} -c listen_addresses='' -c fsync=off"
    try:
        call("initdb", "-D", "data", "-A", "trust", "-U", "tester", "-E", "UTF8", "--no-locale", "--no-sync")
        call("pg_ctl", "-D", "data", "-w", "-l", "log", "-o", options, "start")
        yield f"postgresql://tester@/postgres?host={folder}"
        call("pg_ctl", "-D", "data", "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=KINDS)
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/store.db"
    url = request.getfixturevalue("postgresql")
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    engine.dispose()
    return url


@pytest.fixture
def store(address: str) -> Iterator[Store]:
    """An empty store of each kind."""
    opened = Store.open(address)
    yield opened
    opened.close()


def written(content: str = "Hello!", model: str = "small", **more: object) -> Written:
    """A reply of a model."""
    return Written(version=ModelVersion(name=model, checkpoint=f"{model}-1"), content=content, **more)


@pytest.fixture
def reply() -> Callable[..., Written]:
    """`written`, as a fixture, so that test files need no import from here."""
    return written


Talk = Callable[..., tuple[str, MessageRecord, list[MessageRecord]]]


@pytest.fixture
def talk(store: Store) -> Talk:
    """`talk(question, *replies)`: a conversation of one question with its variants; (id, question, replies)."""

    def hold(
        question: str = "Hi", *replies: str | Written, system: str = ""
    ) -> tuple[str, MessageRecord, list[MessageRecord]]:
        id = store.conversations.create(ConversationChanges(system=system)).id
        asked = store.conversations.ask(id, question, None)
        texts = [written(one) if isinstance(one, str) else one for one in replies]
        return id, asked, [store.conversations.answer(id, asked.id, one) for one in texts]

    return hold
