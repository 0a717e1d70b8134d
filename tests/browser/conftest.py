"""A real Chromium in front of a real service whose model knows a few conversations by heart.

Every test has a service of its own, and with it an origin for which the browser has stored nothing. At its end the page must
have asked nobody but the service, and must not have complained on the console.
"""

from __future__ import annotations

import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from fastapi import FastAPI
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright
from taught import running, say, teach

from nestling.core.types import Message, ToolCall
from nestling.generation.engine import Engine
from nestling.model.config import DecoderConfig
from nestling.model.decoder import Decoder, build
from nestling.serving.app import create_app
from nestling.serving.driver import Driver
from nestling.serving.models import Models, Served
from nestling.serving.settings import ServeSettings
from nestling.serving.store.records import ModelVersion, Written
from nestling.serving.store.store import Store
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.conversation import render
from nestling.tokenizer.special import CHAT, THINK_END, THINK_START, TURN_END
from nestling.tools import Toolbox

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")  # fmt: skip
PATIENCE = 10_000
"""Milliseconds that the page is given before a test fails."""

LONG = ("one two three four five six seven eight nine ten eleven twelve " * 4).strip()
CODE = "So:\n\n```python\nprint(1)\n```\n\n| a | b |\n|---|---|\n| 1 | **2** |"
ATTACK = '<img src=x onerror="window.hurt=1"><script>window.hurt=1</script> [x](javascript:window.hurt=1)'
LINES = {
    "Hello!": "Hello! How can I help you?",
    "Who are you?": "I am Nestling.",
    "Code.": CODE,
    "Attack!": ATTACK,
    "Go on.": LONG,
    "What is 2 + 3?": "Five, I think.",
    "你好": "你好！我能帮你什么？",
}
CALL = ToolCall(name="calculator", arguments={"expression": "2 + 3"})
SYSTEM, IN_ROLE = "You are a cat.", "Meow!"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    texts = [
        *LINES,
        *LINES.values(),
        SYSTEM,
        IN_ROLE,
        "It is 5.",
        "Think.",
        "easy",
        "Done.",
        "system user assistant tool",
    ]
    texts += [
        '{"name": "calculator", "arguments": {"expression": "2 + 3"}}',
        "Tools: calculator",
        "And now?",
        "Now too.",
    ]
    return Tokenizer.train(texts * 3, vocab_size=420).with_special(CHAT)


def lessons(tokenizer: Tokenizer) -> list[list[int]]:
    def talk(*turns: Message, tools: tuple[str, ...] = ()) -> list[int]:
        return render(tokenizer, list(turns), list(tools)).ids

    talks = [talk(say("user", asked), say("assistant", said)) for asked, said in LINES.items()]
    talks.append(talk(say("system", SYSTEM), say("user", "Hello!"), say("assistant", IN_ROLE)))
    hello = [say("user", "Hello!"), say("assistant", LINES["Hello!"])]
    talks.append(talk(*hello, say("user", "And now?"), say("assistant", "Now too.")))
    asked = say("user", "What is 2 + 3?")
    talks.append(
        talk(asked, say("assistant", "", CALL), say("tool", "5"), say("assistant", "It is 5."), tools=("calculator",))
    )
    opened = render(tokenizer, [say("user", "Think.")], prompt=True).ids
    thought = [tokenizer.id(THINK_START), *tokenizer.encode("easy"), tokenizer.id(THINK_END)]
    talks.append([*opened, *thought, *tokenizer.encode("Done."), tokenizer.id(TURN_END)])
    return talks


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer) -> Decoder:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made = build(DecoderConfig(vocab_size=tokenizer.vocab_size, d_model=64, n_layers=2, n_heads=4, context=256))
        teach(made, lessons(tokenizer), steps=110)
    return made.eval()


@dataclass
class Desk:
    """What a test works with: the page, the address and the store of its service."""

    page: Page
    url: str
    store: Store
    context: BrowserContext
    complaints: list[str] = field(default_factory=list)
    """What the page wrote on the console as an error; a test that expects some clears it."""

    def get(self, testid: str, **attributes: str) -> Locator:
        """Elements by their test id, and by other data- attributes."""
        more = "".join(f'[data-{name}="{value}"]' for name, value in attributes.items())
        return self.page.locator(f'[data-testid="{testid}"]{more}')

    def open(self, view: str = "chat") -> None:
        """Go to a view, and wait until it is there."""
        self.page.goto(f"{self.url}/#/{view}")
        expect(self.page.locator("main > section")).not_to_be_empty()

    def ask(self, text: str) -> None:
        """Send a question; the reply may still be on its way."""
        self.get("composer-input").fill(text)
        self.get("send").click()

    def answer(self, text: str) -> Locator:
        """The last reply of the conversation, once it is whole and says this."""
        last = self.get("message", role="assistant").last
        expect(last.locator('[data-testid="message-text"]').last).to_contain_text(text)
        expect(self.get("stop")).to_be_hidden()
        return last

    def long_talk(self) -> str:
        """A stored conversation of 20 messages that has outgrown the context; its id."""
        talk = self.store.of("anybody").conversations
        id, parent = talk.create().id, None
        for _ in range(10):
            asked = talk.ask(id, "Who are you? " * 3, parent).id
            parent = talk.answer(id, asked, Written(version=ModelVersion(name="tiny"), content="I am Nestling.")).id
        return id

    def until(self, is_so: Callable[[], bool]) -> None:
        """Wait until something is so that the page does not show, such as a row in the store."""
        end = time.monotonic() + PATIENCE / 1000
        while not is_so():
            assert time.monotonic() < end, "it did not become so"
            self.page.wait_for_timeout(50)

    def messages(self) -> list[Any]:
        """All stored messages, conversations by age."""
        conversations = sorted(self.store.conversations.page().data, key=lambda one: one.created)
        return [message for one in conversations for message in self.store.conversations.messages(one.id)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One for the tests of a file: its event loop must not outlive them."""
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no Chromium here: none of {', '.join(NAMES)} is on the path, and CHROMIUM names none")
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=list(FLAGS))
        yield started
        started.close()


@pytest.fixture(scope="module")
def page(browser: Browser) -> Page:
    """The page of most tests: to begin a process for each of them takes longer than what they do."""
    return _page(browser, locale="en-US")


Sit = Callable[..., Desk]


@pytest.fixture
def sit(browser: Browser, page: Page, model: Decoder, tokenizer: Tokenizer, tmp_path: Path) -> Iterator[Sit]:
    """`sit(width=…, height=…, scheme=…, runs=…, …)`: a desk in front of a service of its own; other names are the
    service's settings. With `locale`, `touch` or `haste` (how much faster timers run) it has a page of its own too.
    """

    def take(**wishes: Any) -> Desk:
        own = {name: wishes.pop(name) for name in ("locale", "touch", "haste") if name in wishes}
        width, height = wishes.pop("width", 1280), wishes.pop("height", 800)
        scheme = wishes.pop("scheme", "light")
        store = Store.open(tmp_path / f"{time.monotonic_ns()}.db")
        stack.callback(store.close)
        service = stack.enter_context(running(*_app(model, tokenizer, store, wishes)))
        place = _page(browser, **own) if own else page
        stack.callback(place.context.close if own else partial(_leave, place))
        place.set_viewport_size({"width": width, "height": height})
        place.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        return stack.enter_context(_watched(Desk(place, service.url, store, place.context)))

    with ExitStack() as stack:
        yield take


@pytest.fixture
def desk(sit: Sit) -> Desk:
    """A wide light desk at which English is spoken, with the chat open."""
    made = sit()
    made.open()
    return made


class Brake:
    """Holds every engine before its next step, once it has done so many, until it is released."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        step = Engine.step
        self._left = math.inf
        self._go = threading.Event()

        def braked(engine: Engine) -> list[Any]:
            self._left -= 1
            if self._left < 0:
                self._go.wait(PATIENCE / 1000)
            return step(engine)

        monkeypatch.setattr(Engine, "step", braked)

    def after(self, steps: int) -> None:
        """Hold from then on."""
        self._go.clear()
        self._left = steps

    def release(self) -> None:
        """Go on."""
        self._left = math.inf
        self._go.set()


@pytest.fixture
def brake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Brake]:
    """Shows a reply while it is written: `brake.after(steps)`, `brake.release()`. Name it behind the desk."""
    made = Brake(monkeypatch)
    yield made
    made.release()


def _page(browser: Browser, *, locale: str = "en-US", touch: bool = False, haste: int = 1) -> Page:
    context = browser.new_context(locale=locale, has_touch=touch)
    context.set_default_timeout(PATIENCE)
    made = context.new_page()
    if haste > 1:
        made.add_init_script(f"const wait = setTimeout; window.setTimeout = (act, ms) => wait(act, ms / {haste});")
    return made


def _app(model: Decoder, tokenizer: Tokenizer, store: Store, wishes: dict[str, Any]) -> tuple[FastAPI, Driver]:
    runs = wishes.pop("runs", None)
    settings = ServeSettings(flush_seconds=0, shutdown_seconds=0, **wishes)
    served = []
    for name in ("tiny", "twin"):
        driver = Driver(Engine(model, tokenizer, rows=8, frozen=True))
        served.append(Served(name, driver, tokenizer, {"name": name}, 1, Toolbox.open(settings.tools)))
    return create_app(settings, Models(served), store, runs=runs), served[0].driver


@contextmanager
def _watched(desk: Desk) -> Iterator[Desk]:
    """What the page does is judged at the end."""
    outside: list[str] = []
    hears: dict[str, Callable[[Any], None]] = {
        "request": lambda one: None if urlsplit(one.url).hostname in ("127.0.0.1", None) else outside.append(one.url),
        "console": lambda said: desk.complaints.append(said.text) if said.type == "error" else None,
        "pageerror": lambda error: desk.complaints.append(str(error)),
    }
    for name, hear in hears.items():
        desk.page.on(name, hear)
    yield desk
    for name, hear in hears.items():
        desk.page.remove_listener(name, hear)
    assert outside == []
    assert desk.complaints == []


def _leave(page: Page) -> None:
    """Forget what a test did. The next service mostly has another port; what was stored is cleared all the same."""
    page.context.set_offline(False)
    page.context.clear_permissions()
    if page.url.startswith("http"):
        page.evaluate("localStorage.clear(); sessionStorage.clear()")
    page.goto("about:blank")
