"""Hugging Face Trainer on a Qwen3 configuration of the same sizes.

Command line as in `rows.py`; stops by a callback, its learning rate follows the time.
"""

from __future__ import annotations

import tempfile
import time

STARTED = time.time()

import torch  # noqa: E402
from rows import CONTEXT, ROWS, Clock, arguments, batch, report, stream  # noqa: E402
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


class Ticking(TrainerCallback):
    """Ends training when the time is over, and marks when each step ended."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        """Mark the time."""
        self.clock.mark()
        control.should_training_stop = self.clock.share() >= 1


class Timed(Trainer):
    """A trainer whose rows come in order."""

    def _get_train_sampler(self, *args: object) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def main() -> None:
    """Train and print."""
    asked = arguments(rate=2e-3)
    torch.manual_seed(1)
    train, held_out = stream(asked.tokens, "train"), stream(asked.tokens, "val")
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=4096, hidden_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=4, head_dim=64,
        intermediate_size=704, max_position_embeddings=CONTEXT, tie_word_embeddings=False))  # fmt: skip
    clock = Clock(STARTED, asked.seconds, asked.origin)
    settings = TrainingArguments(
        tempfile.mkdtemp(), per_device_train_batch_size=ROWS, max_steps=10**6, learning_rate=asked.rate, weight_decay=0.1,
        adam_beta2=0.95, bf16=asked.precision == "bf16", use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True,
        logging_strategy="no")  # fmt: skip
    optimiser = torch.optim.AdamW(model.parameters(), lr=asked.rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, clock.rate)
    optimizers, rows = (optimiser, schedule), Rows(train)
    Timed(model, settings, train_dataset=rows, optimizers=optimizers, callbacks=[Ticking(clock)]).train()
    report(clock, model, lambda ids: model(ids).logits, held_out)


if __name__ == "__main__":
    main()
