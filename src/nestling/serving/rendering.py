"""Markdown as HTML that is safe to put into the page: what a model writes may be anything.

Two walls stand between a reply and the page: markdown-it never lets HTML of the text through, and nh3 keeps only the tags
and attributes named here of what is left. Pictures become links, so that no reply makes the browser call another host.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import lru_cache
from html import escape
from threading import Lock

import nh3
from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore
from pygments import highlight
from pygments.formatters.html import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from nestling.serving.formulas import formulas

TAGS = {
    "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre", "s",
    "span", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
    "math", "menclose", "mfrac", "mi", "mmultiscripts", "mn", "mo", "mover", "mpadded", "mphantom", "mroot", "mrow", "mspace",
    "msqrt", "mstyle", "msub", "msubsup", "msup", "mtable", "mtd", "mtext", "mtr", "munder", "munderover",
}  # fmt: skip
ATTRIBUTES = {
    "a": {"href", "title"}, "ol": {"start"}, **{tag: {"class"} for tag in ("code", "span", "td", "th")},
    "math": {"display"}, "mfrac": {"linethickness"}, "mi": {"mathvariant"}, "mspace": {"width"}, "mtd": {"columnalign"},
    "mstyle": {"displaystyle", "scriptlevel"}, "menclose": {"notation"}, "mover": {"accent"}, "munder": {"accentunder"},
    "mo": {"accent", "fence", "form", "lspace", "maxsize", "minsize", "movablelimits", "rspace", "separator", "stretchy"},
}  # fmt: skip
SCHEMES = {"http", "https", "mailto"}
SHARE = 1 / 10
"""Of the time, that rendering growing replies may take."""
LONGEST_CODE = 20_000
"""Characters of a code block that are still coloured; Pygments reads about a megabyte per second."""


def to_html(text: str) -> str:
    """Markdown as sanitised HTML; code is coloured by Pygments' short classes.

    >>> to_html("**hi** <b>there</b>")
    '<p><strong>hi</strong> &lt;b&gt;there&lt;/b&gt;</p>\\n'
    """
    return nh3.clean(
        _markdown().render(text),
        tags=TAGS,
        attributes=ATTRIBUTES,
        url_schemes=SCHEMES,
        link_rel="noopener noreferrer nofollow",
        set_tag_attribute_values={"a": {"target": "_blank"}},
    )


class Progressive:
    """Renders the growing replies of a service, all of them together in so small a share of the time that it stays cheap.

    While many replies are written, each is rendered rarely; the page shows what came since as it is.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._next = -math.inf
        self._busy = Lock()

    def offer(self, text: str) -> str | None:
        """The HTML of all of `text`, or None where it is too soon. For any thread."""
        if not self._busy.acquire(blocking=False):
            return None
        try:
            begun = self._clock()
            if begun < self._next:
                return None
            html = to_html(text)
            ended = self._clock()
            self._next = ended + (ended - begun) / SHARE
            return html
        finally:
            self._busy.release()


@lru_cache(maxsize=1)
def _markdown() -> MarkdownIt:
    """CommonMark with tables, strikethrough and formulas, without pictures and HTML."""
    settings = {"html": False, "breaks": True, "highlight": _highlight, "langPrefix": "language-"}
    markdown = MarkdownIt("commonmark", settings).enable(["table", "strikethrough"]).disable("image").use(formulas)
    markdown.core.ruler.push("alignment", _align_by_class)
    return markdown


def _align_by_class(state: StateCore) -> None:
    """Columns of tables are aligned by classes: the page's policy allows no style in markup."""
    for token in state.tokens:
        if style := token.attrs.pop("style", ""):
            token.attrSet("class", str(style).replace("text-align:", "to-"))


def _highlight(code: str, language: str, _: str) -> str:
    """The inside of a code block."""
    try:
        lexer = get_lexer_by_name(language, stripnl=False) if language and len(code) <= LONGEST_CODE else None
    except ClassNotFound:
        lexer = None
    return escape(code, quote=False) if lexer is None else highlight(code, lexer, HtmlFormatter(nowrap=True))
