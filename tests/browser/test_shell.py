"""What is around the conversation: list, search, languages, colours, narrow screens, names, the key."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

VIEWS = ("chat", "compare", "arena", "runs")
CONTROLS = "button, input, select, textarea, a[href], iframe, summary, [role=button]"
NAMELESS = """(controls) => [...document.querySelectorAll(controls)]
  .filter((one) => one.checkVisibility({visibilityProperty: true}))
  .filter((one) => ![one.getAttribute("aria-label"), one.title, one.labels?.length, one.innerText?.trim(),
    document.getElementById(one.getAttribute("aria-labelledby"))?.innerText.trim()].some(Boolean))
  .map((one) => one.outerHTML)"""
DOUBLE = """() => { const ids = [...document.querySelectorAll("[id]")].map((one) => one.id);
  return ids.filter((id, place) => ids.indexOf(id) !== place); }"""
PALE = """() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => { const [r, g, b] = parts(colour).map((c) => { c /= 255;
    return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ground = (one) => { for (let at = one; at; at = at.parentElement) {
    const [r, g, b, a = 1] = parts(getComputedStyle(at).backgroundColor); if (a > 0.99) return `rgb(${r},${g},${b})`; }
    return "rgb(255,255,255)"; };
  return [...document.querySelectorAll("p, h1, h2, h3, a, span, strong, button, label, li, td, th, code, summary")]
    .filter((one) => one.checkVisibility({visibilityProperty: true, opacityProperty: true}) && !one.closest(":disabled, .hidden")
      && [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim()))
    .map((one) => { const [a, b] = [light(getComputedStyle(one).color), light(ground(one))].sort((x, y) => y - x);
      return [(a + 0.05) / (b + 0.05), one.innerText.slice(0, 30)]; })
    .filter(([contrast]) => contrast < 4.5); }"""
WIDE = "() => document.documentElement.scrollWidth - window.innerWidth"
HELLO = "Hello! How can I help you?"


def test_conversations_are_listed_and_found(desk):
    """The latest first; a search finds words inside them; one can be renamed and deleted."""
    desk.ask("Hello!")
    desk.answer(HELLO)
    desk.get("new-chat").click()
    expect(desk.get("message")).to_have_count(0)
    desk.ask("Who are you?")
    desk.answer("I am Nestling.")
    expect(desk.get("conversation")).to_have_count(2)
    expect(desk.get("conversation").first).to_contain_text("Who are you?")
    desk.get("search").fill("how can i")
    expect(desk.get("conversation")).to_have_count(1)
    desk.get("conversation-open").click()
    desk.answer(HELLO)
    desk.get("conversation-rename").click()
    desk.get("rename-input").fill("Greeting")
    desk.get("rename-input").press("Enter")
    expect(desk.get("conversation")).to_contain_text("Greeting")
    desk.get("search").fill("")
    desk.get("conversation").filter(has_text="Greeting").get_by_test_id("conversation-delete").click()
    desk.get("dialog-ok").click()
    expect(desk.get("conversation")).to_have_count(1)
    desk.until(lambda: [one.title for one in desk.store.conversations.page().data] == ["Who are you?"])


def test_the_key_is_asked_for(sit):
    """A service with keys: a wrong one is asked for again, the right one stays for this tab."""
    desk = sit(keys=[{"name": "ann", "secret": "open sesame"}])
    desk.page.goto(desk.url)
    desk.get("key-input").fill("wrong")
    desk.get("dialog-ok").click()
    expect(desk.get("key-input")).to_be_empty()
    desk.get("key-input").fill("open sesame")
    desk.get("dialog-ok").click()
    expect(desk.get("key-input")).to_have_count(0)
    desk.ask("Hello!")
    desk.answer(HELLO)
    desk.page.reload()
    desk.answer(HELLO)
    expect(desk.get("key-input")).to_have_count(0)
    assert all("401" in complaint for complaint in desk.complaints)
    desk.complaints.clear()


def test_chinese(sit):
    """A Chinese browser gets a Chinese page; the switch goes to English and back."""
    desk = sit(locale="zh-CN")
    desk.open()
    expect(desk.page.locator("html")).to_have_attribute("lang", "zh-Hans")
    expect(desk.get("new-chat")).to_have_text("新对话")
    desk.ask("你好")
    desk.answer("你好！我能帮你什么？")
    for view in VIEWS:
        desk.open(view)
        expect(desk.get("nav-runs")).to_have_text("训练")
        shown = desk.page.locator("main").inner_text()
        assert "_" not in shown.replace("nestling run recipes/demo.yaml", ""), "a key stands where a text should"
    desk.get("language-switch").click()
    expect(desk.get("nav-runs")).to_have_text("Runs")


@pytest.mark.parametrize("screen", [{"width": 1280}, {"width": 390, "touch": True}], ids=["wide", "narrow"])
def test_every_view_fits_is_named_and_can_be_read(sit, screen):
    """No view is wider than the screen, no control is without a name, no text too pale on its ground (WCAG AA, 4.5)."""
    desk = sit(height=844, **screen)
    desk.open()
    desk.ask("Code.")
    desk.answer("So:")
    for view in (None, *VIEWS):
        if view:
            desk.open(view)
        assert desk.page.evaluate(WIDE) <= 0, view
        assert desk.page.evaluate(NAMELESS, CONTROLS) == [], view
        assert desk.page.evaluate(DOUBLE) == [], view
        for scheme in ("light", "dark"):
            desk.page.emulate_media(color_scheme=scheme)
            assert desk.page.evaluate(PALE) == [], (view, scheme)


def test_dark_and_light(sit):
    """As the system says, until the person says otherwise; that is remembered."""
    desk = sit(scheme="dark")
    desk.open()
    ground = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).reduce((sum, n) => sum + Number(n), 0)"
    assert desk.page.evaluate(ground) < 200
    for _ in range(3):
        desk.get("theme-switch").click()
        if desk.page.evaluate("document.documentElement.dataset.theme") == "light":
            break
    expect(desk.page.locator("html")).to_have_attribute("data-theme", "light")
    assert desk.page.evaluate(ground) > 600
    desk.page.reload()
    expect(desk.page.locator("html")).to_have_attribute("data-theme", "light")


def test_a_narrow_screen_has_a_drawer(sit):
    """The list of conversations comes when it is asked for, and goes when a conversation is chosen."""
    desk = sit(width=390, height=844, touch=True)
    desk.open()
    desk.ask("Hello!")
    desk.answer(HELLO)
    expect(desk.get("conversation-open")).not_to_be_in_viewport()
    desk.get("menu-open").click()
    expect(desk.get("conversation-open")).to_be_in_viewport()
    desk.get("nav-arena").click()
    expect(desk.get("arena-empty")).to_be_visible()
    expect(desk.get("conversation-open")).not_to_be_in_viewport()


def test_without_the_service_nothing_is_lost(desk):
    """A question that could not be sent stands in the field again, with the reason."""
    desk.ask("Hello!")
    desk.answer(HELLO)
    desk.context.set_offline(True)
    desk.ask("And now?")
    expect(desk.get("toast")).to_be_visible()
    expect(desk.get("composer-input")).to_have_value("And now?")
    desk.context.set_offline(False)
    desk.get("send").click()
    desk.answer("Now too.")
    desk.complaints.clear()
