"""Labels for the next moderation model: reviewed reports and verdicts, and messages that nobody minded."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from nestling.cli.app import build_app
from nestling.core.storage import read_rows
from nestling.core.types import Labelled
from nestling.serving.store.export import Filters, export
from nestling.serving.store.records import Missing, Verdict
from nestling.serving.store.store import Store


def verdict(flagged: bool, message: str | None = None, text: str | None = None) -> Verdict:
    """What a moderation model of two categories said."""
    categories = {"hate": flagged, "violence": False}
    return Verdict(direction="input", moderator="m", flagged=flagged, message=message, text=text, categories=categories)


@pytest.fixture
def labels(store, tmp_path):
    """`labels(**filters)`: rows by text, read as training reads them, and the counts."""

    def run(**filters) -> tuple[dict[str, Labelled], object]:
        counts = export(store, tmp_path / "out", Filters(**filters))
        return {row.text: row for row in read_rows(tmp_path / "out" / "labels.jsonl", Labelled.from_row)}, counts

    return run


def test_what_an_operator_upholds_is_positive_and_what_he_rejects_negative(store, talk, labels):
    """Of the categories that were named, and no others; what he has not looked at is left out."""
    id, question, [answer] = talk("Fools!", "No.")
    right = store.feedback.flag(question.id, "harassment")
    wrong = store.feedback.flag(question.id, "violence")
    store.feedback.flag(answer.id, "hate")
    store.moderation.review(right.id, True)
    store.moderation.review(wrong.id, False)
    found, counts = labels()
    assert list(found) == ["Fools!"]
    row = found["Fools!"]
    assert (row.labels, row.judged) == (("harassment",), ("harassment", "violence"))
    assert row.meta == {"source": "feedback", "kind": "report", "conversation": id, "group": id}
    assert counts.left_out == {"report not reviewed": 1}
    assert labels(trust_reports=True)[0]["No."].labels == ("hate",)


def test_verdicts_are_reviewed_too(store, talk, labels):
    """On messages, on replies that were withheld, and on texts outside any conversation; the later review counts."""
    _, question, [answer] = talk("Hills!", "")
    store.moderation.add([
        verdict(True, question.id), verdict(True, answer.id, "withheld"), verdict(True, text="loose"),
        verdict(True, text="open"),
    ])  # fmt: skip
    cases = {case.text: case for case in store.moderation.cases()}
    assert [case.categories for case in cases.values()] == [["hate"]] * 4
    for text, upheld in (("Hills!", True), ("Hills!", False), ("withheld", True), ("loose", False)):
        store.moderation.review(cases[text].id, upheld)
    found, counts = labels()
    assert {text: (row.labels, row.judged) for text, row in found.items()} == {
        "Hills!": ((), ("hate",)), "withheld": (("hate",), ("hate",)), "loose": ((), ("hate",)),
    }  # fmt: skip
    assert found["loose"].meta["group"] == "loose"
    assert counts.left_out == {"verdict not reviewed": 1}
    assert [case.text for case in store.moderation.cases()] == ["open"]


def test_clean_messages_that_nobody_reported_are_sampled_as_negatives(store, talk, labels):
    """As many as asked for, always the same ones; neither those that were never judged nor those that somebody minded."""
    talked = [talk(f"question {number}", "never judged")[1] for number in range(6)]
    store.moderation.add([verdict(False, message.id) for message in talked])
    report = store.feedback.flag(talked[0].id, "hate")
    store.moderation.review(report.id, True)
    store.moderation.add([verdict(True, talked[1].id)])
    found, counts = labels(clean=3)
    clean = {text: row for text, row in found.items() if row.meta["kind"] == "clean"}
    assert len(clean) == 3
    assert all((row.labels, row.judged) == ((), None) for row in clean.values())
    assert not {"question 0", "question 1", "never judged"} & set(clean)
    assert counts.written == {"labels": 1, "clean labels": 3}
    assert set(labels(clean=2)[0]) - {"question 0"} < set(clean)
    assert set(labels(clean=100)[0]) == {f"question {number}" for number in (0, 2, 3, 4, 5)}
    assert set(labels(clean=0)[0]) == {"question 0"}


def test_a_rejected_report_no_longer_marks_the_message(store, talk):
    id, question, [answer] = talk("Hi", "x")
    report = store.feedback.flag(question.id, "hate")
    store.moderation.add([verdict(True, answer.id)])
    assert [message.flagged for message in store.conversations.messages(id)] == [True, True]
    for case in store.moderation.cases():
        store.moderation.review(case.id, False)
    assert [message.flagged for message in store.conversations.messages(id)] == [False, False]
    assert store.feedback.flags() == [report.model_copy(update={"upheld": False})]


def test_an_operator_of_one_owner_sees_and_reviews_only_his(store, reply):
    ann, bob = store.of("ann"), store.of("bob")
    id = ann.conversations.create().id
    report = ann.feedback.flag(ann.conversations.ask(id, "Hi", None).id, "hate")
    assert bob.moderation.cases() == []
    with pytest.raises(Missing, match="no such report"):
        bob.moderation.review(report.id, True)
    assert [case.id for case in store.moderation.cases()] == [report.id]


def test_the_command_lists_upholds_and_rejects(address, tmp_path):
    store = Store.open(address)
    id = store.conversations.create().id
    question = store.conversations.ask(id, "Fools [bold]!", None)
    right, wrong = store.feedback.flag(question.id, "harassment", "rude"), store.feedback.flag(question.id, "hate")
    app = build_app("feedback")

    def command(*words: object) -> str:
        result = CliRunner().invoke(app, ["feedback", *map(str, words)], env={"COLUMNS": "120"}, catch_exceptions=False)
        assert result.exit_code == 0
        return result.output

    shown = command("review", address)
    assert right.id in shown
    assert "Fools [bold]!" in shown
    assert "(rude)" in shown
    assert right.id not in command("review", address, "--uphold", right.id, "--reject", wrong.id)
    command("export", address, "--out", tmp_path / "data", "--clean", "0")
    [row] = read_rows(tmp_path / "data" / "labels.jsonl", Labelled.from_row)
    assert (row.labels, row.judged) == (("harassment",), ("harassment", "hate"))
    store.close()
