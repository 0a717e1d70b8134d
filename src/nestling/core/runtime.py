"""What this machine offers, and every random stream. The only place that reads the environment.

torch is imported where it is used: it takes seconds, and a mistake on the command line should answer at once.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from nestling.core.errors import UserError

if TYPE_CHECKING:
    import torch

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DEVICES = ("cpu", "cuda", "mps")


@dataclass(frozen=True)
class Runtime:
    """Where and how numbers are computed.

    >>> detect(device="cpu", dtype="fp32").dtype
    torch.float32
    """

    device: torch.device
    dtype: torch.dtype
    threads: int

    @property
    def name(self) -> str:
        """A short human name: "cpu, bfloat16, 2 threads"."""
        return f"{self.device.type}, {str(self.dtype).removeprefix('torch.')}, {self.threads} threads"


@dataclass(frozen=True)
class Launch:
    """What torchrun says about this process: its number of `world`, and its number of `local_world` on this machine.

    >>> Launch(rank=5, world=8, local_rank=1, local_world=4).rank
    5
    """

    rank: int
    world: int
    local_rank: int
    local_world: int


def launched() -> Launch | None:
    """This process's place among those that torchrun started; None where nobody started several."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if not all(name in os.environ for name in (*names, "MASTER_ADDR")):
        return None
    return Launch(*(int(os.environ[name]) for name in names))


def detect(device: str = "auto", dtype: str = "auto", threads: int | None = None) -> Runtime:
    """The best device and matmul precision here: CUDA, MPS or CPU; bf16 where the hardware is fast at it.

    Raises:
        UserError: an unknown device or dtype name.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError("unknown precision", where="--dtype", value=dtype, fix=f"use auto, {', '.join(DTYPES)}")
    if device.split(":")[0] not in ("auto", *DEVICES):
        raise UserError("unknown device", where="--device", value=device, fix="use auto, cpu, cuda or mps")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages for large tensors; torch looks at its first one
    import torch

    chosen = _device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    precision = _fast_dtype(chosen) if dtype == "auto" else named_dtype(dtype)
    return Runtime(chosen, precision, torch.get_num_threads())


def named_dtype(name: str) -> torch.dtype:
    """The dtype called fp32, bf16 or fp16."""
    import torch

    found: torch.dtype = getattr(torch, DTYPES[name])
    return found


def _device(name: str) -> torch.device:
    import torch

    here = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if here[kind])
    if name == "cuda" and (launch := launched()):
        name = f"cuda:{launch.local_rank}"  # each process of a machine takes a chip of its own
    kind, _, number = name.partition(":")
    if number and not number.isdigit():
        raise UserError("unknown device", where="--device", value=name, fix="use cuda:0, cuda:1, …")
    if int(number or 0) >= here[kind]:
        raise UserError("this machine has no such device", where="--device", value=name, fix="use auto or cpu")
    return torch.device(name)


def _fast_dtype(device: torch.device) -> torch.dtype:
    """bf16 where matrix units exist for it (SM80+, AMX, AVX512-BF16), fp16 on older GPUs, else fp32."""
    import torch

    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return torch.bfloat16 if able.get("amx_bf16") or able.get("avx512_bf16") else torch.float32
    return torch.float32


def keep_freed_memory() -> None:
    """Let glibc give freed memory to the next tensor instead of to the system; elsewhere nothing happens.

    Every step of training frees what the next one asks for, and fresh pages cost a fault and zeroing each: a compiled
    step of a 6 M-parameter model went from 70,000 faults to next to none, and a tenth of its time with them.
    """
    _tune_malloc(_KEEPING)


def give_back_freed_memory() -> None:
    """The opposite, where memory is short: each large tensor has pages of its own, which go back when it is freed."""
    _tune_malloc(_GIVING)


def _tune_malloc(options: Mapping[int, int]) -> None:
    if os.name == "posix" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        for option, value in options.items():
            mallopt(option, value)


_KEEPING = {-4: 0, -1: -1, -2: 1 << 26}
"""M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD: no mappings of single tensors, nothing handed back, grow by 64 MiB."""
_GIVING = {-4: 1 << 16, -1: 1 << 17, -2: 0, -3: 1 << 18}
"""The same, and M_MMAP_THRESHOLD: tensors from 256 KiB on are mapped."""


def measured_peak(runtime: Runtime, size: int = 1024, seconds: float = 0.3) -> float:
    """FLOP/s of a [size, size] matrix product in the runtime's dtype: the ceiling that utilisation is measured against.

    On CUDA the product is large enough to fill the chip; the figure is measured, never taken from a data sheet.
    """
    import torch

    device, dtype = runtime.device, runtime.dtype
    size = 8192 if device.type == "cuda" else size
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    scale = torch.ones((), device=device)
    best = 0.0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        if dtype.itemsize == 1:
            torch._scaled_mm(left, right.T, scale, scale, out_dtype=torch.bfloat16)
        else:
            left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # which may not be the current one
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def stream_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the random stream called `names` of a run; streams with other names are independent.

    >>> stream_seed(1, "dropout") != stream_seed(1, "data")
    True
    """
    text = "\x1f".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def torch_stream(seed: int, *names: str | int, device: str | torch.device = "cpu") -> torch.Generator:
    """A torch generator for the named stream."""
    import torch

    return torch.Generator(device=device).manual_seed(stream_seed(seed, *names))


def python_stream(seed: int, *names: str | int) -> random.Random:
    """A `random.Random` for the named stream."""
    return random.Random(stream_seed(seed, *names))


def fresh_name() -> str:
    """24 hexadecimal digits that no other request has; no secret."""
    return f"{_fresh().getrandbits(96):024x}"


def fresh_seed() -> int:
    """For a request that gives none."""
    return _fresh().getrandbits(62)


@cache
def _fresh() -> random.Random:
    """Seeded by the system once: to ask it for every request lets other threads run first."""
    return random.Random()


def data_root() -> Path:
    """Where optional real data lies: NESTLING_DATA, else ../shared/data beside the working folder. It may not exist."""
    return Path(os.environ.get("NESTLING_DATA", "../shared/data"))
