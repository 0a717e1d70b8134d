"""One file per source of data; the file name is the name in a recipe.

A source offers `class Settings(Config)` and any of the generators `documents`, `conversations`, `rankings`, `prompts`,
`problems`, `labels`, each called as `(settings, seed, split, skipped)`:

    settings   an instance of its Settings
    seed       the run's seed
    split      "train" or "val"; both together are all of the data, and they never share an item
    skipped    a list that takes one line (what, where) for every item left out

and, if it reads files, `files(settings)`: their paths, so that a run notices when one has changed;
and `toy(folder, what)`: settings with which the contract test runs it, having written what it reads into `folder`.
"""
