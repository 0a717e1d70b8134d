"""The pipeline: skip, resume, step aside, bring back, and errors before any work."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nestling.core import pipeline
from nestling.core.config import Config
from nestling.core.errors import Interrupted, UserError
from nestling.core.recipe import build_recipe, load_recipe
from nestling.core.runtime import detect
from nestling.core.storage import FolderLock, read_json


class Settings(Config):
    value: int = 1
    crash: bool = False


@pytest.fixture
def calls() -> Iterator[list[str]]:
    """Two toy stages outside the package, found by their dotted names: `toy.count` and `toy.double`."""
    log: list[str] = []

    def count(settings: Settings, context: pipeline.StageContext) -> dict[str, Any]:
        log.append(context.name)
        (context.folder / "n.txt").write_text(str(settings.value))
        if settings.crash and len(log) == 1:
            raise RuntimeError("power cut")
        return {"n": settings.value}

    def double(settings: Settings, context: pipeline.StageContext) -> dict[str, Any]:
        log.append(context.name)
        return {"n": 2 * int((context.reads["count"] / "n.txt").read_text())}

    for name, run, reads in (("count", count, {}), ("double", double, {"count": "count"})):
        module = ModuleType(f"toy.{name}")
        module.__dict__.update(VERSION=1, READS=reads, Settings=Settings, run=run)
        sys.modules[f"toy.{name}"] = module
    sys.modules["toy"] = ModuleType("toy")
    yield log
    for name in ("toy", "toy.count", "toy.double"):
        del sys.modules[name]


def recipe(**count: Any) -> Any:
    return build_recipe(
        {"name": "t", "stages": {"count": {"stage": "toy.count", **count}, "double": {"stage": "toy.double"}}}
    )


def go(out: Path, **count: Any) -> dict[str, Any]:
    return pipeline.run(recipe(**count), out, detect("cpu", "fp32"), quiet=True)


def test_unchanged_stages_are_skipped(tmp_path: Path, calls: list[str]) -> None:
    assert go(tmp_path)["double"] == {"n": 2}
    assert go(tmp_path)["double"] == {"n": 2}
    assert calls == ["count", "double"]
    record = read_json(tmp_path / "double" / "stage.json")
    assert record["reads"] == {"count": str(tmp_path / "count")}


def test_a_changed_setting_reruns_what_depends_on_it_and_comes_back(tmp_path: Path, calls: list[str]) -> None:
    go(tmp_path)
    assert go(tmp_path, value=5)["double"] == {"n": 10}
    assert go(tmp_path)["double"] == {"n": 2}
    assert calls == ["count", "double", "count", "double"], "the first results come back from .previous"


def test_an_interrupted_stage_resumes_in_its_folder(tmp_path: Path, calls: list[str]) -> None:
    with pytest.raises(RuntimeError, match="power cut"):
        go(tmp_path, crash=True)
    (tmp_path / "count" / "half-done").touch()
    go(tmp_path, crash=True)
    assert (tmp_path / "count" / "half-done").exists()
    with_other_settings = go(tmp_path, value=3)
    assert with_other_settings["count"] == {"n": 3}
    assert not (tmp_path / "count" / "half-done").exists()


def test_mistakes_surface_before_any_work(tmp_path: Path, calls: list[str]) -> None:
    bad = build_recipe(
        {"name": "t", "stages": {"count": {"stage": "toy.count"}, "double": {"stage": "toy.double", "valu": 2}}}
    )
    with pytest.raises(UserError, match=r"double.valu: unknown setting; did you mean 'value'"):
        pipeline.run(bad, tmp_path, detect("cpu", "fp32"), quiet=True)
    assert calls == []


def test_a_locked_run_folder_is_refused(tmp_path: Path, calls: list[str]) -> None:
    with FolderLock(tmp_path), pytest.raises(UserError, match="another run"):
        go(tmp_path)


def test_an_input_may_be_a_path_and_a_missing_one_is_named(tmp_path: Path, calls: list[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "n.txt").write_text("21")
    stages = {"double": {"stage": "toy.double", "reads": {"count": str(tmp_path / "mine")}}}
    done = pipeline.run(
        build_recipe({"name": "t", "stages": stages}), tmp_path / "out", detect("cpu", "fp32"), quiet=True
    )
    assert done["double"] == {"n": 42}
    stages["double"]["reads"] = {"count": "nowhere"}
    with pytest.raises(UserError, match=r"double.reads.count: input not found \(got 'nowhere'\)"):
        pipeline.plan(build_recipe({"name": "t", "stages": stages}), tmp_path)


def test_a_changed_file_from_outside_is_noticed(tmp_path: Path, calls: list[str]) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("one")
    sys.modules["toy.count"].__dict__["files"] = lambda settings, seed: [text]
    go(tmp_path / "out")
    go(tmp_path / "out")
    assert calls == ["count", "double"]
    text.write_text("other")
    go(tmp_path / "out")
    assert calls == ["count", "double"] * 2


def test_overrides_reach_stages_and_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("stages:\n  count: {stage: toy.count, deep: {a: 1}}\n  double:\n")
    read = load_recipe(path, ["count.deep.b=2e-3", "seed=7", "double.value=[1, 2]"])
    assert read.name == "r"
    assert read.seed == 7
    assert read.stages[0].settings == {"deep": {"a": 1, "b": "2e-3"}} or read.stages[0].settings["deep"]["b"] == 0.002
    assert read.stages[1].settings == {"value": [1, 2]}


@pytest.mark.parametrize(
    ("override", "message"),
    [("count", "key=value"), ("coun.value=1", "did you mean 'count'"), ("sede=1", "did you mean 'seed'")],
)
def test_bad_overrides_are_explained(tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("stages:\n  count: {stage: toy.count}\n")
    with pytest.raises(UserError, match=message):
        load_recipe(path, [override])


def test_those_who_look_on_are_told(tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The diary names the stages with their keys and says how it ended; it is hidden, so it is no part of a result."""

    def told() -> tuple[str, str | None]:
        diary = read_json(tmp_path / pipeline.DIARY)
        assert list(diary["keys"]) == ["count", "double"]
        return diary["state"], diary.get("error")

    with pytest.raises(RuntimeError):
        go(tmp_path, crash=True)
    assert told() == ("failed", "RuntimeError: power cut")
    work = sys.modules["toy.double"].run

    def interrupted(settings: Settings, context: pipeline.StageContext) -> dict[str, Any]:
        assert told() == ("running", None)
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["toy.double"], "run", interrupted)
    with pytest.raises(Interrupted):
        go(tmp_path)
    assert told() == ("stopped", None)
    monkeypatch.setattr(sys.modules["toy.double"], "run", work)
    go(tmp_path)
    assert told() == ("finished", None)
    assert read_json(tmp_path / pipeline.DIARY)["keys"]["count"] == read_json(tmp_path / "count" / "stage.json")["key"]
