"""Opening: migrations from every revision, two processes at once, what is no store; and what a killed writer leaves."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import insert, inspect, text

from nestling.core.errors import UserError
from nestling.serving.store.database import Database, _address, _postgresql, _sqlite
from nestling.serving.store.records import VoteRecord
from nestling.serving.store.schema import CONVERSATIONS, MESSAGES, METADATA, VOTES
from nestling.serving.store.store import Store

WRITER = Path(__file__).with_name("writer.py")
KILLS = 12
"""Of each database here; `python tests/serving/store/writer.py` shows 100."""


def unopened(address: str) -> Database:
    """A connection to a store that is left as it is."""
    url = _address(address)
    return Database(_sqlite(url) if url.get_backend_name() == "sqlite" else _postgresql(url))


def test_the_migrations_make_the_tables_of_the_schema(store):
    with store.database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, METADATA) == []
        for name, table in METADATA.tables.items():
            kept = {(tuple(key["constrained_columns"]), key["options"].get("ondelete"))
                    for key in inspect(connection).get_foreign_keys(name)}  # fmt: skip
            assert kept == {((key.parent.name,), key.ondelete) for key in table.foreign_keys}, name


@pytest.mark.parametrize("revision", ["0001", "0002", "0003", "0004", "0005"])
def test_an_old_store_is_brought_up_to_date_with_what_it_holds(address, revision, reply):
    old = unopened(address)
    old.upgrade(revision)
    with old.write() as connection:
        values = {"owner": "ann", "title": "Old", "system": "", "tools": [], "model": "", "sampling": {}}
        connection.execute(insert(CONVERSATIONS).values(id="c", **values, created=1.0, updated=1.0))
        message = {"conversation_id": "c", "content": "Hi", "thinking": "", "steps": [], "created": 1.0}
        connection.execute(insert(MESSAGES).values(id="m", role="user", **message))
        connection.execute(insert(MESSAGES).values(id="n", role="assistant", parent_id="m", **message))
        connection.execute(insert(VOTES).values(message_id="n", value=1, reason="", comment="", created=1.0))
        connection.execute(text("INSERT INTO model_versions VALUES ('v', 'small', '', '{}', 1.0)"))
        names = "message_id, version_id, system, tools, sampling, seed, prompt_tokens, completion_tokens, finish, seconds"
        connection.execute(text(f"INSERT INTO replies ({names}) VALUES ('n', 'v', '', '[]', '{{}}', 1, 1, 1, 'stop', 1.0)"))
    old.close()
    store = Store.open(address)
    assert [c.title for c in store.conversations.page(search="hi").data] == ["Old"]
    assert store.conversations.message("n").vote == VoteRecord(value=1)
    assert store.conversations.message("n").reply.forgotten == 0
    new = store.conversations.answer("c", "m", reply("Hello!"))
    store.feedback.flag(new.id, "spam")
    store.feedback.rank("c", [["n"], [new.id]])
    store.close()


def test_many_may_open_an_empty_store_at_once(address):
    def work(number: int) -> str:
        store = Store.open(address)
        id = store.conversations.create().id
        store.close()
        return id

    with ThreadPoolExecutor(6) as pool:
        ids = list(pool.map(work, range(6)))
    store = Store.open(address)
    assert {c.id for c in store.conversations.page().data} == set(ids)
    store.close()


def test_a_store_of_a_newer_version_is_refused(address):
    store = Store.open(address)
    with store.database.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    store.close()
    with pytest.raises(UserError, match="newer version"):
        Store.open(address)


def test_what_is_no_store_is_said_in_one_line(tmp_path):
    (tmp_path / "text.db").write_text("this is not a database, but it is long enough to look like one" * 20)
    for url, said in (
        (tmp_path / "text.db", "not a database"), (tmp_path / "no" / "where.db", "no such folder"),
        (tmp_path, "unable to open"), ("sqlite://", "needs a file"), ("mysql://x/y", "no database of this kind"),
        ("postgresql://nobody:secret@127.0.0.1:1/x", "can't be opened"), ("post gres://", "not the address"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said) as caught:
            Store.open(url)
        assert "secret" not in str(caught.value)


def test_a_path_and_its_url_are_one_store(tmp_path):
    first = Store.open(tmp_path / "a.db")
    id = first.conversations.create().id
    first.close()
    for url in (str(tmp_path / "a.db"), f"sqlite:///{tmp_path}/a.db"):
        store = Store.open(url)
        assert store.conversations.get(id).id == id
        store.close()


def test_kill_9_loses_nothing_that_was_acknowledged(address):
    """A writer is killed at any moment; what it had been told is written is there, and the database opens."""
    done = subprocess.run(
        [sys.executable, WRITER, address, str(KILLS)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    kills, acknowledged, lost = map(int, done.stdout.split())
    assert (kills, lost) == (KILLS, 0)
    assert acknowledged > KILLS
