"""Training for a long time: does its memory grow?

    taskset -c 2,3 python benchmarks/soak_training.py --minutes 40
    taskset -c 2,3 python benchmarks/soak_training.py --minutes 40 --stages reward ppo     the others get a few steps only

Runs the recipe of tests/stages/tiny.yaml through the real command with far more steps in its four training stages,
validating, sampling, saving and logging all the while, and reads the resident memory of the process (/proc) once a second.
Printed at the end, of each stage: steps, and the slope of a straight line through memory over steps, in MiB per 1,000
steps, the first quarter left out, in which allocators and caches fill (oneDNN keeps up to 1,024 prepared matrix products,
and packed documents of ever new lengths ask for as many). Steps are shared out by measured speed: a short
run finds out how many fit the time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

TINY = Path(__file__).parents[1] / "tests" / "stages" / "tiny.yaml"
SHARES = {"pretrain": 0.5, "sft": 0.15, "reward": 0.1, "ppo": 0.25}
TRIAL = {"pretrain": 400, "sft": 200, "reward": 100, "ppo": 10}  # steps of the short run
EVERY = {"pretrain": 200, "sft": 200, "reward": 200, "ppo": 20}  # steps between validations
Measured = dict[str, list[tuple[int, float]]]  # of each stage: (step, MiB)


def command(out: Path, steps: dict[str, int]) -> list[str]:
    """The recipe with so many steps in each stage."""
    words = [
        str(Path(sys.executable).with_name("nestling")),
        "run",
        str(TINY),
        "--out",
        str(out),
        "--quiet",
        "--threads",
        "1",
    ]
    for stage, count in steps.items():
        wishes = {"steps": count, "validate_every": EVERY[stage], "log_every": 10, "save_every": 2}
        words += [word for name, value in wishes.items() for word in ("--set", f"{stage}.training.{name}={value}")]
    return [*words, "--set", "pretrain.sample_every=200", "--set", "ppo.objective.kl_target=1"]


def soak(out: Path, steps: dict[str, int]) -> tuple[Measured, dict[str, float]]:
    """Run it; gives memory by stage and step, and the seconds of each stage's steps."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command(out, steps), stdout=subprocess.DEVNULL, stderr=said, env=environment)
        measured = weigh(process, out, steps)
        if process.returncode:
            said.seek(0)
            sys.exit(said.read().decode())
    return measured, {name: json.loads((out / name / "stage.json").read_text())["seconds"] for name in steps}


def weigh(process: subprocess.Popen[bytes], out: Path, steps: dict[str, int]) -> Measured:
    """Its memory once a second while a stage trains; told once a minute."""
    measured: Measured = {stage: [] for stage in steps}
    told = time.monotonic()
    while process.poll() is None:
        time.sleep(1)
        stage = next((name for name in reversed(steps) if (out / name / "metrics.jsonl").exists()), None)
        if stage is None:
            continue
        step, weight = last_step(out / stage / "metrics.jsonl"), resident(process.pid)
        if step and weight and not (out / stage / "stage.json").exists():
            measured[stage].append((step, weight))
        if time.monotonic() - told > 60:
            told = time.monotonic()
            print(f"{stage}: step {step:,}, {weight:.1f} MiB", flush=True)
    return measured


def last_step(log: Path) -> int:
    """Of the last whole row."""
    found = re.findall(rb'"step": (\d+)', log.read_bytes()[-2000:])
    return int(found[-1]) if found else 0


def resident(process: int) -> float:
    """MiB of a process, 0 of one that has ended."""
    try:
        status = Path("/proc", str(process), "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    found = re.search(r"VmRSS:\s+(\d+)", status)
    return int(found[1]) / 1024 if found else 0.0


def main() -> None:
    """Find out how many steps fit, run them, print each stage's slope."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--stages", nargs="+", choices=list(SHARES), default=list(SHARES), help="that share the time")
    options = parser.parse_args()
    whole = sum(SHARES[stage] for stage in options.stages)
    with tempfile.TemporaryDirectory() as folder:
        _, seconds = soak(Path(folder, "trial"), TRIAL)
        speed = {stage: TRIAL[stage] / seconds[stage] for stage in SHARES}
        given = {stage: options.minutes * 60 * SHARES[stage] / whole for stage in options.stages}
        steps = TRIAL | {stage: max(20, int(given[stage] * speed[stage])) for stage in given}
        print("steps:", steps, flush=True)
        measured, seconds = soak(Path(folder, "run"), steps)
    for stage in options.stages:
        points = measured[stage]
        late = np.array([point for point in points if point[0] > steps[stage] / 4] or [(0, np.nan), (1, np.nan)])
        slope = np.polyfit(late[:, 0], late[:, 1], 1)[0]
        print(
            f"{stage:9} {steps[stage]:7,} steps in {seconds[stage]:6.0f} s: {late[0, 1]:.1f} MiB after a quarter, "
            f"{late[-1, 1]:.1f} at the end, {slope * 1000:+.3f} MiB per 1,000 steps"
        )


if __name__ == "__main__":
    main()
