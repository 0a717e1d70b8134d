"""Tasks: problems with a checker. One file per capability; the file name is its name in recipes and reports.

A task file offers
    HIGHER_IS_BETTER: bool
    problems(world, seed, count) -> list[PromptRow]     different rows, the same for the same seed; `world` may be ignored
    check(row, replies) -> float                        the share of the point in [0, 1]
and its rows hold in `meta`
    reference: list[str]      replies that deserve full marks (or the fault, where lower is better); the contract tests
                              check them
    turns: list[str]          optional: what the user goes on to say after the first reply
    tools: list[str]          optional: names of the tools on offer
plus whatever its own `check` needs. `replies` are the assistant's final texts, one for the prompt and one for each turn.
"""
