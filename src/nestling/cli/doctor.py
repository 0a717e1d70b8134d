"""`nestling doctor`: what this machine offers, how fast it is, and what will hurt."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from nestling import __version__
from nestling.core.machine import free_memory, usable_cores
from nestling.core.runtime import Runtime, detect, measured_peak, named_dtype
from nestling.core.storage import write_bytes
from nestling.tools import python as python_tool
from nestling.training.compiling import missing_compiler

GB = 1e9
FAST = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_f", "avx2", "sve", "sme", "bf16")
"""Instructions worth naming, the fastest first."""


def doctor(
    folder: Annotated[Path, typer.Option(help="Where runs will be written.")] = Path("runs"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.", min=1)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what this machine offers for training and serving, how fast it is, and what will hurt. Takes some seconds."""
    load = os.getloadavg()[0]  # before this adds to it
    runtime = detect(device, threads=threads)
    facts = {
        "software": _software(),
        "processor": _processor(load),
        "devices": _devices(),
        "computing": _computing(runtime),
        "memory": _memory(runtime),
        "disk": _disk(folder),
        "compiler": _compiler(),
        "extras": _extras(),
        "sandbox": {kept.what: kept.how for kept in python_tool.isolation()},
    }
    facts["warnings"] = warnings(facts)
    console = Console(highlight=False)
    if json:
        console.print_json(data=facts)
    else:
        _show(console, facts)


def _software() -> dict[str, Any]:
    return {
        "nestling": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda of torch": torch.version.cuda,
        "system": platform.platform(),
    }


def _processor(load: float) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    able = torch.cpu.get_capabilities()
    return {
        "name": named[1] if named else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "usable cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "load": round(load, 2),
        "instructions": [name for name in FAST if able.get(name)],
    }


def _devices() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"device": "cpu"}]
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        version = f"{card.major}.{card.minor}"
        found.append({"device": f"cuda:{number}", "name": card.name, "gb": card.total_memory / GB, "capability": version})
    return found + ([{"device": "mps"}] if torch.backends.mps.is_available() else [])


def _computing(runtime: Runtime) -> dict[str, Any]:
    """The device and precision that `auto` takes, and the FLOP/s of a matrix product in each precision there."""
    kinds = ("fp32", "bf16", "fp16") if runtime.device.type == "cuda" else ("fp32", "bf16")
    speeds = {kind: measured_peak(Runtime(runtime.device, named_dtype(kind), runtime.threads)) for kind in kinds}
    return {"device": str(runtime.device), "auto": str(runtime.dtype).removeprefix("torch."), "flops": speeds}


def _memory(runtime: Runtime) -> dict[str, Any]:
    room = free_memory()
    found: dict[str, Any] = {"free": room and room.free, "limit": room and room.source}
    if runtime.device.type == "cuda" and (card := free_memory(runtime.device)):
        found |= {"free on the device": card.free, "limit of the device": card.source}
    return found


def _disk(folder: Path) -> dict[str, Any]:
    """Free space where runs will lie, and how long a small file takes to be safe there."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    use, probe = shutil.disk_usage(place), place / f".nestling-doctor-{os.getpid()}"
    found: dict[str, Any] = {"folder": str(place.absolute()), "free": use.free, "total": use.total}
    if not os.access(place, os.W_OK):
        return found | {"writable": False}
    begun = time.perf_counter()
    try:
        for _ in range(3):
            write_bytes(probe, b"x" * 4096)
    finally:
        probe.unlink(missing_ok=True)
    # A virtual disk often says that it turns: only where it is slow too, it counts.
    return found | {"writable": True, "sync_ms": (time.perf_counter() - begun) / 3 * 1e3, "spinning": _spins(place)}


def _spins(place: Path) -> bool | None:
    """Whether the disk is said to turn; None where the system doesn't tell."""
    number = place.stat().st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    said = next((path for up in (device, device.parent) if (path := up / "queue" / "rotational").exists()), None)
    return said.read_text().strip() == "1" if said else None


def _compiler() -> str:
    """As `missing_compiler`, which asks Inductor; where Inductor looks is known without importing it for 1.5 s."""
    if sys.platform == "win32":
        return missing_compiler([torch.nn.Linear(1, 1)]) or "found"
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    return "found" if shutil.which(name) else "no C++ compiler was found (install g++ or clang)"


def _extras() -> dict[str, list[str]]:
    """What each optional part of the installation still lacks."""
    lacking: dict[str, list[str]] = {}
    for line in importlib.metadata.requires("nestling") or []:
        package, _, marker = line.partition(";")
        if (found := re.search(r"extra == ['\"](\w+)['\"]", marker)) and found[1] != "dev":
            name = re.split(r"[\s<>=!~\[]", package.strip())[0]
            lacking.setdefault(found[1], []).extend([] if _installed(name) else [name])
    return lacking


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def warnings(facts: Mapping[str, Any]) -> list[str]:
    """What will hurt, a sentence each with the way out, from the facts that `doctor --json` prints."""
    processor, computing, memory, disk = (facts[part] for part in ("processor", "computing", "memory", "disk"))
    usable, on_cpu = processor["usable cores"], computing["device"] == "cpu"
    speeds, sync = computing["flops"], disk.get("sync_ms", 0.0)
    free = float("inf") if memory["free"] is None else memory["free"]
    slow = 20 if disk.get("spinning") else 100
    bare = [what for what, how in facts["sandbox"].items() if how is None]
    found = {
        f"other work is running (load {processor['load']:.1f} on {processor['cores']} cores): training and what is "
        "measured here will be slower": processor["load"] > 0.5 * processor["cores"],
        f"{processor['threads']} threads share {usable:g} cores: set --threads {max(1, int(usable))}": on_cpu
        and processor["threads"] > usable,
        f"{usable:g} core: expect hours where two cores take minutes for a few": on_cpu and usable < 2,
        "no fast bf16: training computes in fp32, at half the speed or less": on_cpu and computing["auto"] == "float32",
        "bf16 is slower than fp32 here: set training.precision=fp32, or --dtype fp32": on_cpu
        and computing["auto"] == "bfloat16"
        and speeds["bf16"] < speeds["fp32"],
        f"compiling is off, {facts['compiler']}: long stages train about a fifth slower": facts["compiler"] != "found",
        "an NVIDIA driver is here, but this PyTorch can't use it: install a build with CUDA": on_cpu
        and (facts["software"]["cuda of torch"] is None and Path("/proc/driver/nvidia/version").exists()),
        f"{free / GB:.1f} GB of memory is free: small models only, with training.recompute=blocks": free < 2 * GB,
        f"{disk['free'] / GB:.1f} GB of disk is free: give another folder with --out": disk["free"] < 5 * GB,
        f"{disk['folder']} can't be written: give another folder with --out": not disk.get("writable", True),
        f"the disk takes {sync:.0f} ms to make a file safe: raise training.save_every": sync > slow,
        f"the Python tool will refuse to run code, nothing keeps it from: {', '.join(bare)}; install bubblewrap or "
        "libseccomp": bool(bare),
    }
    return [sentence for sentence, holds in found.items() if holds]


def _show(console: Console, facts: Mapping[str, Any]) -> None:
    table = Table(title="this machine", show_header=False)
    for name, text in _rows(facts):
        table.add_row(name, text)
    console.print(table)
    for line in facts["warnings"]:
        console.print(f"[yellow]![/yellow] {line}")
    if not facts["warnings"]:
        console.print("[green]nothing stands in the way[/green]")


def _rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The table's lines."""
    processor, computing, memory, disk = (facts[part] for part in ("processor", "computing", "memory", "disk"))
    speeds = ", ".join(f"{kind} {flops / 1e12:.2f}" for kind, flops in computing["flops"].items())
    cards = [f"{one['device']} {one.get('name', '')}".strip() for one in facts["devices"]]
    free = "unknown" if memory["free"] is None else f"{memory['free'] / GB:.1f} GB free {memory['limit']}"
    card = f"; {memory['free on the device'] / GB:.1f} GB free {memory['limit of the device']}" if len(memory) > 2 else ""
    rows = [
        ("software", ", ".join(f"{name} {value}" for name, value in facts["software"].items() if value)),
        ("processor", f"{processor['name']}: {', '.join(processor['instructions']) or 'no fast instructions known'}"),
        ("cores", f"{processor['usable cores']:g} of {processor['cores']} usable, {processor['threads']} threads, "
                  f"load {processor['load']}"),
        ("devices", ", ".join(cards)),
        ("computes on", f"{computing['device']} in {computing['auto']}"),
        ("matrix products", f"{speeds} TFLOP/s, measured"),
        ("memory", free + card),
        ("disk", f"{disk['free'] / GB:.0f} of {disk['total'] / GB:.0f} GB free in {disk['folder']}, "
                 f"{disk.get('sync_ms', 0):.1f} ms to make a file safe"),
        ("compiler", facts["compiler"]),
    ]  # fmt: skip
    for name, lacking in facts["extras"].items():
        rows.append((f"extra {name}", f"pip install 'nestling\\[{name}]' ({', '.join(lacking)})" if lacking else "installed"))
    return rows + [(f"sandbox: {what}", how or "NOT KEPT") for what, how in facts["sandbox"].items()]
