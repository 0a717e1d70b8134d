"""The store: conversations, feedback, comparisons and verdicts behind one name."""

from __future__ import annotations

from pathlib import Path

from nestling.serving.store.arena import Arena
from nestling.serving.store.conversations import Conversations
from nestling.serving.store.database import Database
from nestling.serving.store.feedback import Feedback
from nestling.serving.store.moderation import Moderation
from nestling.serving.store.responses import Responses


class Store:
    """What is in a database, seen by one owner (the name of an API key), or by everybody where the owner is None.

    Every method is one transaction; what it returned is on disk. Methods block for a disk write: call them in a thread.

        store = Store.open("feedback.db")
        conversation = store.conversations.create()
        question = store.conversations.ask(conversation.id, "Hello!", parent=None)
    """

    def __init__(self, database: Database, owner: str | None = None) -> None:
        self.database = database
        self.conversations = Conversations(database, owner)
        self.feedback = Feedback(database, self.conversations)
        self.arena = Arena(database, self.conversations)
        self.moderation = Moderation(database, self.conversations)
        self.responses = Responses(database, owner)

    @classmethod
    def open(cls, url: str | Path) -> Store:
        """Open or make the store: a file, "sqlite:///…" or "postgresql://…".

        Raises:
            UserError: no database there, or one that can't be used; see `Database.open`.
        """
        return cls(Database.open(url))

    def of(self, owner: str) -> Store:
        """The same store as this owner sees it."""
        return Store(self.database, owner)

    def close(self) -> None:
        """Give the connections back."""
        self.database.close()
