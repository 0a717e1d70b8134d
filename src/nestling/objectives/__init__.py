"""What can be learnt: each file of this folder is one objective, named by its file.

An objective file offers
    READS: tuple[str, ...]                    roles of `_materials.Materials.model` that it needs
    Settings(Config)                          its settings
    build(settings, materials) -> Objective   the real thing
    toy(seed, microbatches=1) -> Objective    the same code on a model and data of seconds; every update is split into
                                              so many microbatches (of three units or more), some places masked
    IMPROVES: tuple[str, str]                 a key of the toy's `validate()`, and "up" or "down": its way in 30 steps
    scramble_masked(microbatch, seed)         the microbatch with other content wherever the loss must not look
and `tests/contracts/test_objectives.py` checks every one of them with these.

An algorithm that learns from its own replies (PPO, RLOO, GRPO) subclasses `_on_policy.OnPolicy`: it says how verdicts
become advantages, everything else is there. `_toys.cast` is its toy, `_cast.assemble` its real cast, and
`{stage: align, objective: NAME}` runs it in a recipe. Read in this order: next_token, _pairs, reward; then _episodes,
_cast, _returns, _on_policy, ppo.
"""
