"""Regional compilation: the repeated block is compiled once and reused, where the run is long enough to pay for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from nestling.core.storage import read_json, write_json

WATCHED = (2, 3, 4)  # steps whose time the choice rests on; the first one also warms caches
COST = 25.0  # seconds to compile forward and backward of one block; 22 to 28 cold, 10 from the cache, on two Zen 5 cores
GAIN = 0.18  # share of a step's time that compiling saves; 0.18 to 0.3 measured there for a 3.5 M-parameter decoder
# Neither was measured on a GPU.


class Compiler:
    """Decides once per run, writes the decision down, and keeps to it after a restart: results stay bitwise the same.

    Args:
        choice: "on", "off" or "auto".
        record: file that remembers an automatic decision and the step that it holds from.
        say: takes one line for the person watching.
    """

    def __init__(self, choice: str, modules: Mapping[str, nn.Module], record: Path, say: Callable[[str], None]) -> None:
        self._blocks, self._say, self._record = repeated_blocks(modules), say, record
        self._times: list[float] = []
        self._active = False
        self._from: int | None = {"on": 1, "off": 0}.get(choice)  # the first compiled step; 0: never
        if not self._blocks:
            self._from = 0
        elif choice == "auto" and record.exists():
            self._from = int(read_json(record)["compile_from_step"])

    def before(self, step: int) -> None:
        """Switch compilation on where its time has come."""
        if self._from and step >= self._from and not self._active:
            self._active = True
            missing = missing_compiler(self._blocks)
            if missing:
                self._say(f"compile: off, {missing}; training goes on uncompiled")
                self._from = 0
                return
            compile_blocks(self._blocks, self._say)

    def after(self, step: int, steps: int, seconds: float) -> None:
        """Learn how long `step` took, and decide when enough steps are known."""
        if self._from is not None:
            return
        if step in WATCHED:
            self._times.append(seconds)
        if len(self._times) < len(WATCHED):
            return
        left = (steps - step) * median(self._times)
        pays = left * GAIN > COST
        self._from = step + 1 if pays else 0
        write_json(self._record, {"compile_from_step": self._from})
        verdict = f"on, {len(self._blocks)} blocks share one" if pays else "off"
        self._say(f"compile: {verdict} (about {left:.0f} s to go uncompiled; compiling costs up to {COST:.0f} s)")

    def close(self) -> None:
        """Give the blocks their plain call back."""
        plain(self._blocks)


def repeated_blocks(modules: Mapping[str, nn.Module]) -> list[nn.Module]:
    """The members of every `nn.ModuleList` that holds two or more modules of one class, outermost lists only."""
    blocks: list[nn.Module] = []
    inside: set[int] = set()
    for module in modules.values():
        for part in module.modules():
            if isinstance(part, nn.ModuleList) and id(part) not in inside and len(part) > 1:
                inside.update(id(inner) for inner in part.modules())
                if len({type(block) for block in part}) == 1:
                    blocks += list(part)
    return blocks


def missing_compiler(blocks: list[nn.Module]) -> str | None:
    """Why compiling can't work on the blocks' device, or None."""
    kind = next(blocks[0].parameters()).device.type
    if kind == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "Triton is missing or doesn't know this GPU"
    if kind != "cpu":
        return None
    from torch._inductor.cpp_builder import get_cpp_compiler  # seconds to import: only where compiling is wanted
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "no C++ compiler was found (install g++ or clang)"
    return None


def compile_blocks(blocks: list[nn.Module], say: Callable[[str], None]) -> None:
    """Compile the blocks for calls that train; calls without gradient (validation, generation) stay plain.

    Generation calls a block with ever-changing shapes and a cache, which would compile again and again.
    """
    rehearsed: set[bool] = set()
    for block in blocks:
        block._compiled_call_impl = _dispatch(block, blocks, rehearsed, say)  # type: ignore[assignment]


def _dispatch(
    block: nn.Module, blocks: list[nn.Module], rehearsed: set[bool], say: Callable[[str], None]
) -> Callable[..., Any]:
    compiled = torch.compile(block._call_impl)

    def call(*args: Any, **kwargs: Any) -> Any:
        if not (torch.is_grad_enabled() and block.training):
            return block._call_impl(*args, **kwargs)
        if not rehearsed:
            rehearsed.add(_rehearsed(compiled, block, args, kwargs, say))
            if False in rehearsed:
                plain(blocks)
        return (compiled if True in rehearsed else block._call_impl)(*args, **kwargs)

    return call


def plain(blocks: Sequence[nn.Module]) -> None:
    """Give the blocks their plain call back, which is also how a model knows that it isn't compiled."""
    for block in blocks:
        block._compiled_call_impl = None


def _rehearsed(
    compiled: Callable[..., Any], block: nn.Module, args: Any, kwargs: Any, say: Callable[[str], None]
) -> bool:
    """Whether both directions compile. The backward is compiled at its first use, where the loop couldn't turn back."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError

    try:
        leaves = [*block.parameters(), *(value for value in args if isinstance(value, torch.Tensor))]
        learnt = [leaf for leaf in leaves if leaf.requires_grad]
        with torch.random.fork_rng(sorted({leaf.device.index for leaf in learnt if leaf.device.type == "cuda"})):
            output = compiled(*args, **kwargs)
            if learnt:
                torch.autograd.grad(output.sum(), learnt, allow_unused=True)
    except (TorchDynamoException, CppCompileError) as error:
        say(f"compile: off, the compiler failed ({str(error).strip().splitlines()[0]}); going on uncompiled")
        return False
    return True
