"""From prompts to padded rollouts: what was written, which tokens were chosen, whether it came to an end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nestling.core.types import PromptRow
from nestling.generation.chat import prompt_ids, replies
from nestling.generation.engine import Engine
from nestling.generation.sampling import Sampling
from nestling.objectives._scoring import pad_ids
from nestling.tokenizer.bpe import Tokenizer


@dataclass(frozen=True)
class Episode:
    """One prompt and the reply to it, in tokens.

    With prompt ids ``[9, 4, 7]`` and the reply "yes<|im_end|>": ``Episode(row, [9, 4, 7], [21, 2], [True, True], "yes",
    ended=True)``. ``sampled`` has the length of ``reply``: false where a token was forced (a tool's result).
    ``ended`` is false where the reply has no closing <|im_end|>: the token limit cut it.
    """

    row: PromptRow
    prompt: list[int]
    reply: list[int]
    sampled: list[bool]
    text: str
    ended: bool


def collect(
    engine: Engine, tokenizer: Tokenizer, rows: Sequence[PromptRow], sampling: Sampling, seed: int, first: int = 0
) -> list[Episode]:
    """One reply to every row, in order, through the engine; `first` as in `chat.replies`."""
    episodes = []
    for row, answer in zip(rows, replies(engine, rows, sampling, seed, first=first), strict=True):
        prompt = prompt_ids(tokenizer, row.prompt, row.tools)
        done = answer.completion
        ended = done.ids[-1] in tokenizer.turn_ends
        episodes.append(Episode(row, prompt, list(done.ids), list(done.sampled), answer.text, ended))
    return episodes


def pad(episodes: Sequence[Episode], filler: int) -> tuple[Tensor, Tensor, Tensor]:
    """The episodes as wide as the longest: ``tokens [N, T]`` right-padded, ``lengths [N]``, ``actions [N, T]`` (bool).

    ``actions[n, t]`` says that token t + 1 was sampled: position t is the state in which it was chosen. For the prompt
    ``[9, 4, 7]`` and the sampled reply ``[21, 2]``: tokens 9 4 7 21 2, actions 0 0 1 1 0.
    """
    tokens, lengths = pad_ids([e.prompt + e.reply for e in episodes], filler)
    actions = torch.zeros(tokens.shape, dtype=torch.bool)
    for n, episode in enumerate(episodes):
        start = len(episode.prompt) - 1
        actions[n, start : start + len(episode.reply)] = torch.tensor(episode.sampled, dtype=torch.bool)
    return tokens, lengths, actions


def closed(episode: Episode, end: int, context: int) -> list[int]:
    """The whole episode as the reward model was taught to read it: closed by ``end`` even where the limit cut it.

    At the end of the ``context`` the closing token takes the place of the last one.
    """
    ids = episode.prompt + episode.reply
    return ids if episode.ended else [*ids[: context - 1], end]
