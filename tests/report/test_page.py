"""The page: whole without a network, escaped, well-formed, with a figure per curve."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from nestling.report.build import build_report
from nestling.report.page import duration, text

VOID = {"meta", "br", "img", "link", "hr", "input", "path", "use", "rect"}


class Reader(HTMLParser):
    """Checks that every element is closed in turn, and collects tags, ids and words."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.tags, self.ids, self.words = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    return reader


def page_of(run) -> str:
    build_report(run)
    return (run / "report.html").read_text()


def test_the_page_is_well_formed_and_its_ids_are_unique(make_run):
    reader = read(page_of(make_run()))
    assert reader.open == []
    assert len(reader.ids) == len(set(reader.ids))


def test_the_page_loads_nothing(make_run):
    """No script, no address, no file: it can be mailed, and opened years later."""
    page = page_of(make_run())
    assert "script" not in read(page).tags
    assert not re.search(r'(src|href)="(?!#)', page)
    assert "http" not in page
    assert "@import" not in page


def test_what_models_wrote_is_escaped(make_run):
    page = page_of(make_run())
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;" in page
    assert "A small &lt;assistant&gt; raised from nothing." in page
    assert "Who is &lt;Ada&gt;?" in page
    assert "a time &amp; &lt;i&gt;29&lt;/i&gt;" in page


def test_text_keeps_letters_of_every_script_and_drops_what_a_page_may_not_hold():
    assert text("白日依山盡 🐣 é\n") == "白日依山盡 🐣 é\n"
    assert text("a\x00b\ud800c\x1b[0m") == "a�b�c�[0m"


def test_every_curve_has_a_figure_in_the_page_s_colours(make_run):
    page = page_of(make_run())
    captions = re.findall(r"<figcaption>(.*?) <span", page)
    assert captions == [
        "Loss",
        "Held-out text",
        "Loss",
        "Pairs ordered rightly",
        "Loss",
        "Reward while learning",
        "Reward on held-out prompts",
        "Distance from the SFT model",
        "Entropy",
        "Answer length",
    ]
    assert page.count("<svg ") == len(captions)
    assert "n-gram model 1.21" in page
    assert "budget 8" in page
    assert not re.search(r"#01020\d", page), "a stand-in colour was left"


def test_answers_stand_side_by_side(make_run):
    words = [word for word in read(page_of(make_run())).words if word in ("base model", "after SFT", "after PPO")]
    assert words[2:5] == ["base model", "after SFT", "after PPO"]
    assert len(words) == 2 + 12, "two columns of the table of models, three answers to each of four prompts"


def test_bars_are_told_in_words_not_only_in_colour(make_run):
    page = page_of(make_run())
    assert page.count("✓ met") == 11
    assert page.count("✗ missed") == 1


def test_the_same_run_gives_the_same_page(make_run):
    run = make_run()
    assert page_of(run) == page_of(run)


def test_duration():
    assert [duration(s) for s in (8.24, 65, 725.4, 12000)] == ["8.2 s", "1 min 5 s", "12 min 5 s", "3 h 20 min"]
