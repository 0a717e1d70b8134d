"""LaTeX in replies: formulas become MathML, prices stay prices, what can't be read stays as it was written."""

from __future__ import annotations

import random
import re
import time
from html.parser import HTMLParser

import pytest

from nestling.serving.formulas import to_mathml
from nestling.serving.rendering import ATTRIBUTES, TAGS, to_html

SQUARE = "<mrow><msup><mi>a</mi><mn>2</mn></msup></mrow></math>"
HOSTILE = [
    r"\text{<script>alert(1)</script>}",
    r"\text{</mtext></math><img src=x onerror=alert(1)>}",
    r"\text{<table><mglyph><style><!--</style><img title='--><img src=1 onerror=alert(1)>'>}",
    r"\mathrm{<annotation-xml encoding='text/html'><script>alert(1)</script></annotation-xml>}",
    r"<annotation encoding='text/html'><script>alert(1)</script></annotation>",
    r"\href{javascript:alert(1)}{x}",
    r"\style{position:fixed;inset:0}{x}",
    r"\class{main}{x}",
    r"\color{red;background:url(https://elsewhere.example)} x",
    r"\unicode{60}script\unicode{62}",
    r"\text{&lt;script&gt;alert(1)&lt;/script&gt;}",
    r"\text{&#x3C;script&#x3E;alert(1)}",
    r"\operatorname{<img src=x onerror=alert(1)>}",
    r"\begin{array}{<script>} x \end{array}",
    r"\hspace{<script>} \rule{1px}{'onload=alert(1)'}",
]


class Elements(HTMLParser):
    """The tags and attributes as a browser would see them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize("text", ["$a^2$", r"\(a^2\)", r"\( a^2 \)", "so $a^2$, then", "**$a^2$**", "- $a^2$"])
def test_a_formula_in_a_line(text):
    assert f'<math display="inline">{SQUARE}' in to_html(text)


@pytest.mark.parametrize("text", ["$$a^2$$", "$$\na^2\n$$", r"\[a^2\]", "\\[\na^2\n\\]", "So:\n$$\na^2\n$$\nthen",
                                  "> $$\n> a^2\n> $$", "- one\n  $$\n  a^2\n  $$", "It is $$a^2$$ here."])  # fmt: skip
def test_a_formula_on_lines_of_its_own(text):
    html = to_html(text)
    assert f'<math display="block">{SQUARE}' in html
    assert "$" not in html


def test_lines_of_a_formula_are_no_list():
    assert to_html("$$\na\n- b\n+ c\n= d\n$$").count("<mo>") == 3


@pytest.mark.parametrize("name", ["align", "align*", "aligned", "gathered", "cases", "pmatrix", "array}{ll"])
def test_formulas_of_several_rows(name):
    end = name.partition("}")[0]
    html = to_html(rf"\[\begin{{{name}}} a &= b \\ c &= d \end{{{end}}}\]")
    assert (html.count("<mtr>"), "&amp;" in html) == (2, False)


@pytest.mark.parametrize("text", [
    "$5 and $6", "It costs $5, or 6$ there.", "$20-$30", "US$5 and A$6", "$5/month and 10$/year", "between $1,000 and $2,000.",
    "the $PATH and the $HOME", r"\$a\$", "a $ b $ c", "$", "$$", "$a", "100$", r"\(", r"\[ a", "$ a$",
])  # fmt: skip
def test_money_and_single_marks_stay_text(text):
    html = to_html(text)
    assert "<math" not in html
    assert re.sub(r"</?p>|\n", "", html) == re.sub(r"\\([$(\[])", r"\1", text)


@pytest.mark.parametrize("code", ["`$a$`", "```\n$$a$$\n```", "    $$a$$"])
def test_code_stays_code(code):
    assert "<math" not in to_html(code)


@pytest.mark.parametrize("latex", [r"\frac{a", r"\frac{a}", r"\nothing x", "a^b^c", r"\left( x", r"\begin{matrix} a", "}",
                                   "^" * 900, r"\newcommand{\a}{\b\b}\a", r"\def\a{x}\a",
                                   r"\begin{nothing} a & b \end{nothing}"])  # fmt: skip
def test_broken_latex_is_shown_as_it_is(latex):
    assert to_html(f"${latex}$") == f"<p><code>{latex.replace('&', '&amp;')}</code></p>\n"
    assert to_html(f"$$\n{latex}\n$$") == f"<pre><code>{latex.replace('&', '&amp;')}</code></pre>\n"


@pytest.mark.parametrize("latex", HOSTILE)
def test_nothing_that_runs_or_loads_comes_out_of_a_formula(latex):
    for text in (f"${latex}$", f"$$\n{latex}\n$$", rf"\({latex}\)", f"| a |\n|--|\n| ${latex}$ |"):
        for tag, attributes in Elements(to_html(text)).found:
            assert tag in TAGS - {"a"}
            assert set(attributes) <= ATTRIBUTES.get(tag, set())


def test_what_is_written_in_a_formula_is_shown_as_text():
    assert "&lt;script&gt;" in to_html(r"$\text{<script>}$")


def test_any_latex_is_read_or_shown():
    """Random pieces of LaTeX: never an error, nothing but what is allowed, and all of it in little time."""
    parts = [r"\frac", r"\sqrt", r"\left", r"\right", r"\text", r"\begin{align}", r"\end{align}", r"\sum", r"\over", r"\skew",
             r"\hat", r"\not", r"\color", "{", "}", "^", "_", "&", r"\\", "a", "12", "<b>", " ", "'", "#", "%", "中"]  # fmt: skip
    drawn = random.Random(1)
    for _ in range(2000):
        html = to_html(f"${''.join(drawn.choices(parts, k=drawn.randint(1, 12)))}$")
        assert {tag for tag, _ in Elements(html).found} <= TAGS


@pytest.mark.parametrize(
    "part", ["$a ", "$", "$$", "$$a\n", "\\[", "\\[a\n", "\\(", "\\(a ", "$1 a", "$a^2$ ", "$$a$$\n"]
)
def test_no_text_takes_long(part):
    """An end is looked for within a bounded length: squared, this would take minutes."""
    to_mathml.cache_clear()
    begun = time.process_time()
    to_html(part * 5_000)
    assert time.process_time() - begun < 3
