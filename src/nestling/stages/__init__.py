"""One file per stage of a recipe: joins the folders below into a run. Composition lives here and nowhere else.

A stage file offers
    VERSION: int                     raised when its results change for the same settings; part of the stage's key
    READS: dict[str, str]            input role -> the stage it comes from unless the recipe says otherwise; "role?" is optional
    Settings(Config)                 its settings
    files(settings, seed) -> list    optional: files from outside the run; a change in one of them is a change of the key
    work(settings, known)            optional: what a step of training reads, for `nestling plan` and the preflight
    run(settings, context) -> dict   writes into context.folder and returns the figures for the report
"""
