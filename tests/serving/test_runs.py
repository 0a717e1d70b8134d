"""The runs of a folder over the API: their state, their logs as they grow, nothing from outside."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest

from nestling.core.errors import UserError
from nestling.core.pipeline import DIARY
from nestling.core.storage import FolderLock, is_locked, write_json
from nestling.serving import runs as runs_module
from nestling.serving.runs import MARK, PART, Runs

SPECS = [{"name": "pretrain", "stage": "pretrain", "settings": {"training": {"steps": 3}}},
         {"name": "sft", "stage": "sft"}]  # fmt: skip
SECRET = "nobody should read this"
ROWS = [{"step": step, "loss": 3.0 / step, "seconds": 2.0 * step, "eta": 6.0 - 2 * step} for step in (1, 2, 3)]


def make_run(folder: Path, state: str = "", done: tuple[str, ...] = (), **diary) -> Path:
    """A run folder whose last process told `state` (nothing: it was made before there were diaries)."""
    write_json(folder / "recipe.json", {"name": "toy", "description": "A toy.", "seed": 1, "stages": SPECS})
    for name in done:
        record = {"key": f"key-{name}", "seconds": 4.0, "settings": {"batch": 8}, "report": {"loss": 1.5, "text": "x"}}
        write_json(folder / name / "stage.json", record)
    if state:
        keys = {spec["name"]: f"key-{spec['name']}" for spec in SPECS}
        write_json(folder / DIARY, {"keys": keys, "state": state, "begun": "2026-01-01T00:00:00+00:00", **diary})
    return folder


def log(folder: Path, *rows: dict, stage: str = "pretrain", name: str = "metrics.jsonl") -> None:
    (folder / stage).mkdir(exist_ok=True, parents=True)
    with (folder / stage / name).open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def states(folder: Path) -> tuple[str, list[str]]:
    [run] = Runs(folder).all()
    return run["state"], [stage["state"] for stage in run["stages"]]


@pytest.mark.parametrize(("state", "done", "expected"), [
    ("finished", ("pretrain", "sft"), ("finished", ["done", "done"])),
    ("failed", ("pretrain",), ("failed", ["done", "failed"])),
    ("stopped", ("pretrain",), ("stopped", ["done", "stopped"])),
    ("running", ("pretrain",), ("stopped", ["done", "stopped"])),  # killed: no lock is held
    ("", ("pretrain", "sft"), ("finished", ["done", "done"])),
    ("", (), ("stopped", ["stopped", "waiting"])),
])  # fmt: skip
def test_the_state_of_a_run(folder, state, done, expected):
    """From what its process told, else from its stages."""
    make_run(folder / "a", state, done)
    assert states(folder) == expected


def test_a_running_run_tells_how_far_it_is(folder):
    """While its lock is held; a stage of other settings is not done, one beyond --until not asked for."""
    run = make_run(folder / "a", "running", ("pretrain", "sft"))
    log(run, *ROWS[:2])
    write_json(run / DIARY, {"keys": {"pretrain": "another"}, "state": "running"})
    assert not is_locked(run)
    with FolderLock(run):
        assert is_locked(run)
        [told] = Runs(folder).all()
    assert told["state"] == "running"
    assert [stage["state"] for stage in told["stages"]] == ["running", "done"]
    assert {key: told["stages"][0][key] for key in ("step", "seconds", "eta")} == {
        "step": 2,
        "seconds": 4.0,
        "eta": 2.0,
    }


def test_looking_on_does_not_keep_a_run_from_starting(folder):
    """A lock that is looked at a thousand times in the meantime can still be taken."""
    run = make_run(folder / "a")
    (run / ".lock").touch()
    code = ("import sys; from pathlib import Path; from nestling.core.storage import is_locked\n"
            "import time; print('x', flush=True)\nwhile True: is_locked(Path(sys.argv[1])); time.sleep(0.0005)")  # fmt: skip
    with subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE) as watcher:
        try:
            assert watcher.stdout is not None
            watcher.stdout.readline()
            taken = 0
            for _ in range(200):
                with FolderLock(run):
                    taken += 1
        finally:
            watcher.kill()
    assert taken == 200


def test_a_run_with_everything(folder):
    """Settings and figures of its stages: as resolved where they are done, as in the recipe before."""
    make_run(folder / "a", "failed", ("sft",), error="sft: no such file")
    told = Runs(folder).get("a")
    assert (told["title"], told["error"], told["report"]) == ("toy", "sft: no such file", None)
    pretrain, sft = told["stages"]
    assert (pretrain["settings"], pretrain["figures"]) == ({"training": {"steps": 3}}, {})
    assert (sft["settings"], sft["figures"], sft["seconds"]) == ({"batch": 8}, {"loss": 1.5}, 4.0)


def test_logs_are_told_as_they_grow(folder):
    """Each answer has what came since the one before; half a line waits until it is whole."""
    run = make_run(folder / "a")
    log(run, ROWS[0])
    runs = Runs(folder)
    first = runs.news("a")
    assert first["stages"] == {"pretrain": {"fresh": ["rows"], "rows": [ROWS[0]]}}
    log(run, ROWS[1])
    log(run, {"step": 1, "text": "a"}, name="samples.jsonl")
    with (run / "pretrain" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    second = runs.news("a", first["next"])
    samples = [{"step": 1, "text": "a"}]
    assert second["stages"] == {"pretrain": {"fresh": ["samples"], "rows": [ROWS[1]], "samples": samples}}
    with (run / "pretrain" / "metrics.jsonl").open("a") as file:
        file.write('ss": 1.0}\nno JSON\n')
    assert runs.news("a", second["next"])["stages"]["pretrain"]["rows"] == [{"step": 3, "loss": 1.0}]


def test_a_log_that_was_written_anew_is_told_anew(folder):
    """After a resume rows are dropped and others follow, even where the file is longer than before."""
    run = make_run(folder / "a")
    log(run, *ROWS, {"step": 4, "note": "x" * MARK})
    runs = Runs(folder)
    before = runs.news("a")
    (run / "pretrain" / "metrics.jsonl").unlink()
    anew = [ROWS[0], *({"step": step, "loss": 0.5, "note": "y" * MARK} for step in range(2, 9))]
    log(run, *anew)
    told = runs.news("a", before["next"])["stages"]["pretrain"]
    assert (told["fresh"], told["rows"]) == (["rows"], anew)


def test_a_long_log_comes_in_parts(folder):
    """Never more than a part at once; `more` says to ask again."""
    run = make_run(folder / "a")
    rows = [{"step": step, "note": "x" * 1000} for step in range(2 * PART // 1000)]
    log(run, *rows)
    runs, after, told, parts = Runs(folder), "", [], 0
    while True:
        answer = runs.news("a", after)
        told += answer["stages"]["pretrain"]["rows"]
        after, parts = answer["next"], parts + 1
        if not answer["more"]:
            break
    assert told == rows
    assert parts == 3


@pytest.fixture
def served(serve, folder):
    """(run folder, client of a service that shows it)."""
    run = make_run(folder / "a", "finished", ("pretrain", "sft"))
    (folder.parent / "secret.txt").write_text(SECRET)
    (run / "report.html").write_text("<p>well done</p>")
    with httpx.Client(base_url=serve(runs=Runs(folder)).url) as client:
        yield run, client


def test_the_routes(served):
    """The list, a run, its logs; a cursor that is none is refused."""
    run, client = served
    log(run, ROWS[0])
    assert [one["name"] for one in client.get("/api/runs").json()["data"]] == ["a"]
    assert client.get("/api/runs/a").json()["stages"][0]["figures"] == {"loss": 1.5}
    told = client.get("/api/runs/a/metrics").json()
    assert told["stages"]["pretrain"]["rows"] == [ROWS[0]]
    assert client.get("/api/runs/a/metrics", params={"after": told["next"]}).json()["stages"]["pretrain"]["rows"] == []
    for cursor in ("x", "!!", "e30x", "bnVsbA", "eyJhIjpbLTEsMF19" * 3):
        assert client.get("/api/runs/a/metrics", params={"after": cursor}).status_code == 400
    assert client.get("/api/runs/b").status_code == client.get("/api/runs/b/metrics").status_code == 404


@pytest.mark.parametrize("name", ["..", "../runs/a", "a/..", "a/../../secret.txt", ".", "", "/etc", "a\0", ".previous"])
def test_no_name_leads_elsewhere(served, name):
    """Whatever is asked for, however it is spelt: a run of the folder or nothing."""
    run, client = served
    make_run(run / ".previous")
    make_run(run.parent / ".previous")
    for spelt in (quote(name, safe=""), quote(quote(name, safe=""), safe="")):
        for path in (f"/api/runs/{spelt}", f"/api/runs/{spelt}/metrics", f"/runs/{spelt}/report.html"):
            asked = HTTPConnection(client.base_url.host, client.base_url.port)
            asked.request("GET", path)  # httpx would tidy the path up
            answer = asked.getresponse()
            assert answer.status in (404, 307), path
            assert SECRET not in answer.read().decode()
            asked.close()


def test_links_out_of_a_run_are_not_followed(served):
    """Neither as a report, nor as a log or a stage."""
    run, client = served
    secret = run.parent.parent / "secret.txt"
    (run / "report.html").unlink()
    (run / "report.html").symlink_to(secret)
    (run / "pretrain" / "metrics.jsonl").symlink_to(secret)
    other = run.parent.parent / "other"
    log(other, ROWS[0], stage="sft")
    (run / "sft" / "stage.json").unlink()
    (run / "sft").rmdir()
    (run / "sft").symlink_to(other / "sft")
    assert client.get("/api/runs/a").json()["report"] is None
    assert client.get("/api/runs/a/metrics").json()["stages"] == {}


def test_stages_are_folders_of_the_run(folder):
    """A recipe that names others is shown without them."""
    run = make_run(folder / "a")
    log(folder, ROWS[0], stage="b")
    specs = [{"name": name} for name in ("../b", "..", "/etc", "", None, 3, "sft")] + ["x"]
    write_json(run / "recipe.json", {"stages": specs})
    assert [stage["name"] for stage in Runs(folder).get("a")["stages"]] == ["sft"]
    assert Runs(folder).news("a")["stages"] == {}


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"stages": 3}', '{"stages": {"a": 1}}', "\ud800"])
def test_a_broken_run_breaks_nothing(folder, text):
    """The others are shown all the same."""
    make_run(folder / "whole")
    (folder / "broken").mkdir()
    (folder / "broken" / "recipe.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert {run["name"] for run in Runs(folder).all()} == {"whole", "broken"}
    assert Runs(folder).get("broken")["stages"] == []


def test_a_report_is_shown_in_a_sandbox(served):
    """Only with the ticket that `get` gave; nothing in it runs or loads."""
    _, client = served
    address = client.get("/api/runs/a").json()["report"]
    answer = client.get(address)
    assert answer.text == "<p>well done</p>"
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("sandbox; default-src 'none'")
    assert client.get(address.partition("?")[0]).status_code == 404
    assert client.get(address[:-1] + "é").status_code == 404


def test_with_keys_runs_want_one(serve, folder):
    """The list and the logs need a key that is for them; the ticket of a report is its own key."""
    run = make_run(folder / "a", "finished", ("pretrain", "sft"))
    (run / "report.html").write_text("<p>well done</p>")
    service = serve(
        runs=Runs(folder), keys=[{"name": "ann", "secret": "a", "runs": True}, {"name": "bob", "secret": "b"}]
    )
    with httpx.Client(base_url=service.url) as client:
        for path in ("/api/runs", "/api/runs/a", "/api/runs/a/metrics", "/api/runs/nowhere"):
            refused = client.get(path, headers={"authorization": "Bearer b"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "runs_forbidden"), path
        assert client.get("/api/runs").status_code == client.get("/api/runs/a/metrics").status_code == 401
        told = client.get("/api/runs/a", headers={"authorization": "Bearer a"}).json()
        assert client.get(told["report"]).status_code == 200


def test_the_folder_of_runs_is_found(folder, monkeypatch):
    """Beside the run that a model lies in; a run itself is the only one there is."""
    run = make_run(folder / "a", "", ("sft",))
    make_run(folder / "b")
    (run / "sft" / "model").mkdir()
    for place in (run, run / "sft" / "model"):
        assert {one["name"] for one in Runs.around([place]).all()} == {"a", "b"}
    assert [one["name"] for one in Runs(run).all()] == ["a"]
    monkeypatch.chdir(folder.parent)
    assert {one["name"] for one in Runs.around([]).all()} == {"a", "b"}
    assert Runs(folder / "nowhere").all() == []


@pytest.mark.parametrize("cursor", ["[1]", "3", '{"a": 1}', '{"a": [1]}', '{"a": ["x", 1]}', '{"a": [[], 1]}', "{",
                                    '{"a": [0, 1e999]}', "[" * 9999, "\udcff"])  # fmt: skip
def test_what_no_answer_gave_is_no_cursor(folder, cursor):
    """Said in one line, whatever it is."""
    make_run(folder / "a")
    given = base64.urlsafe_b64encode(cursor.encode(errors="surrogateescape")).decode()
    with pytest.raises(UserError, match="not the `next`"):
        Runs(folder).news("a", given)


@pytest.mark.parametrize("place", ["-1", "1e999", "1" + "0" * 400, "1e30", "NaN", "7"])
def test_a_place_that_the_log_does_not_have_is_its_start(folder, place):
    """Then everything is told again."""
    log(make_run(folder / "a"), *ROWS)
    after = base64.urlsafe_b64encode(f'{{"pretrain/rows": [{place}, 5]}}'.encode()).decode()
    assert Runs(folder).news("a", after)["stages"]["pretrain"]["rows"] == ROWS


def test_a_log_that_goes_while_it_is_read_is_left_out(folder, monkeypatch):
    log(make_run(folder / "a"), ROWS[0])
    there = runs_module._is_file
    monkeypatch.setattr(runs_module, "_is_file", lambda path: path.name == "metrics.jsonl" or there(path))
    (folder / "a" / "pretrain" / "metrics.jsonl").unlink()
    assert Runs(folder).news("a")["stages"] == {}
    assert [run["name"] for run in Runs(folder).all()] == ["a"]
