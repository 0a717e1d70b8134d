"""Which form of attention trains fastest here? Run as `python tests/model/measure_attention.py` on a quiet machine.

Prints forward + backward in ms for 8192 tokens, 4 heads of 64, bf16: the whole square written out, strips of queries, and
torch's fused kernel. The variants take turns, and the best of eight is kept, so that a passing load hurts all alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.model import attention

TOKENS, HEADS, SIZE = 8192, 4, 64
Form = Callable[[Tensor, Tensor, Tensor], Tensor]


def written_out(strip: int) -> Form:
    def form(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = attention.causal_mask(q.shape[2], q.device)
        return attention.in_strips(q, k, v, mask, 0.0, strip)

    return form


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def step_of(form: Form, length: int, compiled: bool) -> Callable[[], None]:
    shape = (TOKENS // length, length, HEADS, SIZE)  # as it leaves the projections
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return form(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2).flatten(2)

    run = torch.compile(attend, dynamic=False) if compiled else attend

    def step() -> None:
        run(q, k, v).sum().backward()
        q.grad = k.grad = v.grad = None

    return step


def measure(length: int, compiled: bool) -> dict[str, float]:
    forms = {"square": written_out(length), "strips of 64": written_out(64), "strips of 128": written_out(128)}
    steps = {name: step_of(form, length, compiled) for name, form in {**forms, "fused": fused}.items()}
    best = dict.fromkeys(steps, float("inf"))
    for turn in range(10):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn > 1:
                best[name] = min(best[name], time.perf_counter() - start)
    return {name: round(1000 * seconds, 1) for name, seconds in best.items()}


if __name__ == "__main__":
    torch.set_num_threads(2)
    for compiled in (True, False):
        for length in (128, 256, 512, 1024, 2048):
            torch._dynamo.reset()
            print("compiled" if compiled else "eager", length, measure(length, compiled), flush=True)
