"""Ctrl-C, kill -9, a full disk, a folder that is taken: nothing lost, and the same command goes on to the same weights."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from calls import CALM, TINY, CommandLine

from nestling.core.storage import FolderLock, content_hash, read_json

STEPS = ("--until", "pretrain", "--set", "pretrain.training.steps=40", "--set", "pretrain.training.save_every=60")


def pretrained(out: Path) -> str:
    return content_hash(out / "pretrain" / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(nestling: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-training of 40 steps that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert nestling("run", TINY, "--out", out, *CALM, *STEPS).code == 0
    return out


def test_ctrl_c_saves_and_a_full_disk_leaves_it_and_the_same_command_goes_on(
    nestling: CommandLine, whole: Path, tmp_path: Path
) -> None:
    words = ("run", TINY, "--out", tmp_path / "run", *CALM, *STEPS)
    stopped = nestling(*words, signal=signal.SIGINT, when=tmp_path / "run" / "pretrain" / "metrics.jsonl")
    assert stopped.code == 130, stopped
    assert stopped.err.splitlines()[-1].startswith("stopped by Ctrl-C after step ")
    assert stopped.err.splitlines()[-1].endswith("of 40, saved; run the same command again to go on")
    resume = tmp_path / "run" / "pretrain" / "resume"
    (state,) = resume.glob("step-*")
    before = content_hash(state)

    message = nestling.refused(*words, largest_file=100_000)  # every state is larger
    assert (
        f"{resume}/step-00000040: can't be written: File too large; free some space and run the same command" in message
    )
    assert list(resume.glob("step-*")) == [state]
    assert content_hash(state) == before

    done = nestling(*words)
    assert done.code == 0, done.err
    assert pretrained(tmp_path / "run") == pretrained(whole)


def test_ctrl_c_while_data_are_gathered(nestling: CommandLine, tmp_path: Path) -> None:
    words = ("run", TINY, "--out", tmp_path / "run", "--until", "corpus")
    large = ("--set", "corpus.sources.0.settings.bytes=300000000")
    stopped = nestling(*words, *large, signal=signal.SIGINT, when=tmp_path / "run" / "corpus" / ".*.jsonl")
    assert stopped.code == 130, stopped
    assert stopped.err.splitlines()[-1] == "interrupted in corpus; run the same command again to go on"
    assert [path.name for path in (tmp_path / "run" / "corpus").iterdir()] == ["started.json"]
    assert nestling(*words).code == 0


MOMENTS = (
    "corpus/started.json",
    "corpus/.*train.jsonl",
    "corpus/stage.json",
    "tokenize/.train.*",
    "pretrain/resume/.step-*",
    "pretrain/.model.*",
    "pretrain/stage.json",
    "sft/resume/.step-*",
    "reward/.model.*",
    "ppo/metrics.jsonl",
    "ppo/stage.json",
)


def test_kill_9_at_every_hand_over_ends_in_the_same_weights(
    nestling: CommandLine, finished: Path, tmp_path: Path
) -> None:
    """Killed while files are being written, while states are being saved and between stages, then run to its end."""
    out = tmp_path / "run"
    words = ("run", TINY, "--out", out, *CALM)
    ends = [nestling(*words, signal=signal.SIGKILL, when=out / moment).code for moment in MOMENTS]
    assert ends == [-signal.SIGKILL] * len(MOMENTS)
    done = nestling(*words)
    assert done.code == 0, done.err
    same_as(finished, out)


def same_as(one: Path, other: Path) -> None:
    for stage in ("pretrain", "sft", "reward", "ppo"):
        weights = [content_hash(run / stage / "model" / "model.safetensors") for run in (one, other)]
        assert weights[0] == weights[1], stage
        left = [path.name for path in (other / stage).iterdir() if path.name.startswith(".")]
        assert left == [], stage
    rows = [read_json(run / "evaluate" / "stage.json")["report"]["answers"] for run in (one, other)]
    assert rows[0] == rows[1]


def test_a_folder_in_use_is_refused(nestling: CommandLine, tmp_path: Path) -> None:
    with FolderLock(tmp_path):
        message = nestling.refused("run", TINY, "--out", tmp_path)
    assert f"{tmp_path}: another run (process {os.getpid()}) is writing here; wait for it" in message
    assert not (tmp_path / "corpus").exists()


def test_a_file_in_the_place_of_a_folder_is_refused(nestling: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    for out in (tmp_path / "taken", tmp_path / "taken" / "run"):
        assert "a file stands where a folder should be" in nestling.refused("run", TINY, "--out", out)
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize("made", ["folder", "file"])
def test_what_a_run_did_not_make_is_never_removed(nestling: CommandLine, tmp_path: Path, made: str) -> None:
    dear = tmp_path / "corpus" / "novel.txt" if made == "folder" else tmp_path / "corpus"
    dear.parent.mkdir(exist_ok=True)
    dear.write_text("years of work")
    message = nestling.refused("run", TINY, "--out", tmp_path)
    assert f"{tmp_path / 'corpus'}: in the way of a stage, and not made by a run" in message
    assert dear.read_text() == "years of work"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 6 MB that can be made read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or not shutil.which("mount"):
        pytest.skip("only root may mount a small disk")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_read_only_folder_is_refused(nestling: CommandLine, disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    message = nestling.refused("run", TINY, "--out", disk / "run")
    assert message == f"{disk / 'run'}: can't be written: Read-only file system; choose another folder with --out"


def test_a_disk_that_fills_up_loses_nothing(nestling: CommandLine, disk: Path, whole: Path) -> None:
    """The run stops at the first save that has no room; with room again it ends in the same weights."""
    words = ("run", TINY, "--out", disk / "run", *CALM, *STEPS)
    assert nestling(*words, "--until", "ngram").code == 0
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(disk).free - 150_000))
    message = nestling.refused(*words)
    assert "can't be written: No space left on device; free some space and run the same command again" in message
    ballast.unlink()
    done = nestling(*words)
    assert done.code == 0, done.err
    assert pretrained(disk / "run") == pretrained(whole)
