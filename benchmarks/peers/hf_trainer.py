"""Hugging Face Trainer on a Qwen3 configuration of the same sizes.

`python hf_trainer.py TOKENS SECONDS [bf16]` as `plain_loop.py`; stops by a callback, its learning rate follows the time.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import tempfile
import time
from pathlib import Path

STARTED = time.time()

import torch  # noqa: E402
from rows import CONTEXT, ROWS, batch, held_out_loss, stream  # noqa: E402
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainerCallback, TrainingArguments  # noqa: E402


class Rows(torch.utils.data.Dataset):
    """Row i of the order in which `batch` gives them."""

    def __init__(self, ids: object) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return 10**7

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        step, row = divmod(index, ROWS)
        if row == 0:
            self.rows = batch(self.ids, step)[0]  # one batch is made at a time
        return {"input_ids": self.rows[row], "labels": self.rows[row]}


class Clock(TrainerCallback):
    """Ends training when the time is over, and notes when each step ended."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.marks = seconds, []

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        """Note the time."""
        self.marks.append(time.time())
        control.should_training_stop = time.time() - STARTED >= self.seconds


class Timed(Trainer):
    """A trainer whose rows come in order."""

    def _get_train_sampler(self, *args: object) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def main(tokens: Path, seconds: float, precision: str) -> None:
    """Train and print."""
    torch.manual_seed(1)
    train, held_out = stream(tokens, "train"), stream(tokens, "val")
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=4096, hidden_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=4, head_dim=64,
        intermediate_size=704, max_position_embeddings=CONTEXT, tie_word_embeddings=True))  # fmt: skip
    clock = Clock(seconds)

    def rate(step: int) -> float:
        share = min(1.0, (time.time() - STARTED) / seconds)
        return min(1.0, (step + 1) / 50) * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))

    arguments = TrainingArguments(
        tempfile.mkdtemp(), per_device_train_batch_size=ROWS, max_steps=10**6, learning_rate=2e-3, weight_decay=0.1,
        adam_beta2=0.95, bf16=precision == "bf16", use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True,
        logging_strategy="no")  # fmt: skip
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    Timed(model, arguments, train_dataset=Rows(train), optimizers=(optimiser, schedule), callbacks=[clock]).train()
    marks = clock.marks
    speeds = sorted(ROWS * CONTEXT / (b - a) for a, b in itertools.pairwise(marks))
    result = {"tokens_per_second": round(speeds[len(speeds) // 2]), "steps": len(marks), "seconds": round(marks[-1] - STARTED, 1)}
    model.eval()
    loss = held_out_loss(lambda ids: model(ids).logits, held_out)
    print(json.dumps(result | {"val_loss": round(loss, 4), "parameters": sum(p.numel() for p in model.parameters())}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "fp32")
