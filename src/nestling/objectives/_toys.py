"""Models and data of seconds for the toys of objectives: real code, tiny sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nestling.core.runtime import python_stream, torch_stream
from nestling.core.types import Message, PromptRow, Ranking, Response
from nestling.loading.batches import TokenBatch
from nestling.loading.prompts import PromptLoader
from nestling.model.config import DecoderConfig
from nestling.model.decoder import Decoder, build
from nestling.objectives._cast import Cast
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.special import CHAT

LETTERS = "abcdefgh"
POLICY: dict[str, Any] = {
    "rollouts": 16, "max_tokens": 8, "beta": 0.01, "kl_target": None, "kl_budget": None, "text_weight": 0.01,
}  # fmt: skip
"""Settings of any on-policy objective for the toy `cast`."""


def byte_tokenizer() -> Tokenizer:
    """One token per byte, and all control tokens."""
    return Tokenizer.train([], 257).with_special(CHAT)


def small_decoder(tokenizer: Tokenizer, seed: int, context: int = 64) -> Decoder:
    """A Llama of two narrow layers."""
    config = DecoderConfig(
        architecture="llama",
        vocab_size=tokenizer.vocab_size,
        context=context,
        d_model=16,
        n_layers=2,
        n_heads=2,
        init="gpt2",
    )
    return build(config, torch_stream(seed, "toy decoder"))


def letter_prompts(count: int, seed: int) -> list[PromptRow]:
    """Prompts of one to four letters."""
    stream = python_stream(seed, "toy prompts")
    texts = ("".join(stream.choices(LETTERS, k=stream.randint(1, 4))) for _ in range(count))
    return [PromptRow(prompt=(Message(role="user", content=text),)) for text in texts]


def letter_rankings(count: int, seed: int) -> list[Ranking]:
    """Three or four responses to each prompt; the more "a" in one the better. Ties happen."""
    stream = python_stream(seed, "toy rankings")
    rankings = []
    for row in letter_prompts(count, seed):
        texts = ["aaaa", *("".join(stream.choices("aabc", k=3)) for _ in range(stream.randint(2, 3)))]
        grades = [float(text.count("a")) for text in texts]
        responses = tuple(Response(content=t, score=g) for t, g in zip(texts, grades, strict=True))
        rankings.append(Ranking(prompt=row.prompt, responses=responses, meta={"noise_free": grades}))
    return rankings


class Alphabet:
    """Text for PPO-ptx: four rows of the alphabet from other letters on, ids as bytes; the last places are padding."""

    def batch(self, step: int) -> TokenBatch:
        """The rows of a draw, [4, 12]."""
        line = 97 + (step + torch.arange(4).unsqueeze(1) + torch.arange(13)) % 26
        place = torch.arange(12).expand(4, -1)
        weights = (place < 10).float()
        return TokenBatch(line[:, :-1], line[:, 1:], weights, place, (place >= 10).long())


class Taste(nn.Module):
    """A reward model that likes even token ids: at each position, four times their share so far."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids ``[B, T]`` -> scores ``[B, T]``."""
        places = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        return 4 * (ids % 2 == 0).float().cumsum(dim=1) / places


def cast(seed: int, prompts: int) -> Cast:
    """A two-layer policy for `Taste`, asked so many letter prompts per step, with the alphabet as its text."""
    tokenizer = byte_tokenizer()
    policy, reference = (small_decoder(tokenizer, seed) for _ in range(2))
    rows = letter_prompts(28, seed)
    loader = PromptLoader(rows[:20], tokenizer, policy.config.context, prompts, seed, reserve=POLICY["max_tokens"])
    return Cast(policy, reference, Taste(), tokenizer, loader, held_out=rows[20:], texts=Alphabet())
