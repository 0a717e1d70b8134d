"""Floating-point operations of a decoder per token, matrix product by matrix product, and the rule C = 6 N D beside them.

A product of a [T, in] with an [in, out] matrix takes 2 · T · in · out operations; its backward pass takes two products of
that size. Norms, activations and look-ups are left out, as in every published figure (under a percent).
"""

from __future__ import annotations

from dataclasses import dataclass

from nestling.model.config import DecoderConfig
from nestling.planning.parameters import (
    attention_matrices,
    count_parameters,
    expert_matrices,
    feed_forward_matrices,
    router_matrix,
)


@dataclass(frozen=True)
class Flops:
    """Operations of a forward pass per token of a row of `context` tokens.

    >>> flops_per_token(DecoderConfig(vocab_size=100, d_model=32, n_layers=1), context=16).forward
    37120
    """

    projections: int
    """Of queries, keys, values and output."""
    scores: int
    """Q Kᵀ and the mean of values: 4 · context · heads · head size in each layer. Every token is taken to meet all others,
    as in the published formulas; a kernel that skips the future does half of it."""
    feed_forward: int
    """Dense ones, or the router and the experts that a token is sent to."""
    logits: int

    @property
    def forward(self) -> int:
        """A forward pass."""
        return self.projections + self.scores + self.feed_forward + self.logits

    @property
    def backward(self) -> int:
        """A backward pass: gradients of weights and of activations, a product each."""
        return 2 * self.forward

    @property
    def training(self) -> int:
        """Forward and backward."""
        return self.forward + self.backward

    @property
    def weight_gradients(self) -> int:
        """The part of a backward pass that weights ask for which learn, and frozen ones don't."""
        return self.projections + self.feed_forward + self.logits

    def recomputed(self) -> int:
        """Training where the blocks are computed again in the backward pass: 8 N in the rule of thumb."""
        return self.training + self.forward - self.logits


def flops_per_token(config: DecoderConfig, context: int | None = None, logits: bool = True) -> Flops:
    """What one token costs in a row of `context` tokens (the model's longest when not given).

    For h = D and s = context, of a GPT with four times as wide a feed-forward: 24 h² + 4 s h per layer, and 2 h V.

    Args:
        logits: whether the output layer is computed; a reward model has none.
    """
    layers = [config.of_layer(index) for index in range(config.n_layers)]
    dense = feed_forward_matrices(config)
    sparse = [router_matrix(layer) + expert_matrices(layer, of_token=True) for layer in layers if layer.experts]
    seen = context or config.context
    return Flops(
        projections=2 * config.n_layers * attention_matrices(config),
        scores=4 * config.n_layers * seen * config.n_heads * config.head,
        feed_forward=2 * (sum(sparse) + dense * (len(layers) - len(sparse))),
        logits=2 * config.d_model * config.vocab_size if logits else 0,
    )


def six_n_d(config: DecoderConfig, tokens: float, recomputed: bool = False) -> float:
    """C = 6 N D, or 8 N D where activations are computed again: N active weights, D tokens (Kaplan et al., 2020).

    >>> from nestling.model.architectures import gpt2
    >>> gpt3 = gpt2.Config(vocab_size=50257, context=2048, d_model=12288, n_layers=96, n_heads=96)
    >>> f"{six_n_d(gpt3, 300e9):.2e}"
    '3.14e+23'
    """
    return (8 if recomputed else 6) * count_parameters(config).active * tokens
