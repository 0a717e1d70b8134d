"""Tasks: problems with a checker. One file per capability; the file name is its name in recipes and reports.

A task has `HIGHER_IS_BETTER`, `problems(world, seed, count)` and `check(row, replies)`: `replies` are the assistant's
final texts, one for the prompt and one for each of `row.meta["turns"]`; the tools on offer are `row.meta["tools"]`.
"""
