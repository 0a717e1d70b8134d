"""What a decoder is made of. An architecture file subclasses `DecoderConfig` with its family's defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from nestling.core.config import Config
from nestling.core.errors import UserError
from nestling.model.depth import with_depth
from nestling.model.rope import RopeScaling


class Experts(Config):
    """A feed-forward of many parts ("mixture of experts"), of which each token uses a few."""

    count: int = Field(ge=2, description="Number of experts E.")
    per_token: int = Field(2, ge=1, description="Experts that each token uses.")
    d_ff: int = Field(ge=1, description="Inner width of one expert.")
    normalised: bool = Field(True, description="The weights of a token's experts sum to one.")
    dense_layers: tuple[int, ...] = Field((), description="Layers, from 0, with an ordinary feed-forward.")
    balance: float = Field(0.001, ge=0, description="Weight of the loss that keeps experts equally busy.")

    @model_validator(mode="after")
    def _enough(self) -> Experts:
        if self.per_token > self.count:
            raise UserError("more experts per token than there are", where="per_token", value=self.per_token)
        return self


class DecoderConfig(Config):
    """Sizes and parts of one decoder. Shape letters: B batch, T time, D d_model, H n_heads, K head_size, V vocab_size.

    Sizes left at None follow from others: see `kv_heads`, `head` and `ff`, which are what the code reads. In the place of
    d_model, n_layers and n_heads there may stand `depth`: see `depth.py`.
    """

    architecture: str = Field(default="qwen3", description="File of model/architectures that builds this decoder.")
    vocab_size: int = Field(default=4096, ge=1, description="Number of token ids V.")
    context: int = Field(default=512, ge=1, description="Longest sequence in tokens.")
    d_model: int = Field(default=256, ge=1, description="Width D of the residual stream.")
    n_layers: int = Field(default=4, ge=1, description="Number of blocks.")
    n_heads: int = Field(default=4, ge=1, description="Number of query heads H.")
    n_kv_heads: int | None = Field(default=None, ge=1, description="Number of key/value heads; n_heads when not set.")
    head_size: int | None = Field(default=None, ge=1, description="Size K of one head; d_model / n_heads when not set.")
    d_ff: int | None = Field(
        default=None,
        ge=1,
        description="Inner width of the feed-forward; 4 x d_model when not set (gated: 8/3, up to 32s).",
    )
    positions: Literal["learned", "rope", "sinusoidal", "alibi", "none"] = Field(
        default="rope",
        description="How order enters: a table, rotation of queries and keys, waves, distance, not at all.",
    )
    rope_theta: float = Field(default=10_000.0, gt=0, description="Longest wavelength of RoPE, divided by 2 pi.")
    rope_scaling: RopeScaling | None = Field(default=None, description="How RoPE is stretched over longer texts.")
    window: int | None = Field(default=None, ge=1, description="A token sees itself and window - 1 before it; all when not set.")
    norm: Literal["layer", "rms"] = Field(
        default="rms", description="Layer norm (weight and bias) or RMS norm (weight)."
    )
    norm_eps: float = Field(default=1e-6, gt=0, description="Added to the variance in norms.")
    block: Literal["pre", "post"] = Field(
        default="pre", description="Norm before each sub-layer and at the end (GPT-2 on), or after each sum (GPT-1)."
    )
    activation: Literal["gelu", "gelu_tanh", "silu", "relu_squared"] = Field(
        default="silu", description="Non-linearity of the feed-forward."
    )
    gated: bool = Field(default=True, description="Feed-forward as down(act(gate(x)) * up(x)), not down(act(up(x))).")
    experts: Experts | None = Field(default=None, description="A feed-forward of experts instead of one.")
    bias: bool = Field(default=False, description="Biases in attention output and feed-forward.")
    qkv_bias: bool = Field(default=False, description="Biases in the query, key and value projections.")
    qk_norm: bool = Field(default=False, description="RMS norm on each head's queries and keys before rotation.")
    tied: bool = Field(default=True, description="Output layer shares the embedding's weights.")
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Dropout on embeddings, attention and residual branches."
    )
    init: Literal["zero", "gpt2"] = Field(
        default="zero",
        description="Start values: residual branches at zero, hidden matrices N(0, 1/fan_in); or GPT-2's N(0, 0.02).",
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """A family that changes a default keeps the field's description."""
        for name, field in cls.model_fields.items():
            if field.description is None and name in DecoderConfig.model_fields:
                field.description = DecoderConfig.model_fields[name].description

    @model_validator(mode="before")
    @classmethod
    def _depth_is_sizes(cls, settings: Any) -> Any:
        return with_depth(settings) if isinstance(settings, Mapping) and "depth" in settings else settings

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.n_kv_heads or self.n_heads

    @property
    def head(self) -> int:
        """Size K of one head."""
        return self.head_size or self.d_model // self.n_heads

    @property
    def ff(self) -> int:
        """Inner width of the feed-forward."""
        if self.d_ff is not None:
            return self.d_ff
        return -(-self.d_model * 8 // 3 // 32) * 32 if self.gated else 4 * self.d_model

    def of_layer(self, index: int) -> DecoderConfig:
        """What one layer is made of: without experts where it has none."""
        dense = self.experts is not None and index in self.experts.dense_layers
        return self.with_(experts=None) if dense else self

    @model_validator(mode="after")
    def _sizes_fit(self) -> DecoderConfig:
        if self.head_size is None and self.d_model % self.n_heads:
            raise UserError(
                f"d_model {self.d_model} is not divisible by n_heads {self.n_heads}",
                fix=f"use d_model {self.d_model // self.n_heads * self.n_heads or self.n_heads} or set head_size",
            )
        if self.n_heads % self.kv_heads:
            raise UserError(
                f"n_heads {self.n_heads} is not divisible by n_kv_heads {self.kv_heads}", fix="use a divisor of n_heads"
            )
        if self.positions == "rope" and self.head % 2:
            raise UserError(f"head size {self.head} is odd, and rope rotates pairs", fix="use an even head_size")
        if self.positions == "sinusoidal" and self.d_model % 2:
            raise UserError(
                f"d_model {self.d_model} is odd, and sinusoidal positions need pairs", fix="use an even one"
            )
        return self

    def with_(self, **changes: Any) -> DecoderConfig:
        """A copy with some fields changed, validated anew."""
        return type(self).model_validate({**self.model_dump(), **changes})
