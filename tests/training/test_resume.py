"""Kill, damage, fill the disk: what was saved is found again, and losses are bitwise those of an uninterrupted run."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from toy_objective import Toy

from nestling.core.errors import Interrupted, UserError
from nestling.core.runtime import detect
from nestling.training import resume
from nestling.training.hooks import Hook, Run
from nestling.training.loop import train
from nestling.training.settings import TrainSettings

SETTINGS = TrainSettings(steps=30, learning_rate=0.02, log_every=1, save_every=0, compile="off")


def learn(folder: Path, dtype: str = "fp32", hooks: tuple[Hook, ...] = (), steps: int = 30) -> tuple[list[Any], Toy]:
    toy = Toy(dropout=0.1, updates_per_step=2)
    settings = SETTINGS.model_copy(update={"steps": steps})
    result = train(toy, settings, folder=folder, runtime=detect("cpu", dtype), seed=3, hooks=hooks, quiet=True)
    return [(row["step"], row["loss"], row["grad_norm"], row["coefficient"]) for row in result.history], toy


class StopAt(Hook):
    """Sends Ctrl-C to this process in a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, run: Run) -> None:
        if run.step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_ctrl_c_finishes_the_step_and_going_on_is_bitwise_the_same(tmp_path: Path, dtype: str) -> None:
    whole, first = learn(tmp_path / "whole", dtype)
    with pytest.raises(Interrupted, match="Ctrl-C after step 11 of 30, saved; run the same command again"):
        learn(tmp_path / "cut", dtype, hooks=(StopAt(11),))
    again, second = learn(tmp_path / "cut", dtype)
    assert again == whole
    for one, two in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, two)


CHILD = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from test_resume import learn
learn(Path({folder!r}), "bf16", steps=120)
"""


def test_kill_nine_anywhere(tmp_path: Path) -> None:
    """A child is killed twice at random moments; who goes on from there ends as if nothing had been."""
    whole, _ = learn(tmp_path / "whole", "bf16", steps=120)
    folder = tmp_path / "killed"
    code = CHILD.format(tests=str(Path(__file__).parent), folder=str(folder))
    killed = 0
    for _ in range(2):
        before = resume.saved(folder / "resume")[:1]
        child = subprocess.Popen([sys.executable, "-c", code])
        while child.poll() is None and resume.saved(folder / "resume")[:1] == before:
            time.sleep(0.005)  # until it has trained and saved
        time.sleep(random.random() * 0.2)
        child.kill()
        killed += child.wait() == -signal.SIGKILL
    assert killed >= 1, "the child was too fast to be killed in its work"
    again, _ = learn(folder, "bf16", steps=120)
    assert again == whole


def test_values_come_back_as_they_were(tmp_path: Path) -> None:
    state = {
        "numbers": {"a": 0.1, "b": None, "c": [1, (True, "x")]},
        "by_index": {0: torch.arange(3), 7: torch.ones(2, dtype=torch.bfloat16)},
        "scalar": torch.tensor(1.5, dtype=torch.float64),
    }
    step, found, complaints = resume.load_newest(resume.save(tmp_path, 12, state).parent) or pytest.fail(
        "nothing found"
    )
    found = resume.read(found)
    assert (step, complaints) == (12, [])
    assert found["numbers"] == state["numbers"]
    assert list(found["by_index"]) == [0, 7]
    assert torch.equal(found["by_index"][7], torch.ones(2, dtype=torch.bfloat16))
    assert found["scalar"].dtype == torch.float64


def test_two_newest_are_kept_and_a_damaged_one_is_passed_over(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        resume.save(tmp_path, step, {"x": torch.full((100,), step)})
    assert [path.name for path in resume.saved(tmp_path)] == ["step-00000003", "step-00000002"]
    tensors = tmp_path / "step-00000003" / resume.TENSORS
    tensors.write_bytes(tensors.read_bytes()[:-8] + b"damaged!")
    step, state, complaints = resume.load_newest(tmp_path) or pytest.fail("nothing found")
    assert step == 2
    assert int(resume.read(state["x"])[0]) == 2
    assert "damaged" in complaints[0]
    assert "step-00000003" in complaints[0]


@pytest.mark.parametrize("name", [resume.TENSORS, resume.STATE])
def test_all_damaged_says_what_to_do(tmp_path: Path, name: str) -> None:
    path = resume.save(tmp_path, 1, {"x": torch.ones(3)})
    (path / name).write_bytes(b"{")
    with pytest.raises(UserError, match=r"damaged.*delete the folder"):
        resume.load_newest(tmp_path)


def test_full_disk_keeps_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resume.save(tmp_path, 1, {"x": torch.ones(3)})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(UserError, match="No space left on device"):
        resume.save(tmp_path, 2, {"x": torch.ones(3)})
    assert [path.name for path in resume.saved(tmp_path)] == ["step-00000001"]
    assert not list(tmp_path.glob(".*"))


def test_state_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"another model: b is None there and \(2,\) here"):
        saved = resume.load(resume.save(tmp_path, 1, {"a": torch.ones(2)}))[1]
        resume.restore_tensors({"a": torch.ones(2), "b": torch.ones(2)}, saved, tmp_path)
