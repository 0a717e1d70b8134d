"""The command line: one verb per stage, arguments generated from the settings classes. Nothing imports it."""
