"""A plain compiled PyTorch loop in the style of nanoGPT, written for this benchmark: GPT-2 block, AdamW, torch.compile.

`python plain_loop.py TOKENS SECONDS [bf16]` trains for so many seconds from its own start (imports and compiling count)
with a warm-up and a cosine over the time, then prints one line of JSON.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
from pathlib import Path

STARTED = time.time()

import torch  # noqa: E402
from rows import CONTEXT, ROWS, batch, held_out_loss, stream  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional  # noqa: E402

VOCABULARY, D_MODEL, LAYERS, HEADS = 4096, 256, 6, 4


class Block(nn.Module):
    """Attention and feed-forward with layer norm before each."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(D_MODEL), nn.LayerNorm(D_MODEL)
        self.qkv, self.out = nn.Linear(D_MODEL, 3 * D_MODEL), nn.Linear(D_MODEL, D_MODEL)
        self.up, self.down = nn.Linear(D_MODEL, 4 * D_MODEL), nn.Linear(4 * D_MODEL, D_MODEL)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        q, k, v = (
            part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norm_1(x)).split(D_MODEL, 2)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm_2(x)), approximate="tanh"))


class Model(nn.Module):
    """GPT-2 in miniature: learned positions, tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, D_MODEL), nn.Embedding(CONTEXT, D_MODEL)
        self.blocks, self.norm = nn.ModuleList(Block() for _ in range(LAYERS)), nn.LayerNorm(D_MODEL)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                late = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * LAYERS) if late else 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] to logits [B, T, V]."""
        x = self.tokens(ids) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        return functional.linear(self.norm(x), self.tokens.weight)


def main(tokens: Path, seconds: float, precision: str) -> None:
    """Train and print."""
    torch.manual_seed(1)
    train, held_out = stream(tokens, "train"), stream(tokens, "val")
    model = Model()
    compiled = torch.compile(model)
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    step, marks = 0, []
    while (elapsed := time.time() - STARTED) < seconds:
        share = elapsed / seconds
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))
        ids, targets = batch(train, step)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = functional.cross_entropy(compiled(ids).flatten(0, 1), targets.flatten())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        marks.append(time.time())
    speeds = sorted(ROWS * CONTEXT / (b - a) for a, b in itertools.pairwise(marks))
    result = {"tokens_per_second": round(speeds[len(speeds) // 2]), "steps": step, "seconds": round(marks[-1] - STARTED, 1)}
    parameters = sum(p.numel() for p in model.parameters())
    print(json.dumps(result | {"val_loss": round(held_out_loss(model, held_out), 4), "parameters": parameters}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "fp32")
