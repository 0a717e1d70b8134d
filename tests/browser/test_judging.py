"""What a person says of replies: thumbs, reports, which of two is better; and what follows from it."""

from __future__ import annotations

from playwright.sync_api import expect

from nestling.serving.store.records import VoteRecord

HELLO = "Hello! How can I help you?"
MODELS = {"tiny", "twin"}


def test_thumbs_are_stored_with_a_reason(desk):
    """Down with a reason and words, shown again after a reload; then up instead, and taken back."""
    desk.ask("Hello!")
    reply = desk.answer(HELLO)
    reply.get_by_test_id("vote-down").click()
    reason = desk.page.locator('[data-testid^="reason-"]:not([data-testid="reason-comment"])').first
    name = reason.get_attribute("value")
    reason.check(force=True)
    desk.get("reason-comment").fill("too short")
    desk.get("dialog-ok").click()
    expect(reply.get_by_test_id("vote-down")).to_have_attribute("aria-pressed", "true")
    desk.until(lambda: desk.messages()[-1].vote == VoteRecord(value=-1, reason=name, comment="too short"))
    desk.page.reload()
    reply = desk.answer(HELLO)
    expect(reply.get_by_test_id("vote-down")).to_have_attribute("aria-pressed", "true")
    reply.get_by_test_id("vote-up").click()
    desk.until(lambda: desk.messages()[-1].vote == VoteRecord(value=1))
    desk.get("dialog-cancel").click()
    reply.get_by_test_id("vote-up").click()
    desk.until(lambda: desk.messages()[-1].vote is None)


def test_a_reply_can_be_reported(desk):
    """With a category and words."""
    desk.ask("Hello!")
    reply = desk.answer(HELLO)
    reply.get_by_test_id("flag").click()
    desk.get("flag-category").select_option(index=1)
    category = desk.get("flag-category").input_value()
    desk.get("flag-comment").fill("not nice")
    desk.get("dialog-ok").click()
    expect(desk.get("dialog")).to_have_count(0)
    expect(desk.get("toast")).to_be_visible()
    message = desk.messages()[-1]
    assert message.flagged
    assert [(flag.category, flag.comment) for flag in desk.store.feedback.flags()] == [(category, "not nice")]


def test_another_reply_is_ranked_against_the_one_before(desk):
    """The answer lands as a ranking of the two, and the question is not asked again."""
    desk.ask("Hello!")
    before = desk.answer(HELLO).get_attribute("data-id")
    desk.get("regenerate").click()
    expect(desk.get("variant-count")).to_have_text("2/2")
    now = desk.answer(HELLO).get_attribute("data-id")
    desk.get("rank-better").click()
    expect(desk.get("rank")).to_have_text("Saved. Thank you.")
    [conversation] = desk.store.conversations.page().data
    assert [ranking.order for ranking in desk.store.feedback.rankings(conversation.id)] == [[[now], [before]]]
    desk.page.reload()
    desk.answer(HELLO)
    expect(desk.get("rank")).to_have_count(0)


def test_blind_comparisons_make_the_arena(desk):
    """Nobody is told who is who before the vote; then both are named, and the arena has the figures of all votes."""
    desk.open("arena")
    expect(desk.get("arena-empty")).to_be_visible()
    desk.open("compare")
    for question, answer, choice in (("Hello!", HELLO, "a"), ("And now?", "Now too.", "tie")):
        desk.get("compare-input").fill(question)
        desk.get("compare-send").click()
        round_ = desk.get("compare-round").last
        for side in ("a", "b"):
            expect(round_.get_by_test_id(f"side-{side}")).to_contain_text(answer)
        expect(round_.get_by_test_id(f"choice-{choice}")).to_be_visible()
        assert not MODELS & set(round_.inner_text().split())
        round_.get_by_test_id(f"choice-{choice}").click()
        expect(round_.get_by_test_id("compare-result")).to_be_visible()
        assert set(round_.inner_text().split()) >= MODELS
    [conversation] = desk.store.conversations.page().data
    first, second = desk.store.arena.of(conversation.id)
    assert [first.choice, second.choice] == ["a", "tie"]
    desk.open("arena")
    expect(desk.get("arena-votes").locator("strong").first).to_have_text("2")
    rows = desk.get("arena-row")
    winner, loser = first.identities["a"].model, first.identities["b"].model
    expect(rows).to_have_count(2)
    assert [row.get_attribute("data-model") for row in rows.all()] == [winner, loser]
    figures = [[cell.inner_text() for cell in row.locator("td").all()][-4:] for row in rows.all()]
    assert figures == [["2", "1", "1", "0"], ["2", "0", "1", "1"]]  # votes, won, tied, lost


def test_a_comparison_is_found_again(desk):
    """By its address: undecided and blind as it was left, then with its result."""
    desk.open("compare")
    desk.get("compare-input").fill("Hello!")
    desk.get("compare-send").click()
    expect(desk.get("choice-b")).to_be_visible()
    for _ in range(2):
        for side in ("a", "b"):
            expect(desk.get(f"side-{side}")).to_contain_text(HELLO)
        assert not MODELS & set(desk.get("compare-round").inner_text().split())
        desk.page.reload()
    desk.get("choice-b").click()
    for _ in range(2):
        expect(desk.get("compare-result")).to_contain_text("B was better")
        assert set(desk.get("compare-round").inner_text().split()) >= MODELS
        desk.page.reload()
    [conversation] = desk.store.conversations.page().data
    assert [one.choice for one in desk.store.arena.of(conversation.id)] == ["b"]
