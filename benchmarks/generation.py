"""Generation speed beside transformers' `generate` and llama.cpp, on the same weights: greedy, 64 tokens and 192 new ones.

    taskset -c 0,1 python benchmarks/generation.py                       7 M parameters, batch 1 and 16
    taskset -c 0,1 python benchmarks/generation.py --size 124m           GPT-2's shape
    taskset -c 0,1 python benchmarks/generation.py --model runs/demo/sft/model

All of them sit in one process and take turns, so that what else the machine does hurts all alike; a figure is the median of
the rounds. llama.cpp takes part where llama-cpp-python and gguf are installed. Without --model weights are random: speed
does not see what they say. The last columns compare with transformers in float32: tokens that are the same until the
first that differs, and what rounding costs (mean KL divergence of the next token, share of equal likeliest tokens).
"""

from __future__ import annotations

import argparse
import gc
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from nestling.core.runtime import detect
from nestling.generation.engine import Engine
from nestling.generation.packed import pack
from nestling.generation.sampling import Sampling
from nestling.generation.sequence import Request
from nestling.interop.gguf import export_gguf
from nestling.model.checkpoint import Checkpoint, load, save
from nestling.model.config import DecoderConfig
from nestling.model.decoder import build
from nestling.model.hub import make_config
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.special import CHAT

SIZES = {
    "7m": {"architecture": "qwen3", "d_model": 256, "n_layers": 6, "n_heads": 4, "context": 256, "vocab_size": 4096},
    "124m": {
        "architecture": "gpt2",
        "d_model": 768,
        "n_layers": 12,
        "n_heads": 12,
        "context": 1024,
        "vocab_size": 50257,
    },
}
BARS = {
    ("7m", 1): [("transformers fp32", 6.0), ("llama.cpp f16", 1.0)],
    ("7m", 16): [("transformers fp32", 4.0), ("llama.cpp f16", 3.0)],
    ("124m", 1): [("llama.cpp f16", 1.0)],
    ("124m", 16): [("transformers bf16", 2.0)],
}
Prompts = list[list[int]]


@dataclass
class Contender:
    """Somebody who continues prompts, and what was measured of it."""

    name: str
    write: Callable[[Prompts, int], list[list[int]]]
    rates: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)

    def run(self, prompts: Prompts, new: int) -> None:
        """Measure one turn."""
        started = time.perf_counter()
        self.tokens = self.write(prompts, new)
        self.rates.append(sum(map(len, self.tokens)) / (time.perf_counter() - started))


def ours(
    checkpoint: Checkpoint, rows: int, dtype: torch.dtype | None, *, frozen: bool = True, ahead: int = 0
) -> Contender:
    """Nestling's engine; frozen: with packed weights, ahead: so many tokens proposed by look-up."""
    engine = Engine(checkpoint.model, checkpoint.tokenizer, rows=rows, dtype=dtype, frozen=frozen)
    engine._banned = None  # the peers may write any token

    def write(prompts: Prompts, new: int) -> list[list[int]]:
        sampling = Sampling(temperature=0, max_tokens=new)
        engine._slots.forget()  # every turn computes its prompts
        asked = [Request(p, sampling, stop_ids=frozenset(), speculate=ahead) for p in prompts]
        return [done.ids for done in engine.generate(asked)]

    kind = "" if frozen else " live"
    return Contender(f"nestling {_word(dtype)}{kind}{' look-up' if ahead else ''}", write)


def transformers(folder: Path, dtype: torch.dtype) -> Contender:
    """Hugging Face's generate."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model.generation_config.eos_token_id = None

    def write(prompts: Prompts, new: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            done = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0
            )
        return done[:, ids.shape[1] :].tolist()

    return Contender(f"transformers {_word(dtype)}", write)


def llama(checkpoint: Checkpoint, rows: int, threads: int, precision: str, length: int) -> Contender | None:
    """llama.cpp, all rows in one batch, through its C interface."""
    try:
        import llama_cpp as c
    except ImportError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.gguf")
        export_gguf(checkpoint, path, precision)  # type: ignore[arg-type]
        loaded = c.Llama(
            str(path), n_ctx=rows * length, n_threads=threads, n_batch=2048, verbose=False, logits_all=False
        )
    options = c.llama_context_default_params()
    options.n_ctx, options.n_seq_max, options.n_batch = rows * length, rows, 2048
    options.n_threads = options.n_threads_batch = threads
    context = c.llama_init_from_model(loaded.model, options)
    batch = c.llama_batch_init(2048, 0, 1)

    def feed(tokens: list[tuple[int, int, int, bool]]) -> None:
        batch.n_tokens = len(tokens)
        for i, (token, place, row, read) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, place, 1, read
            batch.seq_id[i][0] = row
        if c.llama_decode(context, batch):
            raise RuntimeError("llama.cpp did not decode")

    def likeliest(place: int) -> int:
        logits = c.llama_get_logits_ith(context, place)
        size = checkpoint.model.config.vocab_size
        import numpy as np

        return int(np.ctypeslib.as_array(logits, shape=(size,)).argmax())

    def write(prompts: Prompts, new: int) -> list[list[int]]:
        _ = loaded  # lives as long as its context
        c.llama_memory_clear(c.llama_get_memory(context), True)
        done: list[list[int]] = []
        for row, prompt in enumerate(prompts):
            feed([(token, place, row, place == len(prompt) - 1) for place, token in enumerate(prompt)])
            done.append([likeliest(len(prompt) - 1)])
        for step in range(new - 1):
            feed([(text[-1], len(prompts[row]) + step, row, True) for row, text in enumerate(done)])
            for row, text in enumerate(done):
                text.append(likeliest(row))
        return done

    return Contender(f"llama.cpp {precision}", write)


def random_checkpoint(size: str) -> Checkpoint:
    """A model of this shape with weights that make it decided, and a tokenizer of as many tokens."""
    config: DecoderConfig = make_config(SIZES[size])
    model = build(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
    chance = random.Random(1)
    words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=12)) for _ in range(config.vocab_size // 4)]
    tokenizer = Tokenizer.train([" ".join(words)] * 2, vocab_size=config.vocab_size - len(CHAT)).with_special(CHAT)
    return Checkpoint(model, tokenizer)


def rounding(checkpoint: Checkpoint, dtype: torch.dtype, texts: list[list[int]]) -> str:
    """What a packed model's rounding costs on these texts."""
    with torch.inference_mode():
        ids = torch.tensor(texts)
        exact = checkpoint.model(ids).float().log_softmax(-1)
        rounded = pack(checkpoint.model, dtype)(ids).float().log_softmax(-1)
        divergence = (exact.exp() * (exact - rounded)).sum(-1).mean()
        same = (exact.argmax(-1) == rounded.argmax(-1)).float().mean()
    return f"KL {divergence:.1e} nats, same likeliest token {same:.1%}"


def measure(checkpoint: Checkpoint, folder: Path, rows: int, args: argparse.Namespace) -> list[Contender]:
    """All contenders' turns with this many rows."""
    limit = min(checkpoint.model.config.vocab_size, checkpoint.tokenizer.vocab_size) - 20
    chance = random.Random(rows)
    prompts = [[chance.randrange(limit) for _ in range(args.prompt)] for _ in range(rows)]
    length = args.prompt + args.new
    made = [
        transformers(folder, torch.float32),
        transformers(folder, torch.bfloat16),
        ours(checkpoint, rows, None, frozen=False),
        *(ours(checkpoint, rows, dtype) for dtype in (torch.float32, torch.bfloat16, torch.int8)),
        ours(checkpoint, rows, torch.float32, ahead=4),
        *(llama(checkpoint, rows, args.threads, precision, length) for precision in ("f16", "q8_0")),
    ]
    contenders = [one for one in made if one is not None and args.only in one.name]
    for one in contenders:
        one.write(prompts, 8)  # warm
    for _ in range(args.rounds):
        for one in contenders:
            one.run(prompts, args.new)
    return contenders


def table(contenders: list[Contender], size: str, rows: int, costs: dict[str, str]) -> None:
    """Print what was measured, and how it stands to the bars."""
    rates = {one.name: median(one.rates) for one in contenders}
    exact = contenders[0].tokens
    print(f"\n{size}, batch {rows}")
    for one in contenders:
        same = sum(_agreement(a, b) for a, b in zip(one.tokens, exact, strict=True)) / sum(map(len, exact))
        print(f"  {one.name:20} {rates[one.name]:9.0f} tokens/s   same tokens {same:6.1%}   {costs.get(one.name, '')}")
    for peer, bar in BARS.get((size, rows), []):
        for name in rates:
            if name.startswith("nestling") and name.count(" ") == 1 and peer in rates:
                ratio = rates[name] / rates[peer]
                print(f"  {name:16} / {peer:18} {ratio:6.2f}   bar {bar}   {'reached' if ratio >= bar else 'missed'}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="7m")
    parser.add_argument("--model", help="a checkpoint folder instead of random weights")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="only contenders whose name holds this")
    args = parser.parse_args()
    detect("cpu", threads=args.threads)  # as the command line does: large tensors on huge pages, for everybody here
    checkpoint = load(args.model) if args.model else random_checkpoint(args.size)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "model")
        save(folder, checkpoint.model, checkpoint.tokenizer)
        print(f"{checkpoint.model.parameter_count():,} parameters, {args.threads} threads, torch {torch.__version__}")
        for rows in args.rows:
            contenders = measure(checkpoint, folder, rows, args)
            texts = [text[: checkpoint.model.config.context] for text in contenders[0].tokens]
            costs = {
                f"nestling {_word(dtype)}": rounding(checkpoint, dtype, texts) for dtype in (torch.bfloat16, torch.int8)
            }
            table(contenders, args.model or args.size, rows, costs)
            del contenders
            gc.collect()


def _agreement(mine: list[int], theirs: list[int]) -> int:
    """Tokens that are the same until the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), len(mine))


def _word(dtype: torch.dtype | None) -> str:
    return {torch.bfloat16: "bf16", torch.int8: "int8"}.get(dtype, "fp32")


if __name__ == "__main__":
    main()
