"""Functions that a model may call. `tools/calculator.py` *is* the tool "calculator".

A tool is one file with a typed function `call(...) -> str`, whose docstring is what the model's user reads and whose
signature is the schema, and `EXAMPLES`, worked calls with their results that the contract test runs:

    EXAMPLES = [({"expression": "12 + 3"}, "15")]

    def call(expression: str) -> str:
        \"\"\"Evaluate an arithmetic expression.

        Args:
            expression: numbers with + - * / and parentheses.
        \"\"\"

A tool that can be set up has a class `Settings` and takes it as a last parameter `settings: Settings = Settings()`, which
is no part of the schema: the person who offers the tool fills it in (`Toolbox.open`), not the model.

Whatever goes wrong in a call is told to the model as text that begins with "error: "; it never ends the conversation.
"""

from __future__ import annotations

from nestling.tools._schema import run, schema
from nestling.tools._toolbox import Toolbox

__all__ = ["Toolbox", "run", "schema"]
