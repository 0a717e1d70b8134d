"""The peer of benchmarks/serving.py: FastAPI around transformers' generate, one request at a time.

python generate_server.py FOLDER PORT THREADS
"""

from __future__ import annotations

import sys
import threading

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import AutoModelForCausalLM


class Body(BaseModel):
    prompt: list[int]
    max_tokens: int


def main(folder: str, port: int, threads: int) -> None:
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    app, alone = FastAPI(), threading.Lock()

    @app.post("/v1/completions")
    def complete(body: Body) -> dict[str, list[int]]:
        ids = torch.tensor([body.prompt])
        with alone, torch.inference_mode():
            asked = {"do_sample": False, "max_new_tokens": body.max_tokens, "min_new_tokens": body.max_tokens}
            out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **asked)
        return {"ids": out[0, len(body.prompt) :].tolist()}

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    uvicorn.run(app, port=port, log_level="warning")


main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
