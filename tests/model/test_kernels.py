"""Native attention and loss against the formulas in float64, and against torch's operations in bfloat16."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from nestling.core import native
from nestling.model import attention, kernels
from nestling.model.architectures import qwen3
from nestling.model.cache import KVCache
from nestling.model.decoder import Decoder, build
from nestling.model.kernels import Sight
from nestling.model.likelihood import next_token_loss_sum, weighted_loss_sum
from nestling.training.recompute import recompute_blocks

needed = pytest.mark.skipif(
    not kernels.able(), reason="no products of bfloat16 pairs, matrix units, or no C++ compiler"
)
SIZES = [
    (2, 1, 4, 2, 64),
    (1, 7, 2, 2, 32),
    (2, 130, 4, 1, 64),
    (1, 257, 2, 2, 128),
    (2, 64, 6, 3, 16),
    (1, 100, 2, 1, 48),
]
WAYS = ["causal", "packed", "window", "packed in a window", "documents in pieces"]
ERROR = 1.3  # times the error of torch's operations, which round scores to bfloat16 too


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def heads(b: int, t: int, h: int, groups: int, size: int) -> tuple[list[Tensor], Tensor]:
    """Queries, keys and values that learn, and a gradient of what is mixed."""
    parts = [normal(b, t, count, size, seed=seed).requires_grad_() for seed, count in enumerate((h, groups, groups))]
    return parts, normal(b, t, h, size, seed=3)


def sight(way: str, b: int, t: int) -> Sight:
    documents = {
        "packed": (torch.arange(t) // 37).expand(b, t),
        "packed in a window": (torch.arange(t) // 37).expand(b, t),
        "documents in pieces": torch.randint(0, 3, (b, t), generator=torch.Generator().manual_seed(4)),
    }.get(way)
    return Sight(None if documents is None else documents.int(), 20 if "window" in way else None)


def additive(seen: Sight, t: int) -> Tensor:
    distance = torch.arange(t).unsqueeze(1) - torch.arange(t)
    visible = (distance >= 0) & (distance < (seen.window or t))
    if seen.segments is not None:
        visible = visible & (seen.segments.unsqueeze(-1) == seen.segments.unsqueeze(-2))
    return attention.additive(visible.view(-1, 1, t, t))


def written_out(q: Tensor, k: Tensor, v: Tensor, seen: Sight) -> Tensor:
    """The same in torch's operations, in the dtype of the queries."""
    mask = additive(seen, q.shape[1])
    if q.dtype != torch.float64:
        return attention.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(1, 2)
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhk,bshk->bhqs", q, k) / q.shape[-1] ** 0.5 + mask
    return torch.einsum("bhqs,bshk->bqhk", scores.softmax(-1), v)


def far(found: Tensor, exact: Tensor) -> float:
    return float((found.detach().double() - exact.detach()).norm())


@needed
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_as_near_to_the_formula_as_torch(sizes: tuple[int, ...], way: str) -> None:
    parts, d_out = heads(*sizes)
    seen = sight(way, *sizes[:2])
    exact_parts = [x.detach().double().requires_grad_() for x in parts]
    exact, plain, found = (
        written_out(*exact_parts, seen), written_out(*parts, seen), kernels.attend(*parts, seen)
    )  # fmt: skip
    wanted = [exact, *torch.autograd.grad(exact, exact_parts, d_out.double())]
    torchs = [plain, *torch.autograd.grad(plain, parts, d_out)]
    ours = [found, *torch.autograd.grad(found, parts, d_out)]
    for right, theirs, mine in zip(wanted, torchs, ours, strict=True):
        assert mine.dtype == torch.bfloat16
        assert far(mine, right) <= ERROR * far(theirs, right) + 1e-5 * sizes[1] * sizes[-1] ** 0.5


@needed
def test_the_same_bits_with_any_number_of_threads_and_any_layout() -> None:
    parts, d_out = heads(2, 100, 4, 2, 64)
    seen = sight("packed", 2, 100)
    found = []
    for threads in (1, 3, 2, 1):
        torch.set_num_threads(threads)
        mixed = kernels.attend(*parts, seen)
        found.append([mixed, *torch.autograd.grad(mixed, parts, d_out)])
    turned = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in parts]
    joint = torch.cat([x.detach() for x in parts], 2).requires_grad_()
    odd = [torch.cat([x.detach(), x.detach()[..., :1]], -1)[..., :64].requires_grad_() for x in parts]
    for others in (turned, joint.split([4, 2, 2], 2), odd):
        mixed = kernels.attend(*others, seen)
        found.append([mixed, *torch.autograd.grad(mixed, others, d_out.transpose(1, 2).contiguous().transpose(1, 2))])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@needed
@pytest.mark.parametrize("t", [1, 7, 33, 100])
def test_nothing_is_read_or_written_beside_the_tensors(t: int) -> None:
    """What lies around them is not a number, and stays what it was."""
    sizes = (2, t, 2, 1, 48)
    parts, d_out = heads(*sizes)
    exact = kernels.attend(*parts, sight("packed", 2, t))
    gradients = torch.autograd.grad(exact, parts, d_out)
    framed = []
    for x in (*(x.detach() for x in parts), d_out):
        frame = torch.full((4, t + 2, x.shape[2] + 2, 48 + 32), torch.nan, dtype=torch.bfloat16)
        inside = frame[1:3, 1:-1, 1:-1, 16:-16]
        inside.copy_(x)
        framed.append(inside)
    learnt = [x.requires_grad_() for x in framed[:3]]
    mixed = kernels.attend(*learnt, sight("packed", 2, t))
    assert torch.equal(mixed, exact)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(mixed, learnt, framed[3]), gradients, strict=True))


@needed
def test_wider_numbers_are_rounded_first() -> None:
    """As adapters in float32 beside a model in bfloat16 may give them."""
    parts, d_out = heads(1, 40, 2, 1, 32)
    mixed = kernels.attend(*parts, sight("causal", 1, 40))
    wide = [x.detach().float().requires_grad_() for x in parts]
    found = kernels.attend(*wide, sight("causal", 1, 40))
    assert torch.equal(found, mixed)
    for a, b in zip(torch.autograd.grad(found, wide, d_out), torch.autograd.grad(mixed, parts, d_out), strict=True):
        assert torch.equal(a, b.float())


@needed
def test_what_is_no_number_is_passed_on() -> None:
    parts, _ = heads(1, 70, 2, 1, 32)
    with torch.no_grad():
        parts[0][0, 40, 1, 3] = torch.nan
    mixed = kernels.attend(*parts, sight("causal", 1, 70))
    assert mixed[0, 40, 1].isnan().all()
    assert mixed.isnan().sum() == 32


@needed
def test_as_an_operation_of_torch() -> None:
    """Shapes without data, gradients, and a compiler that meets it in one graph."""
    parts, d_out = heads(2, 40, 4, 2, 32)
    seen = sight("packed in a window", 2, 40)
    torch.library.opcheck(kernels._attend, (*parts, seen.segments, 20))
    kept, (mixed, logs) = [x.detach() for x in parts], kernels._attend(*parts, seen.segments, 20)
    torch.library.opcheck(kernels._reverse, ([*kept, mixed.detach()], seen.segments, 20, logs.detach(), d_out))
    plain = kernels.attend(*parts, seen)
    gradients = torch.autograd.grad(plain, parts, d_out)
    torch._dynamo.reset()
    joined = torch.compile(kernels.attend, backend="aot_eager", fullgraph=True)(*parts, seen)
    assert torch.equal(joined, plain)
    for found, exact in zip(torch.autograd.grad(joined, parts, d_out), gradients, strict=True):
        assert torch.equal(found, exact)


@needed
@pytest.mark.parametrize("size", [5, 16, 301, 4096])
def test_loss_and_its_gradient(size: int) -> None:
    """Rows whose weights differ, one of them with huge logits and one that forbids tokens."""
    logits, rows = 3 * normal(9, size), torch.arange(9)
    logits[3] *= 1000
    logits[4, 2:] = -torch.inf
    targets, weights = rows % 2, torch.linspace(-1, 2, 9)
    exact = logits.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(exact, targets, reduction="none") * weights
    (gradient,) = torch.autograd.grad(losses.sum(), exact)
    room = torch.full((11, size), torch.nan, dtype=torch.bfloat16)
    room[1:-1] = logits
    loss, found = kernels.loss_and_gradient(room[1:-1], targets, weights)
    assert room[[0, -1]].isnan().all()
    assert found.data_ptr() == room[1:-1].data_ptr()
    torch.testing.assert_close(loss.double(), losses.sum().detach(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.double(), gradient, rtol=2**-8, atol=1e-6)
    torch.set_num_threads(3)
    again = logits.clone()
    assert torch.equal(kernels.loss_and_gradient(again, targets, weights)[0], loss)
    assert torch.equal(again, found)


@needed
def test_loss_of_a_batch_in_chunks() -> None:
    hidden, weight = normal(2, 50, 32, seed=1).requires_grad_(), normal(301, 32, seed=2).requires_grad_()
    targets, weights = (
        torch.arange(100).view(2, 50),
        torch.rand(2, 50, generator=torch.Generator().manual_seed(3)).round(),
    )
    found = {}
    for way, one_pass in {"native": kernels.loss_and_gradient, "torch": None}.items():
        loss = weighted_loss_sum(hidden, weight, targets, weights, chunk=16, one_pass=one_pass)
        found[way] = [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]
    for mine, theirs in zip(*found.values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


CONFIG = qwen3.Config(vocab_size=97, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_size=32, context=80)


def batch(packed: bool) -> SimpleNamespace:
    ids = torch.randint(0, 97, (2, 71), generator=torch.Generator().manual_seed(5))
    segments = (torch.arange(70) // 30).expand(2, 70) if packed else None
    weights = torch.ones(2, 70)
    return SimpleNamespace(ids=ids[:, :-1], targets=ids[:, 1:], weights=weights, positions=None, segments=segments)


def gradients(model: Decoder, packed: bool) -> tuple[Tensor, Tensor]:
    """Loss, and all gradients in one vector."""
    loss = next_token_loss_sum(model, batch(packed)) / 140
    model.zero_grad()
    loss.backward()
    return loss.detach(), torch.cat([p.grad.double().flatten() for p in model.parameters()])


@needed
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 16])
def test_a_decoder_learns_the_same(packed: bool, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradients in bfloat16 are as near to those in float32 as without native code, recomputed or not."""
    model = build(CONFIG.with_(window=window)).train()
    exact_loss, exact = gradients(model, packed)
    model.bfloat16()
    loss, found = gradients(model, packed)
    recompute_blocks({"model": model})
    assert torch.equal(gradients(model, packed)[1], found)
    monkeypatch.setattr(kernels, "able", lambda: False)
    _, torchs = gradients(model, packed)
    assert not torch.equal(found, torchs)
    assert abs(loss - exact_loss) < 2e-3
    assert far(found, exact) <= 1.1 * far(torchs, exact)


@needed
def test_which_decoders_it_serves() -> None:
    x, segments = torch.zeros(2, 40, 64).bfloat16(), torch.zeros(2, 40, dtype=torch.long)
    assert isinstance(build(CONFIG).train()._mask(x, segments, None), Sight)
    with torch.autocast("cpu", torch.bfloat16):
        assert isinstance(build(CONFIG).train()._mask(x.float(), segments, None), Sight)
    for changes in ({"dropout": 0.1}, {"positions": "alibi"}, {"head_size": 24}):
        assert isinstance(build(CONFIG.with_(**changes)).train()._mask(x, segments, None), Tensor)
    model = build(CONFIG).train()
    assert isinstance(model._mask(x.float(), segments, None), Tensor)
    assert isinstance(model._mask(x, None, KVCache(CONFIG, rows=2).begin(40, None, None)), Tensor)
    assert isinstance(model.eval()._mask(x, segments, None), Tensor)


@pytest.mark.parametrize(
    ("known", "library"),
    [({"avx512_bf16": True, "amx_bf16": True}, True), ({"avx512_bf16": False}, True), ({"avx512_bf16": True}, False)],
    ids=["matrix units", "no pairs", "no compiler"],
)
def test_which_machines_it_serves(known: dict[str, bool], library: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    if not library:
        monkeypatch.setattr(native.shutil, "which", lambda name: None)
        native.compiled.cache_clear()
    kernels.able.cache_clear()
    try:
        assert not kernels.able()
        assert not isinstance(build(CONFIG).train()._mask(torch.zeros(2, 40, 64).bfloat16(), None, None), Sight)
    finally:
        kernels.able.cache_clear()
        native.compiled.cache_clear()
