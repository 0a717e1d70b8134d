"""One layer of a decoder: attention and feed-forward, each added to the residual stream."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from nestling.model.attention import Attention, Scene
from nestling.model.cache import LayerMemory
from nestling.model.config import DecoderConfig
from nestling.model.experts import GatedExperts
from nestling.model.feed_forward import make_feed_forward
from nestling.model.norms import make_norm


class Block(nn.Module, ABC):
    """The parts of a layer; a leaf class says in `forward` how they are joined.

    The parts' names are the checkpoint's names; the matrices called `output` and `down` write to the residual stream.
    A leaf that needs no second norm deletes it when built: every weight of a checkpoint does something.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.feed_forward_norm = make_norm(config)
        self.feed_forward = GatedExperts(config) if config.experts else make_feed_forward(config)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    @abstractmethod
    def forward(self, x: Tensor, scene: Scene, memory: LayerMemory | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]. `scene` is what all layers share; `memory` this layer's part of the cache."""


class PreNormBlock(Block):
    """x + Attention(norm(x)), then x + FeedForward(norm(x)): GPT-2 and everything after it."""

    def forward(self, x: Tensor, scene: Scene, memory: LayerMemory | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        x = x + self.dropout(self.attention(self.attention_norm(x), scene, memory))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class PostNormBlock(Block):
    """norm(x + Attention(x)), then norm(x + FeedForward(x)): the original Transformer and GPT-1."""

    def forward(self, x: Tensor, scene: Scene, memory: LayerMemory | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        x = self.attention_norm(x + self.dropout(self.attention(x, scene, memory)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


BLOCKS: dict[str, type[Block]] = {"pre": PreNormBlock, "post": PostNormBlock}
