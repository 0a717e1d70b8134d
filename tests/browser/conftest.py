"""A real Chromium in front of a real service whose model knows a few conversations by heart.

Every test has a service and a browser profile of its own. At its end the page must have asked nobody but the service, and
must not have complained on the console.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
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


Sit = Callable[..., Desk]


@pytest.fixture
def sit(browser: Browser, model: Decoder, tokenizer: Tokenizer, tmp_path: Path) -> Iterator[Sit]:
    """`sit(width=…, locale=…, runs=…, …)`: a desk in front of a service of its own; other names are the service's settings."""
    with ExitStack() as stack:
        yield lambda **wishes: stack.enter_context(_desk(browser, model, tokenizer, tmp_path, wishes))


@pytest.fixture
def desk(sit: Sit) -> Desk:
    """A wide light desk at which English is spoken, with the chat open."""
    made = sit()
    made.open()
    return made


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that takes its time, so that a reply is seen while it is written."""
    step = Engine.step

    def slowly(engine: Engine) -> list[Any]:
        time.sleep(0.06)
        return step(engine)

    monkeypatch.setattr(Engine, "step", slowly)


class _desk(ExitStack):
    """Service, browser profile and page; what the page did is judged when the test has passed."""

    def __init__(
        self, browser: Browser, model: Decoder, tokenizer: Tokenizer, folder: Path, wishes: dict[str, Any]
    ) -> None:
        super().__init__()
        self._browser, self._wishes = browser, dict(wishes)
        self._made = (model, tokenizer, folder)

    def __enter__(self) -> Desk:  # type: ignore[override]
        super().__enter__()
        wishes = self._wishes
        view = {"viewport": {"width": wishes.pop("width", 1280), "height": wishes.pop("height", 800)},
                "locale": wishes.pop("locale", "en-US"), "color_scheme": wishes.pop("scheme", "light"),
                "has_touch": wishes.pop("touch", False)}  # fmt: skip
        store = Store.open(self._made[2] / f"{time.monotonic_ns()}.db")
        self.callback(store.close)
        service = self.enter_context(running(*self._app(store, wishes)))
        context = self._browser.new_context(**view)
        self.callback(context.close)
        context.set_default_timeout(PATIENCE)
        desk = Desk(context.new_page(), service.url, store, context)
        self._outside: list[str] = []
        context.on("request", self._note)
        desk.page.on("console", lambda said: desk.complaints.append(said.text) if said.type == "error" else None)
        desk.page.on("pageerror", lambda error: desk.complaints.append(str(error)))
        self.desk = desk
        return desk

    def _note(self, request: Any) -> None:
        if urlsplit(request.url).hostname not in ("127.0.0.1", None):
            self._outside.append(request.url)

    def _app(self, store: Store, wishes: dict[str, Any]) -> tuple[Any, Driver]:
        model, tokenizer, _ = self._made
        runs = wishes.pop("runs", None)
        settings = ServeSettings(flush_seconds=0, shutdown_seconds=0, **wishes)
        served = []
        for name in ("tiny", "twin"):
            driver = Driver(Engine(model, tokenizer, rows=8, frozen=True))
            served.append(Served(name, driver, tokenizer, {"name": name}, 1, Toolbox.open(settings.tools)))
        return create_app(settings, Models(served), store, runs=runs), served[0].driver

    def __exit__(self, kind: Any, error: Any, trace: Any) -> Any:
        desk = self.desk
        try:
            if kind is None:
                assert self._outside == []
                assert desk.complaints == []
        finally:
            super().__exit__(kind, error, trace)
