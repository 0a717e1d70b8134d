"""The Runs view: a run as it goes on, and when it has ended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from playwright.sync_api import expect

from nestling.core.pipeline import DIARY
from nestling.core.storage import FolderLock, write_json
from nestling.serving.runs import Runs

STAGES = ("corpus", "pretrain", "ppo")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one run, whose first stage is done."""
    run = tmp_path / "runs" / "toy"
    stages = [{"name": name, "stage": name, "settings": {"training": {"steps": 9}}} for name in STAGES]
    write_json(run / "recipe.json", {"name": "toy", "description": "A toy <b>run</b>.", "seed": 7, "stages": stages})
    write_json(run / DIARY, {"keys": dict.fromkeys(STAGES, "k"), "state": "running"})
    write_json(
        run / "corpus" / "stage.json", {"key": "k", "seconds": 2.5, "settings": {"bytes": 10}, "report": {"rows": 3}}
    )
    return run


def log(folder: Path, stage: str, rows: list[dict], name: str = "metrics") -> None:
    (folder / stage).mkdir(exist_ok=True)
    with (folder / stage / f"{name}.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def learnt(first: int, last: int) -> list[dict]:
    return [{"step": n, "loss": 4 / n, "lr": 0.01, "val_bpb": 2 / n, "odd_figure": n, "seconds": n, "eta": 9 - n}
            for n in range(first, last + 1)]  # fmt: skip


def test_a_run_is_watched(sit, folder):
    """It shows up in the list; its curves grow while one looks; a new stage and its samples are followed; then it is done."""
    desk = sit(runs=Runs(folder.parent), haste=20)
    with FolderLock(folder):
        log(folder, "pretrain", learnt(1, 3))
        desk.open("runs")
        card = desk.get("run", name="toy")
        expect(card).to_contain_text("pretrain · step 3 · 6 s left")
        card.locator("a").click()
        expect(desk.get("run-state", state="running")).to_be_visible()
        expect(desk.get("stage", name="corpus")).to_contain_text("2.5 s")
        loss = desk.get("curve", title="Loss")
        expect(loss).to_contain_text("step 3")
        shape = loss.locator("path").first.get_attribute("d")
        log(folder, "pretrain", learnt(4, 6))
        expect(loss).to_contain_text("step 6")
        assert loss.locator("path").first.get_attribute("d") != shape
        expect(desk.get("curve", title="odd figure")).to_be_hidden()
        log(folder, "pretrain", [{"step": 6, "prompt": "Once <i>upon", "text": " a time"}], "samples")
        expect(desk.get("sample")).to_have_text("Once <i>upon a time")
        write_json(
            folder / "pretrain" / "stage.json", {"key": "k", "seconds": 6, "settings": {}, "report": {"loss": 0.6}}
        )
        log(folder, "ppo", [{"step": n, "proxy_reward": n, "true_reward": 1.0, "kl": 0.1 * n} for n in (1, 2)])
        expect(desk.get("curve", title="Reward")).to_contain_text("learnt reward")
        expect(desk.get("stage-tab", name="ppo")).to_be_checked()
        desk.get("stage-tab", name="pretrain").check(force=True)
        expect(loss).to_contain_text("step 6")
        write_json(
            folder / DIARY, {"keys": dict.fromkeys(STAGES, "k"), "state": "failed", "error": "ppo: <b>no</b> memory"}
        )
    expect(desk.get("run-state", state="failed")).to_be_visible()
    expect(desk.get("run-error")).to_have_text("ppo: <b>no</b> memory")
    expect(loss).to_be_visible()


def test_the_report_is_shown_when_there_is_one(sit, folder):
    """In a frame that can run nothing; also on a service with keys."""
    (folder / "report.html").write_text(
        "<h1>Well done</h1><script>parent.hurt = 1; document.body.textContent = ''</script>"
    )
    desk = sit(runs=Runs(folder.parent), keys=[{"name": "ann", "secret": "a", "runs": True}])
    desk.open("runs/toy")
    desk.get("key-input").fill("a")
    desk.get("dialog-ok").click()
    expect(desk.get("run-state", state="stopped")).to_be_visible()
    expect(desk.page.frame_locator("iframe").locator("h1")).to_have_text("Well done")
    assert desk.page.evaluate("window.hurt") is None
    assert all("sandboxed" in complaint or "401" in complaint for complaint in desk.complaints)
    desk.complaints.clear()
    desk.get("settings", name="corpus").locator("summary").click()
    expect(desk.get("settings", name="corpus")).to_contain_text("bytes")


def test_runs_are_not_for_every_key(sit, folder):
    """A key that is not for them is told so."""
    desk = sit(runs=Runs(folder.parent), keys=[{"name": "bob", "secret": "b"}])
    desk.open("runs")
    desk.get("key-input").fill("b")
    desk.get("dialog-ok").click()
    expect(desk.page.locator("main")).to_contain_text("This key is not for training runs.")
    expect(desk.get("run")).to_have_count(0)
    desk.complaints.clear()


def test_a_run_that_is_not_there(sit, folder):
    """Is said; the way back is there."""
    desk = sit(runs=Runs(folder.parent))
    desk.open("runs/nowhere")
    expect(desk.page.locator("main")).to_contain_text("no such run")
    assert all("404" in complaint for complaint in desk.complaints)
    desk.complaints.clear()
    desk.get("runs-back").click()
    expect(desk.get("run", name="toy")).to_be_visible()


def test_nobody_is_asked_while_nobody_looks(sit, folder):
    """Leaving the view ends the questions."""
    desk = sit(runs=Runs(folder.parent), haste=20)
    asked: list[str] = []
    desk.page.on("request", lambda request: asked.append(request.url) if "/api/runs" in request.url else None)
    with FolderLock(folder):
        desk.open("runs/toy")
        expect(desk.get("run-state", state="running")).to_be_visible()
        desk.get("nav-arena").click()
        expect(desk.get("arena-empty")).to_be_visible()
        count = len(asked)
        desk.page.wait_for_timeout(500)  # ten seconds of the page's
    assert len(asked) == count
