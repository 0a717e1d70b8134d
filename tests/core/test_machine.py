"""What is left of a machine: the tightest of its limits, read from files as the kernel writes them."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from nestling.core import machine
from nestling.core.machine import PeakMemory, free_memory, held_memory, usable_cores
from nestling.core.runtime import give_back_freed_memory

MB = 1 << 20
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of control groups of our own making."""
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    return tmp_path


def written(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def member_of(monkeypatch: pytest.MonkeyPatch, *lines: list[str]) -> None:
    monkeypatch.setattr(machine, "_own_groups", lambda: list(lines))


def test_the_limit_of_a_cgroup_counts_and_page_cache_does_not(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    member_of(monkeypatch, ["0", "", "/pod/box"])
    written(groups / "pod" / "box", memory__max="max\n", memory__current=f"{90 * MB}\n")
    stat = f"anon {60 * MB}\ninactive_file {20 * MB}\n"
    written(groups / "pod", memory__max=f"{100 * MB}\n", memory__current=f"{90 * MB}\n", memory__stat=stat)
    room = free_memory()
    assert room is not None
    assert room.free == 30 * MB
    assert room.source == "of 0.1 GB that the cgroup allows"
    shared = free_memory(share=3)
    assert shared is not None
    assert shared.free == 10 * MB


def test_the_first_version_of_cgroups_is_read_too(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    member_of(monkeypatch, ["4", "memory", "/box"], ["2", "cpu,cpuacct", "/box"])
    written(groups / "memory", memory__limit_in_bytes=f"{(1 << 63) - 4096}\n", memory__usage_in_bytes="5\n")
    stat = f"total_inactive_file {1 * MB}\n"
    limits = {"memory__limit_in_bytes": f"{10 * MB}", "memory__usage_in_bytes": f"{4 * MB}"}
    written(groups / "memory" / "box", **limits, memory__stat=stat)
    room = free_memory()
    assert room is not None
    assert room.free == 7 * MB
    written(groups / "cpu" / "box", cpu__cfs_quota_us="50000\n", cpu__cfs_period_us="100000\n")
    assert usable_cores() == 0.5


def test_without_limits_the_system_says_what_is_free(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    member_of(monkeypatch)
    room = free_memory()
    assert room is not None
    assert 0 < room.free < machine.proc_numbers(Path("/proc/meminfo"))["MemTotal"]
    assert usable_cores() >= 1


def test_a_share_of_the_processor_is_a_limit(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    member_of(monkeypatch, ["0", "", "/box"])
    written(groups / "box", cpu__max="150000 100000\n")
    assert usable_cores() == min(1.5, usable_cores())
    written(groups / "box", cpu__max="max 100000\n")
    assert usable_cores() == int(usable_cores())


def test_what_ulimit_allows_counts(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    member_of(monkeypatch)
    held = machine.proc_numbers(Path("/proc/self/status"))["VmData"]
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (held + 200 * MB, before[1]))
    try:
        room = free_memory()
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
    assert room is not None
    assert 150 * MB < room.free <= 200 * MB
    assert room.source.endswith("RLIMIT_DATA allows")


def test_the_peak_is_of_what_came_after() -> None:
    give_back_freed_memory()  # an earlier test may have told the C library to keep it
    cpu = torch.device("cpu")
    first = PeakMemory(cpu)
    held = torch.ones(50 * MB)  # 200 MB, touched
    high = first.read()
    del held
    later = PeakMemory(cpu)
    assert high > held_memory(cpu) + 150 * MB
    assert later.read() < high - 150 * MB
