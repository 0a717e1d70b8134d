"""The chat template stored with every chat model, in Jinja (`chat.jinja`): what `conversation.render` does, for other servers.

Form: ChatML. Tools on offer are named in the system turn, calls are Qwen's and Hermes' <tool_call>{json}</tool_call>.
Blank space before an assistant's first word is dropped on both sides, so that the prompt's last token never merges with
the answer: what a model is trained on is then exactly what it continues.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files


@cache
def own_template() -> str:
    """The Jinja text."""
    return files("nestling.tokenizer").joinpath("chat.jinja").read_text(encoding="utf-8")
