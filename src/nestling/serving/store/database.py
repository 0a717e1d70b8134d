"""The connection to SQLite or PostgreSQL: opened, brought up to date, and written to so that what returned is on disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError

from nestling.core.errors import UserError

BUSY_SECONDS = 30
"""How long a writer waits for another one."""
POOL = 16
"""Connections kept open; ten more are made where needed."""
_UPGRADE_LOCK = 0x4E657374  # any number, the same for every process that upgrades: "Nest"


class Database:
    """Transactions on an engine. Safe to use from several threads and several processes at once."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        # SQLite's transactions see one state anyway; its driver knows no such level.
        is_server = engine.dialect.name == "postgresql"
        self._reader = engine.execution_options(isolation_level="REPEATABLE READ") if is_server else engine

    @classmethod
    def open(cls, url: str | Path) -> Database:
        """Connect, make the tables or bring them up to date.

        Args:
            url: a file, "sqlite:///…" or "postgresql://user:password@host/name".

        Raises:
            UserError: no database there, one that can't be opened or written, one that a newer version wrote, or a
                PostgreSQL address without its driver.
        """
        address = _address(url)
        shown = address.render_as_string(hide_password=True)
        try:
            engine = _sqlite(address) if address.get_backend_name() == "sqlite" else _postgresql(address)
            database = cls(engine)
            database.upgrade()
        except ModuleNotFoundError:
            raise UserError(
                "PostgreSQL needs its driver", where=shown, fix="pip install 'nestling[postgres]'"
            ) from None
        except DBAPIError as error:
            raise UserError(f"the store can't be opened: {error.orig}", where=shown) from None
        except CommandError:
            fix = "update Nestling"
            raise UserError("this store was written by a newer version", where=shown, fix=fix) from None
        return database

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one state of the store."""
        with self._reader.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that writes; on disk when the block has ended, undone when it raised."""
        with self.engine.connect().execution_options(write=True) as connection, connection.begin():
            yield connection

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()

    def upgrade(self, target: str = "head") -> None:
        """Run the migrations that the store has not seen, all or none. Processes that start together take turns.

        Raises:
            CommandError: the store is at a revision that is unknown here.
        """
        script = ScriptDirectory(Path(__file__).parent, version_locations=[Path(__file__).parent / "migrations"])
        wanted = script.get_current_head() if target == "head" else target
        with self.read() as connection:
            if MigrationContext.configure(connection).get_current_revision() == wanted:
                return
        with self.write() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _UPGRADE_LOCK})
            _migrate(connection, script, target)


def _migrate(connection: Connection, script: ScriptDirectory, target: str) -> None:
    def steps(revision: Any, context: MigrationContext) -> Any:
        return script._upgrade_revs(target, revision)

    context = MigrationContext.configure(connection, opts={"fn": steps, "transactional_ddl": True, "script": script})
    with Operations.context(context):
        context.run_migrations()


def _address(url: str | Path) -> URL:
    """The address that a file name or a URL stands for."""
    if isinstance(url, Path) or "://" not in url:
        return URL.create("sqlite", database=str(Path(url).expanduser()))
    try:
        address = make_url(url)
    except ArgumentError:
        raise UserError("not the address of a database", value=url, fix=_FORMS) from None
    if address.drivername in ("postgres", "postgresql"):
        return address.set(drivername="postgresql+psycopg")
    if address.get_backend_name() not in ("sqlite", "postgresql"):
        raise UserError("no database of this kind", where=address.drivername, fix=_FORMS)
    return address


_FORMS = "use a file name, sqlite:///file.db or postgresql://user@host/name"


def _sqlite(address: URL) -> Engine:
    if address.database in (None, "", ":memory:"):
        raise UserError("the store needs a file", where="store", fix=_FORMS)
    folder = Path(str(address.database)).parent
    if not folder.is_dir():
        raise UserError("no such folder", where=folder, fix="make it, or name a file elsewhere")
    options = {"timeout": BUSY_SECONDS, "check_same_thread": False}
    engine = create_engine(address, connect_args=options, pool_size=POOL)
    event.listen(engine, "connect", _prepare)
    event.listen(engine, "begin", _begin)
    return engine


def _prepare(connection: Any, record: Any) -> None:
    """What every SQLite connection needs. FULL: a commit has reached the disk when it returns, power cut or not."""
    connection.isolation_level = None  # transactions begin where `_begin` says, not where the driver guesses
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    """A writer takes its turn at the start: one that first reads could not wait for another, SQLite would refuse it."""
    writes = connection.get_execution_options().get("write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _postgresql(address: URL) -> Engine:
    return create_engine(address, pool_pre_ping=True, pool_size=POOL)
