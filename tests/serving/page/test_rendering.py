"""Markdown as HTML: what people write comes through, what could run does not."""

from __future__ import annotations

import time
from html.parser import HTMLParser
from threading import Event, Thread

import pytest

from nestling.serving.rendering import SHARE, TAGS, Progressive, to_html

ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "<iframe src='javascript:alert(1)'></iframe>",
    "<a href='javascript:alert(1)'>x</a>",
    "<style>*{display:none}</style>",
    "<math><mtext><table><mglyph><style><!--</style><img title='--><img src=1 onerror=alert(1)>'>",
    "<noscript><p title='</noscript><img src=x onerror=alert(1)>'>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](java\tscript:alert(1))",
    "[x](&#106;avascript:alert(1))",
    "[x](vbscript:msgbox(1))",
    "[x](data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==)",
    "<javascript:alert(1)>",
    "[x]: javascript:alert(1)\n\n[x]",
    '[x](https://example.org "onmouseover=alert(1)")',
    "![x](https://elsewhere.example/track.png)",
    "![x](data:image/svg+xml;base64,PHN2Zz48L3N2Zz4=)",
    '```"><img src=x onerror=alert(1)>\ncode\n```',
    "```html\n<script>alert(1)</script>\n```",
    "```python onload=alert(1)\n1\n```",
    "`<script>alert(1)</script>`",
    "|<script>|\n|:-|\n|<img src=x onerror=alert(1)>|",
    "<details open ontoggle=alert(1)>",
    "<form action=/api/conversations method=post><button>x</button></form>",
    "<base href='https://elsewhere.example/'>",
    "<meta http-equiv=refresh content='0;url=https://elsewhere.example'>",
    "<p style='position:fixed;inset:0'>x</p>",
]


class Elements(HTMLParser):
    """Collects the tags and attributes as a browser would see them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_that_runs_or_loads_comes_through(attack):
    for text in (attack, f"> {attack}", f"- {attack}", f"# {attack}"):
        for tag, attributes in Elements(to_html(text)).found:
            assert tag in TAGS
            assert set(attributes) <= {"href", "title", "class", "start", "rel", "target"}
            assert (attributes.get("href") or "https:").split(":")[0].lower() in ("http", "https", "mailto")
            assert tag != "a" or attributes["rel"] == "noopener noreferrer nofollow"


@pytest.mark.parametrize("attack", ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "a < b && c > d"])
def test_html_in_a_text_is_shown_as_text(attack):
    assert attack in Elements(to_html(attack)).text


def test_what_people_write_comes_through():
    text = "# Title\n\n**bold** *slanted* ~~gone~~ `code`\nnext line\n\n1. one\n2. two\n\n> said\n\n[link](https://example.org)"
    html = to_html(text)
    for part in ("<h1>Title</h1>", "<strong>bold</strong>", "<em>slanted</em>", "<s>gone</s>", "<code>code</code>", "<br>",
                 "<ol>", "<blockquote>", '<a href="https://example.org" target="_blank"'):  # fmt: skip
        assert part in html


def test_columns_are_aligned_by_class():
    html = to_html("| a | b |\n|:-:|--:|\n| 1 | 2 |")
    assert '<td class="to-center">1</td>' in html
    assert '<td class="to-right">2</td>' in html
    assert "style" not in html


def test_code_is_coloured_and_complete():
    code = "def add(a, b):\n    return a + b  # <b>\n"
    html = to_html(f"```python\n{code}```")
    assert '<code class="language-python"><span class="k">def</span>' in html
    assert Elements(html).text.strip("\n") == code.strip("\n")
    assert Elements(to_html(f"```nolanguage\n{code}```")).text.strip("\n") == code.strip("\n")
    assert "<span" not in to_html(f"```\n{code}```")


def test_an_unfinished_text_is_rendered_too():
    assert to_html("```python\nprint(") == to_html("```python\nprint(\n```")
    assert "**bo" in to_html("a **bo")


@pytest.mark.parametrize("part", ["[", "![", "*a ", "**a", "`", "> ", "<", "[a](", "&", "|", "_a"])
def test_no_text_takes_long(part):
    """Text made to be hard is read in proportion to its length, about 20 ms per 1,000 parts; squared, it would be minutes."""
    begun = time.process_time()
    to_html(part * 5_000)
    assert time.process_time() - begun < 3


class Clock:
    """A clock that goes on by a set time at each look."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def test_growing_texts_are_rendered_for_a_share_of_the_time():
    """However many there are: here two, which take turns."""
    clock = Clock(0.01)  # so that rendering seems to take 10 ms
    progressive = Progressive(clock)
    rendered = [progressive.offer(f"{name} " * n) for n in range(1, 200) for name in ("word", "other")]
    told = [n for n, html in enumerate(rendered) if html]
    assert rendered[0] == "<p>word</p>\n"
    spent, passed = 0.01 * len(told), clock.now
    assert 0.5 * SHARE <= spent / passed <= SHARE
    assert {n % 2 for n in told} == {0, 1}


def test_one_is_rendered_at_a_time():
    """Who comes while another is rendered does not wait."""
    begun, released = Event(), Event()

    def clock() -> float:
        begun.set()
        released.wait(5)
        return 0.0

    progressive = Progressive(clock)
    first = Thread(target=progressive.offer, args=("a",))
    first.start()
    assert begun.wait(5)
    assert progressive.offer("b") is None
    released.set()
    first.join()
    assert progressive.offer("b") == "<p>b</p>\n"
