"""How the tables came to be: numbered, only ever added to. `database.py` runs what a store has not seen yet."""
