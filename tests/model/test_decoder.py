from __future__ import annotations

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from nestling.core import registry
from nestling.core.errors import UserError
from nestling.model import attention
from nestling.model.attention import additive, attend
from nestling.model.block import Block
from nestling.model.config import DecoderConfig
from nestling.model.decoder import Decoder, build
from nestling.model.hub import make_config
from nestling.model.norms import RMSNorm
from nestling.model.positions import alibi_slopes

TINY = {"vocab_size": 50, "context": 32, "d_model": 32, "n_layers": 2, "n_heads": 4, "init": "gpt2"}


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_seed_gives_one_model_and_leaves_the_global_stream_alone(seed: int) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = build(make_config(TINY), torch.Generator().manual_seed(seed))
    assert torch.equal(torch.rand(1), expected)
    second = build(make_config(TINY), torch.Generator().manual_seed(seed))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_bad_sizes_are_user_errors() -> None:
    with pytest.raises(UserError, match=r"d_model 30 is not divisible by n_heads 4; use d_model 28"):
        make_config({**TINY, "d_model": 30})
    with pytest.raises(UserError, match="n_heads 4 is not divisible by n_kv_heads 3"):
        make_config({**TINY, "n_kv_heads": 3})
    with pytest.raises(UserError, match="did you mean 'd_model'"):
        make_config({**TINY, "d_modell": 64})
    with pytest.raises(UserError, match="did you mean 'qwen3'"):
        make_config({**TINY, "architecture": "qwen4"})


def test_every_setting_is_described_in_every_family() -> None:
    for name in registry.names("model.architectures"):
        fields = type(make_config({**TINY, "architecture": name})).model_fields
        assert [field for field, info in fields.items() if not info.description] == []


def test_explicit_attention_equals_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(2, 6, 9, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8)
    mask = additive(torch.ones(2, 1, 9, 9, dtype=torch.bool).tril())
    mask[1, 0, 5:, :5] = -torch.inf
    per_head = mask - torch.arange(6).view(1, 6, 1, 1) * 0.3
    for some in (None, mask, per_head):
        explicit = attend(q, k, v, some)
        with monkeypatch.context() as patch:
            patch.setattr(attention, "SHORTEST_STRIP", 4)  # 9 queries: strips of 4, 4 and 1
            torch.testing.assert_close(explicit, attend(q, k, v, some), rtol=0, atol=1e-6)
        with monkeypatch.context() as patch:
            patch.setattr(attention, "EXPLICIT_CPU_TOKENS", 0)
            torch.testing.assert_close(explicit, attend(q, k, v, some), rtol=0, atol=1e-5)


def test_rms_norm_against_torch() -> None:
    x, norm = torch.randn(3, 16), RMSNorm(16, 1e-6)
    torch.nn.init.normal_(norm.weight)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (16,), norm.weight, 1e-6))


def test_alibi_slopes_of_the_paper() -> None:
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(12) == pytest.approx(alibi_slopes(8) + [2 ** (-0.5 - i) for i in range(4)])


@torch.no_grad()
@pytest.mark.parametrize(
    ("positions", "moves"), [("rope", False), ("alibi", False), ("none", False), ("learned", True)]
)
def test_relative_schemes_do_not_see_where_a_text_begins(positions: str, moves: bool) -> None:
    model = build(make_config({**TINY, "positions": positions, "architecture": "llama"})).eval()
    text, shifted = ids(1, 8), torch.arange(8).unsqueeze(0) + 11
    difference = (model(text) - model(text, positions=shifted)).abs().max().item()
    assert (difference > 1e-3) == moves
    assert not math.isnan(difference)


@torch.no_grad()
def test_order_matters_with_every_scheme_but_none() -> None:
    """Without positions, the last token sees a set: exchanging two past tokens changes nothing in one layer."""
    text = ids(1, 8)
    exchanged = text[:, [1, 0, 2, 3, 4, 5, 6, 7]]
    for positions in ("rope", "alibi", "none", "learned", "sinusoidal"):
        model = build(make_config({**TINY, "positions": positions, "n_layers": 1})).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        difference = (model(text)[:, -1] - model(exchanged)[:, -1]).abs().max().item()
        assert (difference > 1e-4) == (positions != "none"), positions


def test_dropout_only_while_training() -> None:
    model = build(make_config({**TINY, "dropout": 0.2}))
    text = ids(2, 8)
    assert not torch.equal(model.train()(text), model(text))
    assert torch.equal(model.eval()(text), model(text))


def test_start_values() -> None:
    zero = build(make_config({**TINY, "d_model": 64, "init": "zero"}))
    block = zero.blocks[0]
    assert isinstance(block, Block)
    assert block.attention.output.weight.abs().max() == 0
    assert block.attention.query.weight.std().item() == pytest.approx(1 / 8, rel=0.1)
    old = build(make_config({**TINY, "d_model": 64, "architecture": "gpt2", "init": "gpt2"})).blocks[0]
    assert isinstance(old, Block)
    assert old.attention.output.weight.std().item() == pytest.approx(0.02 / 2, rel=0.1)  # 2 layers: sqrt(2 * 2)


def test_parameters_by_the_books_formula() -> None:
    """l(12h² + 13h) + Vh + positions and the final norm: GPT-2 small has 124,439,808."""
    with torch.device("meta"):
        config = make_config(
            {
                "architecture": "gpt2",
                "vocab_size": 50257,
                "context": 1024,
                "d_model": 768,
                "n_layers": 12,
                "n_heads": 12,
            }
        )
        assert Decoder(config).parameter_count() == 124_439_808


def test_a_block_class_of_ones_own() -> None:
    class Parallel(Block):
        def forward(self, x, scene, memory=None):  # type: ignore[no-untyped-def]
            normed = self.attention_norm(x)
            return x + self.attention(normed, scene, memory) + self.feed_forward(normed)

    model = Decoder(DecoderConfig(**TINY), Parallel)
    assert model(ids(2, 8)).shape == (2, 8, 50)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler looks at it
def test_compiled_blocks_give_the_same_and_compile_once() -> None:
    """One graph serves all layers, steps and documents, without breaks."""
    torch._dynamo.reset()
    model = build(make_config({**TINY, "n_layers": 3}))
    text, segments = ids(2, 16), torch.arange(16).expand(2, 16) // 8
    weight = model.blocks[1].get_parameter("attention.query.weight")
    want = torch.autograd.grad(model(text, segments=segments).square().mean(), weight)
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True, dynamic=False)
    for step in range(3):
        got = torch.autograd.grad(model((text + step) % 50, segments=segments + step).square().mean(), weight)
        if step == 0:
            torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-7)
    assert counter.frame_count == 1
    torch._dynamo.reset()
