"""The loss of a saved checkpoint on the benchmark's held-out rows, read by transformers: `held_out.py MODEL TOKENS`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rows import held_out_loss, stream
from transformers import AutoModelForCausalLM

if __name__ == "__main__":
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32").eval()
    loss = held_out_loss(lambda ids: model(ids).logits, stream(Path(sys.argv[2]), "val"))
    print(json.dumps({"val_loss": round(loss, 4), "parameters": sum(p.numel() for p in model.parameters())}))
