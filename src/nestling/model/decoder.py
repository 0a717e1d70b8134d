"""The decoder: token embedding, blocks, output layer. Which one it is (GPT-2, Llama, …) is its configuration."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.core import registry
from nestling.core.errors import UserError
from nestling.model import kernels
from nestling.model.attention import Mask, Scene, additive, block_mask, compute_dtype, explicit_pays, flex_pays
from nestling.model.block import BLOCKS
from nestling.model.cache import CacheStep, KVCache
from nestling.model.config import DecoderConfig
from nestling.model.initialisation import initialise, new_rows
from nestling.model.norms import make_norm
from nestling.model.positions import make_positions


class Decoder(nn.Module):
    """ids [B, T] -> hidden [B, T, D] -> logits [B, T, V].

    `hidden` and `unembed` are separate, so that a loss can take the output layer in chunks.

    Args:
        config: sizes and parts.
        block: class of a layer, built as block(config) and called as block(x, scene, memory); when not given, the one
            that `config.block` names.
    """

    def __init__(self, config: DecoderConfig, block: Callable[[DecoderConfig], nn.Module] | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = make_positions(config)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        make = block or BLOCKS[config.block]
        self.blocks = nn.ModuleList(make(config.of_layer(index)) for index in range(config.n_layers))
        self.norm = make_norm(config) if config.block == "pre" else nn.Identity()
        self.head = None if config.tied else nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: KVCache | None = None,
        rows: Tensor | slice | None = None,
        counts: Tensor | None = None,
    ) -> Tensor:
        """ids [B, T] -> logits [B, T, V]; arguments as in `hidden`."""
        hidden = self.hidden(ids, positions=positions, segments=segments, cache=cache, rows=rows, counts=counts)
        return self.unembed(hidden)

    def hidden(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: KVCache | None = None,
        rows: Tensor | slice | None = None,
        counts: Tensor | None = None,
    ) -> Tensor:
        """The last layer's output [B, T, D], final norm applied.

        Args:
            ids: [B, T] token ids.
            positions: [B, T] place of each token in its document; counted from what the cache holds when not given.
            segments: [B, T] document of each token in a packed row; tokens see only their own document's past.
            cache: keys and values of past tokens; these are appended and the call sees them.
            rows: [B] cache rows that `ids` belong to; all when not given.
            counts: [B] valid tokens per row of right-padded `ids`; outputs at padding are meaningless.

        Raises:
            UserError: longer than the context, or than the cache's capacity.
        """
        self._check_length(ids)
        step = None if cache is None else cache.begin(ids.shape[1], rows, counts)
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0) if step is None else step.positions
        x = self.embedding(ids)
        if (placed := self.positions.embed(positions)) is not None:
            x = x + placed
        x = self.dropout(x)
        lengths = step.positions[:, 0] + step.counts.to(ids.device) if step and self.positions.reads_lengths else None
        scene = Scene(self._mask(x, segments, step), self.positions.rotation(positions, lengths))
        if step is None:
            for block in self.blocks:
                x = block(x, scene)
        else:
            for index, block in enumerate(self.blocks):
                # .forward: decoding's shapes change with each token, so it goes round a compiled block.
                x = block.forward(x, scene, step.layer(index))
            step.commit()
        return self.norm(x)

    def unembed(self, hidden: Tensor) -> Tensor:
        """[.., D] -> logits [.., V]"""
        return F.linear(hidden, self.output_weight)

    @property
    def output_weight(self) -> Tensor:
        """[V, D] weights of the output layer; the embedding's where the two are tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def compiled(self) -> bool:
        """Whether blocks are compiled for what is computed now: only what trains is (`training/compiling.py`)."""
        return self.training and torch.is_grad_enabled() and self.blocks[0]._compiled_call_impl is not None

    def parameter_count(self) -> int:
        """Number of weights, tied ones counted once."""
        return sum(p.numel() for p in self.parameters())

    def resize_vocabulary(self, size: int, generator: torch.Generator | None = None) -> None:
        """Grow (or cut) the vocabulary to `size`; old ids keep their logits, new ones start near the old ones' mean."""
        self.embedding.weight = nn.Parameter(new_rows(self.embedding.weight, size, generator))
        self.embedding.num_embeddings = size
        if self.head is not None:
            self.head.weight = nn.Parameter(new_rows(self.head.weight, size, generator))
            self.head.out_features = size
        self.config = self.config.with_(vocab_size=size)

    def _check_length(self, ids: Tensor) -> None:
        if ids.shape[1] > self.config.context:
            raise UserError(
                "the text is longer than the model's context",
                where="tokens",
                value=ids.shape[1],
                fix=f"use at most {self.config.context}",
            )

    def _mask(self, x: Tensor, segments: Tensor | None, step: CacheStep | None) -> Mask:
        """The mask of all layers; None where the attention kernel's own causal mask says it all."""
        t, device = x.shape[1], x.device
        span = t if step is None else step.span
        window = self.config.window if self.config.window and self.config.window < span else None
        if step is None and self.training and kernels.serve(self.config, device, compute_dtype(x)):
            return kernels.Sight(None if segments is None else segments.int(), window)
        causal = step is None and segments is None and window is None and self.config.positions != "alibi"
        if causal and not explicit_pays(device, t):
            return None
        if step is None and self.compiled and flex_pays(self.config, device, t):
            return block_mask(t, device, segments, window)
        keys = torch.arange(span, device=device)
        queries = keys.unsqueeze(0) if step is None else step.positions  # [B or 1, T]
        distance = queries.unsqueeze(-1) - keys  # [B or 1, T, S]
        visible = distance >= 0
        if window is not None:
            visible = visible & (distance < window)
        if segments is not None:
            visible = visible & (segments.unsqueeze(-1) == segments.unsqueeze(-2))
        mask = additive(visible).unsqueeze(1)  # [B or 1, 1, T, S]
        penalty = self.positions.penalty(distance)
        mask = mask if penalty is None else mask + penalty
        return mask.to(compute_dtype(x)) if step is None and not explicit_pays(device, t) else mask


def build(config: DecoderConfig, generator: torch.Generator | None = None) -> Decoder:
    """A fresh decoder of `config.architecture`, its start values drawn from `generator` (a fixed one when not given).

    >>> build(DecoderConfig(vocab_size=100, d_model=32, n_layers=1)).parameter_count()
    15664
    """
    with torch.random.fork_rng(devices=[]):  # layers draw default values when made; the caller's stream stays untouched
        model: Decoder = registry.find("model.architectures", config.architecture).build(config)
    initialise(model, generator or torch.Generator().manual_seed(0))
    return model
