"""What this machine offers, and every random stream. The only place that reads the environment."""

from __future__ import annotations

import hashlib
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from nestling.core.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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


def detect(device: str = "auto", dtype: str = "auto", threads: int | None = None) -> Runtime:
    """The best device and matmul precision here: CUDA, MPS or CPU; bf16 where the hardware is fast at it.

    Raises:
        UserError: an unknown device or dtype name.
    """
    chosen = _device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError("unknown precision", where="dtype", value=dtype, fix=f"use auto, {', '.join(DTYPES)}")
    precision = DTYPES[dtype] if dtype != "auto" else _fast_dtype(chosen)
    return Runtime(chosen, precision, torch.get_num_threads())


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.device(name)
    except RuntimeError:
        raise UserError("unknown device", value=name, fix="use auto, cpu, cuda or mps") from None


def _fast_dtype(device: torch.device) -> torch.dtype:
    """bf16 where matrix units exist for it (SM80+, AMX, AVX512-BF16), fp16 on older GPUs, else fp32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return torch.bfloat16 if able.get("amx_bf16") or able.get("avx512_bf16") else torch.float32
    return torch.float32


def measured_peak(runtime: Runtime, size: int = 1024, seconds: float = 0.3) -> float:
    """FLOP/s of a [size, size] matrix product in the runtime's dtype: the ceiling that utilisation is measured against.

    On CUDA the product is large enough to fill the chip; the figure is measured, never taken from a data sheet.
    """
    size = 8192 if runtime.device.type == "cuda" else size
    left = torch.randn(size, size, device=runtime.device).to(runtime.dtype)
    right = torch.randn(size, size, device=runtime.device).to(runtime.dtype)
    best = 0.0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        left @ right
        if runtime.device.type == "cuda":
            torch.cuda.synchronize()
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
    return torch.Generator(device=device).manual_seed(stream_seed(seed, *names))


def python_stream(seed: int, *names: str | int) -> random.Random:
    """A `random.Random` for the named stream."""
    return random.Random(stream_seed(seed, *names))


def data_root() -> Path:
    """Where optional real data lies: NESTLING_DATA, else ../shared/data beside the working folder. It may not exist."""
    return Path(os.environ.get("NESTLING_DATA", "../shared/data"))
