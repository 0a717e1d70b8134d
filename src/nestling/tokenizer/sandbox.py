"""A model's own chat template, filled in: Jinja in a sandbox, in the environment that transformers gives it.

A template is a program of strangers, and a message is a text of strangers. The program gets plain values and can't reach
anything else. In the text, every word that spells a control token is split by a mark, so that the words left whole in what
comes out are the template's own; `foreign.py` makes tokens of them and takes the marks away.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nestling.core.errors import UserError
from nestling.tokenizer.special import THINK_END, THINK_START

SPLIT, BEGIN, END = "\ufdd0", "\ufdd1", "\ufdd2"
"""Marks in a filled-in template: a word is split, what the assistant writes begins and ends. Unicode keeps these code points
for a program's own use; in a message they become U+FFFD."""
_MARKS = str.maketrans(dict.fromkeys((SPLIT, BEGIN, END), "\ufffd"))
_OF_A_TEMPLATE = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError)
_PROBE = "QXZV"
_FORM = ("content", "tool_calls", "tool_call_id", "id", "type", "function", "name", "arguments", "description", "parameters")
"""Names that the form of a message gives, which a template looks for whatever the tokenizer's tokens are called."""


class ChatTemplate:
    """A template that writes conversations.

    Args:
        source: the Jinja text; read when it is first used.
        control: the tokenizer's control tokens.
        roles: what the template may call by name: {"bos_token": "<s>", …}.

    >>> ChatTemplate("{{ bos_token + messages[0].content }}", ["<s>"], {"bos_token": "<s>"}).fill([{"content": "Hi"}])
    '<s>Hi'
    """

    def __init__(self, source: str, control: Collection[str], roles: Mapping[str, str]) -> None:
        self.source, self._control, self._roles = source, tuple(control), dict(roles)

    def fill(self, rows: Sequence[Mapping[str, Any]], tools: Sequence[Any] = (), *, prompt: bool = False) -> str:
        """The conversation as text, with marks in it.

        Args:
            rows: messages in OpenAI's shape.
            tools: definitions in OpenAI's shape.
            prompt: ready for the assistant to go on.

        Raises:
            UserError: the template is broken, or refuses this conversation.
        """
        messages = [self._split(row, row.get("role") == "assistant") | {"role": row.get("role")} for row in rows]
        offered = self._split(list(tools), False) or None
        given = {"messages": messages, "tools": offered, "documents": None, "add_generation_prompt": prompt}
        try:
            return self._compiled.render(**given, **self._roles)
        except _OF_A_TEMPLATE as error:
            raise UserError(f"refuses this conversation: {error}", where="chat template") from None

    @property
    def takes_tools(self) -> bool:
        """Whether the template says which tools are on offer."""
        return re.search(r"\btools\b", self.source) is not None

    @property
    def tells_replies(self) -> bool:
        """Whether the template itself says what the assistant writes, by {% generation %}."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.source) is not None

    @cached_property
    def closing(self) -> str | None:
        """The control token that it writes after what the assistant says; None where it writes none, or fails."""
        rows = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}]
        try:
            text = self.fill(rows).rpartition(_PROBE)[2]
        except UserError:
            return None  # who fills the template in is told why
        found = self.words.search(text)
        return found and found[0]

    @cached_property
    def words(self) -> re.Pattern[str]:
        """Finds control tokens in text, the longest where several begin."""
        names = sorted(self._control, key=len, reverse=True)
        return re.compile(rf"(?:{'|'.join(map(re.escape, names)) or '(?!)'})(?!{SPLIT})")

    def marked(self, reply: str) -> str:
        """What the assistant says as it stands in a filled-in template."""
        return self._split(reply, True)

    def _split(self, value: Any, is_reply: bool) -> Any:
        """A plain copy in which no text spells a control token. What an assistant says may think."""
        if isinstance(value, str):
            return self._spelled[is_reply].sub(rf"\g<0>{SPLIT}", value.translate(_MARKS))
        if isinstance(value, Mapping):
            named = ((key if key in _FORM else self._split(key, is_reply), inner) for key, inner in value.items())
            return {key: self._split(inner, is_reply) for key, inner in named}
        return [self._split(inner, is_reply) for inner in value] if isinstance(value, list | tuple) else value

    @cached_property
    def _spelled(self) -> tuple[re.Pattern[str], re.Pattern[str]]:
        """Finds the first character of every control token in text: of anybody, and of the assistant."""

        def pattern(names: Collection[str]) -> re.Pattern[str]:
            return re.compile(rf"(?={'|'.join(map(re.escape, names)) or '(?!)'}).", re.DOTALL)

        return pattern(self._control), pattern([name for name in self._control if name not in (THINK_START, THINK_END)])

    @cached_property
    def _compiled(self) -> jinja2.Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
        try:
            return environment.from_string(self.source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise UserError(f"can't be read: {error}", where="chat template") from None


class _Generation(Extension):
    """{% generation %} … {% endgeneration %}: what stands between was written by the assistant."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The block's content between two marks."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)], lineno=line) for mark in (BEGIN, END))
        return [begin, *body, end]


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
             sort_keys: bool = False) -> str:  # fmt: skip
    """Plain JSON; Jinja's own filter would write it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
