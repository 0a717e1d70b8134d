"""What a person says of replies: thumbs, reports, which of two is better; and what follows from it."""

from __future__ import annotations

from playwright.sync_api import expect

from nestling.serving.store.records import Candidate, ConversationChanges, ModelVersion, VoteRecord, Written

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


def test_what_was_not_read_is_said_of_each_candidate(desk):
    """While a comparison is written, when it waits for a vote, after the vote, and of the chosen reply in the chat."""
    id = desk.long_talk()
    desk.open(f"compare/{id}")
    desk.get("compare-input").fill("Hello!")
    desk.get("compare-send").click()
    said = "earlier messages had no room in the model's context and were not read."
    for _ in range(2):
        expect(desk.get("choice-b")).to_be_visible()
        for side in ("a", "b"):
            expect(desk.get(f"side-{side}").get_by_test_id("notice")).to_contain_text(said)
        desk.page.reload()
    desk.get("choice-b").click()
    expect(desk.get("compare-result")).to_be_visible()
    expect(desk.get("notice")).to_have_count(2)
    desk.get("compare-to-chat").click()
    for _ in range(2):
        expect(desk.get("message", role="assistant").last.get_by_test_id("notice")).to_contain_text(said)
        desk.page.reload()


def test_a_candidate_that_was_cut_says_so(sit):
    """A reply that ended for want of room does so in a comparison too, before and after the vote is due."""
    desk = sit()
    id = desk.store.of("anybody").conversations.create(ConversationChanges(sampling={"max_tokens": 3})).id
    desk.open(f"compare/{id}")
    desk.get("compare-input").fill("Go on.")
    desk.get("compare-send").click()
    for _ in range(2):
        expect(desk.get("choice-b")).to_be_visible()
        for side in ("a", "b"):
            expect(desk.get(f"side-{side}").get_by_test_id("notice")).to_have_count(1)
        desk.page.reload()


def test_the_arena_fits_on_a_phone(sit):
    """All figures of a model with a long name are within the screen, nothing scrolls sideways, and rows are still rows."""
    desk = sit(width=390, height=844)
    store = desk.store.of("anybody")
    id = store.conversations.create().id
    question = store.conversations.ask(id, "Hello!", None).id
    models = ["tiny", "a-model-with-a-rather-long-name-7b-instruct"]
    comparison = store.arena.compare(id, question, [Candidate(model=name) for name in models])
    for side in ("a", "b"):
        name = store.arena.candidate(comparison.id, side).model
        store.arena.answer(comparison.id, side, Written(version=ModelVersion(name=name), content=HELLO))
    store.arena.decide(comparison.id, "a")
    desk.open("arena")
    expect(desk.page.get_by_role("row")).to_have_count(3)
    for row in desk.get("arena-row").all():
        cells = [row.get_by_role("rowheader"), *row.get_by_role("cell").all()]
        assert len(cells) == 8
        boxes = [cell.bounding_box() for cell in cells]
        assert all(box["width"] > 0 and box["x"] >= 0 and box["x"] + box["width"] <= 390 for box in boxes)
    wider = "[...document.querySelectorAll('main, main *')].filter((one) => one.scrollWidth > one.clientWidth + 1)"
    assert desk.page.evaluate(f"{wider}.filter((one) => getComputedStyle(one).overflowX === 'auto').length") == 0
