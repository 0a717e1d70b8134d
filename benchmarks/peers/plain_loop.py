"""A plain compiled PyTorch loop in the style of nanoGPT, written for this benchmark: GPT-2 block, AdamW, torch.compile.

Command line as in `rows.py`.
"""

from __future__ import annotations

import math
import time

STARTED = time.time()

import torch  # noqa: E402
from rows import CONTEXT, Clock, arguments, batch, report, stream  # noqa: E402
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
    """GPT-2 in miniature: learned positions. The output layer is its own, as everyone's here."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, D_MODEL), nn.Embedding(CONTEXT, D_MODEL)
        self.blocks, self.norm = nn.ModuleList(Block() for _ in range(LAYERS)), nn.LayerNorm(D_MODEL)
        self.head = nn.Linear(D_MODEL, VOCABULARY, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                late = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * LAYERS) if late else 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] to logits [B, T, V]."""
        x = self.tokens(ids) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def main() -> None:
    """Train and print."""
    asked = arguments(rate=2e-3)
    torch.manual_seed(1)
    train, held_out = stream(asked.tokens, "train"), stream(asked.tokens, "val")
    model = Model()
    compiled = torch.compile(model)
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    clock, step = Clock(STARTED, asked.seconds, asked.origin), 0
    while clock.share() < 1:
        for group in optimiser.param_groups:
            group["lr"] = asked.rate * clock.rate(step)
        ids, targets = batch(train, step)
        with torch.autocast("cpu", torch.bfloat16, enabled=asked.precision == "bf16"):
            loss = functional.cross_entropy(compiled(ids).flatten(0, 1), targets.flatten())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        clock.mark()
    report(clock, model, model, held_out)


if __name__ == "__main__":
    main()
