"""How many weights a decoder has, part by part, from its configuration alone: GPT-3 is counted without being built."""

from __future__ import annotations

from dataclasses import dataclass

from nestling.model.config import DecoderConfig


@dataclass(frozen=True)
class Parameters:
    """Weights of one decoder, tied ones counted once; `matrices` are those inside blocks, per-token ones first.

    >>> count_parameters(DecoderConfig(vocab_size=100, d_model=32, n_layers=1)).total
    15664
    """

    embedding: int
    positions: int
    attention: int
    feed_forward: int
    experts: int
    """All experts and their routers."""
    norms: int
    head: int
    idle: int
    """Of the experts, what a token is not multiplied with."""
    hidden: int
    """Of attention, feed-forward and experts, what is a plain matrix: an optimiser may treat those apart."""

    @property
    def total(self) -> int:
        """All weights."""
        return sum((self.embedding, self.positions, self.attention, self.feed_forward, self.experts, self.norms, self.head))

    @property
    def active(self) -> int:
        """Weights that one token uses: all but the experts it isn't sent to."""
        return self.total - self.idle


def count_parameters(config: DecoderConfig) -> Parameters:
    """The weights of a decoder of this configuration: equal to the built model's, whatever the architecture."""
    layers = [config.of_layer(index) for index in range(config.n_layers)]
    sparse = [layer for layer in layers if layer.experts]
    dense = len(layers) - len(sparse)
    norm = config.d_model * (2 if config.norm == "layer" else 1)  # a gain, and a bias
    per_block = 2 * norm + (2 * config.head if config.qk_norm else 0)
    attention, width = attention_matrices(config), config.n_heads * config.head + 2 * config.kv_heads * config.head
    attention_biases = (width if config.qkv_bias else 0) + (config.d_model if config.bias else 0)
    ff = config.ff if config.bias else 0
    ff_biases = ff * (2 if config.gated else 1) + (config.d_model if config.bias else 0)
    return Parameters(
        embedding=config.vocab_size * config.d_model,
        positions=config.context * config.d_model if config.positions == "learned" else 0,
        attention=config.n_layers * (attention + attention_biases),
        feed_forward=dense * (feed_forward_matrices(config) + ff_biases),
        experts=sum(router_matrix(layer) + expert_matrices(layer) for layer in sparse),
        norms=config.n_layers * per_block + (norm if config.block == "pre" else 0),
        head=0 if config.tied else config.vocab_size * config.d_model,
        idle=sum(expert_matrices(layer) - expert_matrices(layer, of_token=True) for layer in sparse),
        hidden=config.n_layers * attention
        + dense * feed_forward_matrices(config)
        + sum(router_matrix(layer) for layer in sparse),
    )


def attention_matrices(config: DecoderConfig) -> int:
    """Weights of one layer's query, key, value and output matrices: 4 D² where every head has keys of its own."""
    return 2 * config.d_model * config.head * (config.n_heads + config.kv_heads)


def feed_forward_matrices(config: DecoderConfig) -> int:
    """Weights of one layer's dense feed-forward: 8 D² where it is four times as wide as the stream and not gated."""
    return (3 if config.gated else 2) * config.d_model * config.ff


def router_matrix(config: DecoderConfig) -> int:
    """Weights of one layer's router, none where the layer has no experts."""
    return config.d_model * config.experts.count if config.experts else 0


def expert_matrices(config: DecoderConfig, of_token: bool = False) -> int:
    """Weights of one layer's experts, or of those that one token is sent to."""
    if config.experts is None:
        return 0
    return 3 * config.d_model * config.experts.d_ff * (config.experts.per_token if of_token else config.experts.count)
