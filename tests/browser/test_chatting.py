"""Chatting: a reply as it grows, stopped, written again, edited; what it is made of; a keyboard alone."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import expect

from nestling.serving import limits
from nestling.serving.store.records import ModelVersion, Written

HELLO = "Hello! How can I help you?"
GROWING = '[data-testid="thread"] [aria-busy="true"]'


def test_a_reply_grows_and_can_be_stopped(desk, brake):
    """Words appear before the reply is whole; what was written when it was stopped stays, here and in the store."""
    brake.after(12)
    desk.ask("Go on.")
    expect(desk.page.locator(GROWING)).to_contain_text("one two")
    desk.get("stop").click()
    expect(desk.get("send")).to_be_visible()
    desk.answer("one two")
    _, reply = desk.messages()
    assert reply.reply.finish == "cancelled"
    assert reply.content.startswith("one two")
    assert len(reply.content.split()) < 48  # the whole text
    expect(desk.get("message", role="assistant")).to_contain_text(reply.content.strip())


def test_markdown_and_code(desk):
    """Tables and code are elements; the code can be copied."""
    desk.ask("Code.")
    reply = desk.answer("So:")
    expect(reply.locator("table td strong")).to_have_text("2")
    expect(reply.locator("pre code")).to_have_text(re.compile(r"print\(1\)"))
    desk.context.grant_permissions(["clipboard-read", "clipboard-write"])
    reply.get_by_test_id("copy-code").click()
    assert desk.page.evaluate("navigator.clipboard.readText()").strip() == "print(1)"


def test_formulas_are_drawn(sit):
    """As MathML of the browser's own; what is written in one runs nothing, and a wide one scrolls by itself."""
    desk = sit(width=390)
    talk = desk.store.of("anybody").conversations
    id = talk.create().id
    wide = " + ".join(f"a_{{{n}}}" for n in range(40))
    text = r"So $\frac{1}{2}$ for $5 and $6. $\text{<img src=x onerror=window.hurt=1>}$" + f"\n\n$${wide}$$"
    talk.answer(id, talk.ask(id, "Formulas.", None).id, Written(version=ModelVersion(name="tiny"), content=text))
    desk.open(f"chat/{id}")
    reply = desk.answer("for $5 and $6.")
    expect(reply.locator("math")).to_have_count(3)
    half = reply.locator("mfrac").bounding_box()
    assert half["height"] > half["width"] > 0  # one number above the other
    assert reply.locator("math[display=block]").bounding_box()["width"] <= 390
    assert desk.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert desk.page.evaluate("window.hurt") is None


def test_what_a_reply_says_runs_nothing(desk):
    """HTML, scripts and javascript: addresses in a reply are text."""
    desk.ask("Attack!")
    reply = desk.answer("onerror")
    assert reply.locator("img, script, a[href^='javascript']").count() == 0
    assert desk.page.evaluate("window.hurt") is None
    desk.page.reload()
    desk.answer("onerror")
    assert desk.page.evaluate("window.hurt") is None


def test_variants_are_kept(desk):
    """A reply written again stands beside the first one; both can be looked at, also after a reload."""
    desk.ask("Hello!")
    first = desk.answer(HELLO)
    name = first.get_attribute("data-id")
    first.get_by_test_id("regenerate").click()
    expect(desk.get("variant-count")).to_contain_text("2")
    second = desk.answer(HELLO)
    assert second.get_attribute("data-id") != name
    desk.get("variant-previous").click()
    expect(desk.get("message", role="assistant")).to_have_attribute("data-id", name)
    desk.page.reload()
    expect(desk.get("message", role="assistant")).to_have_attribute("data-id", name)
    desk.get("variant-next").click()
    expect(desk.get("message", role="assistant")).not_to_have_attribute("data-id", name)
    assert [message.role for message in desk.messages()] == ["user", "assistant", "assistant"]


def test_a_question_can_be_edited(desk):
    """Sent again it is a branch of its own; the old one stays."""
    desk.ask("Hello!")
    desk.answer(HELLO)
    desk.get("message", role="user").get_by_test_id("edit").click()
    desk.get("edit-input").fill("Who are you?")
    desk.get("edit-send").click()
    desk.answer("I am Nestling.")
    desk.get("variant-previous").click()
    desk.answer(HELLO)
    assert [message.content for message in desk.messages() if message.role == "user"] == ["Hello!", "Who are you?"]
    assert {message.parent for message in desk.messages() if message.role == "user"} == {None}


def test_the_conversation_goes_on(desk):
    """The second question is answered with the first one known."""
    desk.ask("Hello!")
    desk.answer(HELLO)
    desk.ask("And now?")
    desk.answer("Now too.")
    expect(desk.get("message")).to_have_count(4)


def test_system_prompt_and_sampling_are_used(desk):
    """What the panel says goes with the request: the system prompt works, the rest is stored with the reply."""
    desk.get("panel-toggle").click()
    desk.get("field-system").fill("You are a cat.")
    for name, value in {"temperature": "0", "top_k": "7", "seed": "42", "max_tokens": "50"}.items():
        desk.get(f"field-{name}").fill(value)
    desk.ask("Hello!")
    desk.answer("Meow!")
    reply = desk.messages()[-1].reply
    assert (reply.system, reply.seed) == ("You are a cat.", 42)
    assert {"temperature": 0, "top_k": 7, "max_tokens": 50}.items() <= reply.sampling.items()


def test_the_model_can_be_switched(desk):
    """The next reply comes from the model that is chosen."""
    desk.ask("Hello!")
    desk.answer(HELLO)
    desk.get("model-select").select_option("twin")
    desk.ask("And now?")
    desk.answer("Now too.")
    assert [message.reply.model for message in desk.messages() if message.reply] == ["tiny", "twin"]


def test_a_tool_call_is_folded(sit):
    """What was called and what came out, out of the way until it is asked for; the same after a reload."""
    desk = sit(tools={"calculator": {}})
    desk.open()
    desk.ask("What is 2 + 3?")
    for _ in range(2):
        reply = desk.answer("It is 5.")
        call = reply.get_by_test_id("tool-call")
        expect(call).to_contain_text("calculator")
        expect(call.locator("pre").first).to_be_hidden()
        call.locator("summary").click()
        expect(call.locator("pre").first).to_contain_text("2 + 3")
        expect(call.locator("pre").last).to_have_text("5")
        desk.page.reload()
    assert [step["role"] for step in desk.messages()[-1].steps] == ["assistant", "tool"]


def test_a_thought_is_folded(desk):
    """It is no part of the answer."""
    desk.ask("Think.")
    reply = desk.answer("Done.")
    thought = reply.get_by_test_id("thinking")
    expect(thought.get_by_text("easy")).to_be_hidden()
    thought.locator("summary").click()
    expect(thought.get_by_text("easy")).to_be_visible()


def test_each_token_shows_its_alternatives(desk):
    """The tokens add up to the reply; the one that is chosen stands among others with probabilities."""
    desk.ask("Hello!")
    reply = desk.answer(HELLO)
    reply.get_by_test_id("tokens-toggle").click()
    tokens = reply.get_by_test_id("token")
    expect(tokens.first).to_be_visible()
    assert tokens.count() > 2
    tokens.nth(1).click()
    others = desk.get("token-alternatives")
    expect(others).to_contain_text("%")
    assert len(others.inner_text().split("%")) > 3
    for key, place in (("ArrowRight", 2), ("Home", 0)):
        desk.page.keyboard.press(key)
        expect(tokens.nth(place)).to_be_focused()
        expect(tokens.nth(place)).to_have_attribute("aria-pressed", "true")
    for key in ("Enter", "Space"):
        tokens.nth(1).evaluate("one => one.focus()")
        desk.page.keyboard.press(key)
        expect(tokens.nth(1)).to_have_attribute("aria-pressed", "true")
        tokens.nth(0).click()
    reply.get_by_test_id("tokens-toggle").click()
    desk.answer(HELLO)


def test_a_conversation_without_a_mouse(desk):
    """Tab, Enter and Escape are enough: ask, copy the question by its button, read, ask again."""
    keys = desk.page.keyboard
    expect(desk.get("composer-input")).to_be_focused()
    keys.type("Hello!")
    keys.press("Enter")
    desk.answer(HELLO)
    expect(desk.get("composer-input")).to_be_focused()
    for _ in range(15):
        if desk.page.evaluate("document.activeElement.dataset.testid") == "edit":
            break
        keys.press("Shift+Tab")
    keys.press("Enter")
    expect(desk.get("edit-input")).to_be_focused()
    keys.press("ControlOrMeta+a")
    keys.type("Who are you?")
    keys.press("Enter")
    desk.answer("I am Nestling.")


def test_a_line_end_is_written_with_shift(desk):
    """Enter sends, Shift and Enter make a new line."""
    desk.get("composer-input").press_sequentially("Hello!")
    desk.get("composer-input").press("Shift+Enter")
    expect(desk.get("composer-input")).to_have_value("Hello!\n")
    expect(desk.get("message")).to_have_count(0)


def test_a_reply_goes_on_while_another_conversation_is_looked_at(desk, brake):
    """The list marks it; who comes back sees it grow. The language, whose switch loads the page anew, stays until it is whole."""
    brake.after(12)
    desk.ask("Go on.")
    expect(desk.page.locator(GROWING)).to_contain_text("one")
    expect(desk.get("language-switch")).to_be_disabled()
    desk.get("new-chat").click()
    expect(desk.get("message")).to_have_count(0)
    expect(desk.get("conversation").get_by_title("Writing a reply")).to_be_visible()
    desk.get("conversation-open").click()
    expect(desk.page.locator(GROWING)).to_contain_text("one")
    desk.get("new-chat").click()
    brake.release()
    expect(desk.get("conversation").get_by_title("Writing a reply")).to_have_count(0)
    expect(desk.get("language-switch")).to_be_enabled()
    desk.get("conversation-open").click()
    reply = desk.answer("twelve")
    words = desk.messages()[-1].content.split()
    assert len(words) == 48
    assert reply.get_by_test_id("message-text").inner_text().split() == words


def test_too_many_requests(sit, monkeypatch):
    """The reason stands where the reply would; after a while the same question can be sent again."""
    monkeypatch.setattr(limits, "MINUTE", 600.0)
    desk = sit(requests_per_minute=40)
    desk.open()
    asked = desk.store.of("anybody").conversations
    id = asked.create().id
    asked.ask(id, "Hello!", None)
    desk.open(f"chat/{id}")
    expect(desk.get("reply-error")).to_contain_text("no reply yet")
    while desk.page.request.get(f"{desk.url}/api/flags").ok:
        continue
    desk.get("retry").click()
    expect(desk.get("reply-error")).to_contain_text(re.compile(r"Too many requests; try again in \d+ s\."))
    monkeypatch.setattr(limits, "MINUTE", 0.1)
    desk.get("retry").click()
    desk.answer(HELLO)
    assert all("429" in complaint for complaint in desk.complaints)
    desk.complaints.clear()


def test_a_message_that_is_too_long(desk):
    """It is said where the reply would stand; the message can be shortened there."""
    desk.ask("Hello! " * 100)
    expect(desk.get("reply-error")).to_contain_text("longer than the model can read")
    expect(desk.get("retry")).to_be_visible()
    desk.get("edit").click()
    desk.get("edit-input").fill("Hello!")
    desk.get("edit-send").click()
    desk.answer(HELLO)
    expect(desk.get("reply-error")).to_have_count(0)
    assert all("400" in complaint for complaint in desk.complaints)
    desk.complaints.clear()


def test_what_was_not_read_is_said(desk):
    """A conversation that has outgrown the context: the reply says how much of it was left out, also after a reload."""
    desk.open(f"chat/{desk.long_talk()}")
    desk.ask("Hello!")
    desk.until(lambda: len(desk.messages()) == 22)
    count = desk.messages()[-1].reply.forgotten
    assert count > 0
    for _ in range(2):
        expect(desk.get("notice")).to_have_text(
            f"{count} earlier messages had no room in the model's context and were not read."
        )
        desk.page.reload()


@pytest.mark.parametrize(("view", "box"), [("chat", ""), ("compare", "compare-")])
def test_a_question_that_comes_before_the_conversation(desk, view, box):
    """What is sent while the page still fetches a conversation goes on with it, and makes no new one."""
    id, held = desk.long_talk(), []
    desk.page.route(f"**/api/conversations/{id}", lambda route: held.append(route))
    desk.open(f"{view}/{id}")
    desk.get(f"{box}input" if box else "composer-input").fill("Hello!")
    desk.get(f"{box}send").click()
    desk.until(lambda: held)
    desk.page.wait_for_timeout(200)
    held[0].continue_()
    desk.until(lambda: len(desk.messages()) > 21)
    assert {message.conversation for message in desk.messages()} == {id}
    asked = next(message for message in desk.messages() if message.content == "Hello!")
    assert asked.parent is not None
