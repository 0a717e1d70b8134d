"""The chat template stored with every chat model, in Jinja (`chat.jinja`): what `conversation.render` does, for other servers.

Form: ChatML. Tools on offer are named in the system turn, calls are Qwen's and Hermes' <tool_call>{json}</tool_call>.
Blank space before an assistant's first word is dropped on both sides, so that the prompt's last token never merges with
the answer: what a model is trained on is then exactly what it continues. Thoughts of replies before the last question are
left out, as in the templates of other models that think.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files

FORMER = {"7a527446dab68f8afee7b073611c7788558dc05e0eec8a5f80329e3eb3d2c62d"}
"""SHA-256 of the texts that earlier models were stored with; this one says the same but for thoughts."""


@cache
def own_template() -> str:
    """The Jinja text."""
    return files("nestling.tokenizer").joinpath("chat.jinja").read_text(encoding="utf-8")


def current(template: str | None) -> str | None:
    """Our template as it is now where `template` is ours as it was; any other as it is."""
    former = template is not None and hashlib.sha256(template.encode()).hexdigest() in FORMER
    return own_template() if former else template
