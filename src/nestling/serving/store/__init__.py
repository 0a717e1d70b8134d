"""What people and models said to each other and what people thought of it, in SQLite or PostgreSQL.

database.py    the connection: opened, brought up to date, durable transactions
schema.py      the tables; migrations/ is how they came to be
records.py     the values that go in and come out
conversations.py, feedback.py, arena.py, moderation.py    what can be done, one file per matter
store.py       all of it behind one name, `Store.open(url)`
export.py      rows of the store in the project's data forms
"""
