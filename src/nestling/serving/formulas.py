"""LaTeX in Markdown as MathML, which browsers show by themselves: $…$ and \\(…\\) in a line, $$…$$ and \\[…\\] displayed.

A formula has a bounded length, so that looking for the end of one that has none costs little wherever it begins.
"""

from __future__ import annotations

import re
from functools import lru_cache
from html import escape
from typing import Any
from xml.etree.ElementTree import Element, tostring

from latex2mathml import exceptions
from latex2mathml.converter import Converter
from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline

_DISPLAYED = r"\$\$(.{1,1000}?)\$\$|\\\[(.{1,1000}?)\\\]"
_IN_LINE = re.compile(
    rf"{_DISPLAYED}|\\\((.{{1,1000}}?)\\\)"
    # A dollar is money where blanks or digits stand about it, or words follow its number: "$5 and $6", "$20-$30".
    r"|(?<![\d\\$])\$(?![\s$]|\d[^$\n]{0,40}?\s[A-Za-z]{2})([^$\n]{1,1000}?)(?<![\s\\])\$(?!\d)",
    re.DOTALL,
)
_ON_LINES = re.compile(rf"[ \t]*(?:{_DISPLAYED})[ \t]*$", re.DOTALL | re.MULTILINE)
_MOST_LINES = 40
_REFERENCE = re.compile(r"&amp;(#x[0-9A-F]+;)")  # the converter writes its symbols as character references
_NAMES_COMMANDS = re.compile(r"\\\w*(?:command|def)\b")  # of which a few make a formula of any size
_ALIGNED = re.compile(r"\{(?:aligned|gathered|gather\*?)\}")  # the converter knows another name of these


def formulas(markdown: MarkdownIt) -> None:
    """A plugin of markdown-it that reads formulas; its HTML still has to be sanitised."""
    markdown.inline.ruler.before("escape", "formula", _in_line)
    markdown.block.ruler.before(
        "fence", "formula", _on_lines, {"alt": ["paragraph", "reference", "blockquote", "list"]}
    )
    markdown.add_render_rule("formula", _render)


@lru_cache(maxsize=1024)  # a growing reply is rendered again and again
def to_mathml(latex: str, display: str) -> str:
    """A formula as MathML, or as it was written where that can't be read.

    Args:
        display: "inline" or "block".

    >>> to_mathml("{", "inline")
    '<code>{</code>'
    """
    try:
        tree = _read(latex, display)
    except _broken():
        code = f"<code>{escape(latex, quote=False)}</code>"
        return code if display == "inline" else f"<pre>{code}</pre>\n"
    return _REFERENCE.sub(r"&\1", tostring(tree, encoding="unicode"))


@lru_cache(maxsize=1)
def _broken() -> tuple[type[Exception], ...]:
    """What the converter raises for LaTeX that it cannot read."""
    own = [kind for kind in vars(exceptions).values() if isinstance(kind, type)]
    return (*own, AttributeError, LookupError, RecursionError, StopIteration, TypeError, ValueError)


def _read(latex: str, display: str) -> Element:
    """The tree of a formula; one of `_broken` where it has none, also where the converter would show half of it."""
    braces = re.sub(r"\\.", "", latex)
    if braces.count("{") != braces.count("}") or _NAMES_COMMANDS.search(latex):
        raise ValueError(latex)
    tree = Converter(display=display).convert_to_element(_ALIGNED.sub("{align*}", latex))
    unknown = any(node.text == "&" or str(node.text)[:1] == "\\" for node in tree.iter("mi"))
    if unknown or any(len(node) != 2 for node in tree.iter("mfrac")):
        raise ValueError(latex)
    return tree


def _in_line(state: StateInline, silent: bool) -> bool:
    found = _IN_LINE.match(state.src, state.pos, state.posMax)
    if found is None:
        return False
    if not silent:
        token = state.push("formula", "math", 0)
        token.content = found[found.lastindex or 0].strip()
        token.info = "block" if found.lastindex in (1, 2) else "inline"
    state.pos = found.end()
    return True


def _on_lines(state: StateBlock, line: int, last: int, silent: bool) -> bool:
    if state.is_code_block(line) or not state.src.startswith(("$$", "\\["), state.bMarks[line] + state.tShift[line]):
        return False
    text = state.getLines(line, min(line + _MOST_LINES, last), state.blkIndent, False)
    found = _ON_LINES.match(text)
    if found is None:
        return False
    if not silent:
        token = state.push("formula", "math", 0)
        token.content, token.info, token.block = found[found.lastindex or 0].strip(), "block", True
        state.line = line + text.count("\n", 0, found.end()) + 1
    return True


def _render(renderer: Any, tokens: Any, place: int, *_: Any) -> str:
    return to_mathml(tokens[place].content, tokens[place].info)
