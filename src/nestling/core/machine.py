"""What this machine has, and what of it is left: memory within every limit that applies, cores, disk.

On Linux all of it is read from /proc and the cgroup's files (versions 1 and 2); elsewhere what the system doesn't tell is
left unknown, and nothing is held against it.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CGROUPS = Path("/sys/fs/cgroup")
LIMITS = {"RLIMIT_AS": "VmSize", "RLIMIT_DATA": "VmData"}


@dataclass(frozen=True)
class Room:
    """Bytes that may still be taken, and what says so: `Room(7 << 30, "cgroup limit of 8 GB")`."""

    free: int
    source: str


def free_memory(device: torch.device | str = "cpu", share: int = 1) -> Room | None:
    """How much memory this process can still take on a device: the least that any limit leaves; None where none is known.

    Args:
        share: processes of this run on this machine, which divide a CPU's memory among them.
    """
    import torch  # here, because it takes seconds

    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free, total = torch.cuda.mem_get_info(device)
        return Room(free + unused, f"of {total / 1e9:.1f} GB on {device}")
    rooms = [*_system(), *_cgroups(), *_process()]
    tightest = min(rooms, key=lambda room: room.free, default=None)
    return tightest and Room(max(0, tightest.free) // share, tightest.source)


def _system() -> Iterator[Room]:
    numbers = proc_numbers(Path("/proc/meminfo"))
    if "MemAvailable" in numbers:
        yield Room(numbers["MemAvailable"], f"of {numbers['MemTotal'] / 1e9:.1f} GB of memory")


def _process() -> Iterator[Room]:
    """What ulimit leaves."""
    used = proc_numbers(Path("/proc/self/status"))
    for name, counted in LIMITS.items():
        limit, _ = resource.getrlimit(getattr(resource, name))
        if limit != resource.RLIM_INFINITY and counted in used:
            yield Room(limit - used[counted], f"of {limit / 1e9:.1f} GB that {name} allows")


def _cgroups() -> Iterator[Room]:
    """What each control group that this process is in leaves; page cache that can be given up counts as free."""
    for folder, limit, used, cache in _memory_groups():
        most = _number(folder / limit)
        if most is not None and most < 1 << 60:  # version 1 writes a huge number for no limit
            kept = proc_numbers(folder / "memory.stat").get(cache, 0)
            yield Room(most - (_number(folder / used) or 0) + kept, f"of {most / 1e9:.1f} GB that the cgroup allows")


def _memory_groups() -> Iterator[tuple[Path, str, str, str]]:
    """(folder, names of the files with limit and use, line of memory.stat) of the group and all groups above it."""
    for _, controllers, path in _own_groups():
        if controllers == "":
            root, names = CGROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = CGROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        place = root / path.lstrip("/")
        for folder in (place, *place.parents):
            if folder.is_relative_to(root):
                yield (folder, *names)


def _own_groups() -> list[list[str]]:
    """[number, controllers, path] of each control group of this process."""
    try:
        return [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []


def _number(path: Path) -> int | None:
    """The first number in a file; None where there is no file, or the word "max" in it."""
    try:
        word = path.read_text().split()[0]
    except (OSError, IndexError):
        return None
    return int(word) if word.lstrip("-").isdigit() else None


def proc_numbers(path: Path) -> dict[str, int]:
    """"name: 12 kB" lines of a file of the kernel's, in bytes; nothing where there is no such file."""
    try:
        lines = [line.replace(":", " ").split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    known = {words[0]: words[1:] for words in lines if len(words) > 1 and words[1].isdigit()}
    return {name: int(words[0]) * (1024 if words[-1] == "kB" else 1) for name, words in known.items()}


def usable_cores() -> float:
    """Cores that this process may use: those it is bound to, or the cgroup's share of them where that is less."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [bound, *_quotas()]
    return min(quotas)


def _quotas() -> Iterator[float]:
    for _, controllers, path in _own_groups():
        if controllers == "" and (CGROUPS / path.lstrip("/") / "cpu.max").exists():
            quota, period = (CGROUPS / path.lstrip("/") / "cpu.max").read_text().split()
            yield from [int(quota) / int(period)] if quota.isdigit() else []
        elif "cpu" in controllers.split(","):
            folder = CGROUPS / "cpu" / path.lstrip("/")
            quota_us, period_us = (_number(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
            if quota_us and period_us and quota_us > 0:
                yield quota_us / period_us


class PeakMemory:
    """The most memory that was held since this was made: by the process, or by tensors on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(device)
        else:
            try:
                Path("/proc/self/clear_refs").write_text("5")  # the mark of the most that was resident
            except OSError:
                return  # then it is the most since the process began

    def read(self) -> int:
        """Bytes."""
        if self._device.type == "cuda":
            import torch

            return torch.cuda.max_memory_allocated(self._device)
        if (marked := proc_numbers(Path("/proc/self/status")).get("VmHWM")) is not None:
            return marked
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def held_memory(device: torch.device) -> int:
    """Bytes that the process holds now, or that its tensors do on a GPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.memory_allocated(device)
    return proc_numbers(Path("/proc/self/status")).get("VmRSS", 0)
