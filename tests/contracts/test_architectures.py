"""What every file of model/architectures/ keeps: a new architecture is one new file, and these tests run over it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from nestling.core import registry
from nestling.model import checkpoint
from nestling.model.cache import KVCache
from nestling.model.decoder import Decoder, build
from nestling.model.hub import make_config
from nestling.model.likelihood import weighted_loss_sum
from nestling.tokenizer.bpe import Tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
NAMES = registry.names("model.architectures")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and on a busy machine threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=NAMES)
def architecture(request: pytest.FixtureRequest) -> ModuleType:
    return registry.find("model.architectures", request.param)


@pytest.fixture
def model(architecture: ModuleType) -> Decoder:
    return scrambled(architecture)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat sat on the mat and the dog sat on the log"] * 4, 270)


def scrambled(architecture: ModuleType, **changes: object) -> Decoder:
    """A tiny model with every parameter random: start values of zero would make most of these tests true of anything."""
    model = build(architecture.tiny().with_(**changes)).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data.normal_(centre, 0.2, generator=generator)
    return model


def some_ids(model: Decoder, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def test_file_name_is_the_architecture(architecture: ModuleType) -> None:
    name = architecture.__name__.rsplit(".", 1)[-1]
    assert architecture.tiny().architecture == name
    assert type(make_config({"architecture": name, "d_model": 64, "n_heads": 4})) is architecture.Config


@torch.no_grad()
def test_causality(model: Decoder) -> None:
    ids = some_ids(model, 2, 12)
    changed = ids.clone()
    changed[:, 7:] = (ids[:, 7:] + 1) % model.config.vocab_size
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-6)
    assert (before[:, 7:] - after[:, 7:]).abs().amax(-1).min() > 1e-3


@torch.no_grad()
def test_the_past_matters_at_every_distance(model: Decoder) -> None:
    ids = some_ids(model, 1, 12)
    changed = ids.clone()
    changed[:, 0] = (ids[:, 0] + 1) % model.config.vocab_size
    assert (model(ids) - model(changed)).abs().amax(-1).min() > 1e-5


@torch.no_grad()
def test_packed_documents_do_not_see_each_other(model: Decoder) -> None:
    first, second = some_ids(model, 1, 5, seed=1), some_ids(model, 1, 8, seed=2)
    packed = model(
        torch.cat([first, second], 1),
        positions=torch.tensor([[*range(5), *range(8)]]),
        segments=torch.tensor([[0] * 5 + [1] * 8]),
    )
    torch.testing.assert_close(packed[:, :5], model(first), rtol=0, atol=1e-5)
    torch.testing.assert_close(packed[:, 5:], model(second), rtol=0, atol=1e-5)


@torch.no_grad()
def test_cached_equals_full_with_ragged_rows(model: Decoder) -> None:
    """Three texts of different length: prefilled right-padded, then continued by one token and by unequal pieces."""
    lengths = [6, 2, 9]
    texts = some_ids(model, 3, 16)
    full = model(texts)
    cache = KVCache(model.config, rows=3, capacity=20)
    got = model(texts[:, :9], cache=cache, counts=torch.tensor(lengths))
    for row, length in enumerate(lengths):
        torch.testing.assert_close(got[row, :length], full[row, :length], rtol=0, atol=1e-4)
    for _ in range(2):
        step = torch.stack([texts[row, length] for row, length in enumerate(lengths)]).unsqueeze(1)
        got = model(step, cache=cache)
        for row, length in enumerate(lengths):
            torch.testing.assert_close(got[row, 0], full[row, length], rtol=0, atol=1e-4)
        lengths = [length + 1 for length in lengths]
    assert cache.lengths.tolist() == lengths


@torch.no_grad()
def test_a_subset_of_rows_in_any_order(model: Decoder) -> None:
    texts = some_ids(model, 4, 12)
    full = model(texts)
    cache = KVCache(model.config, rows=4, capacity=12)
    model(texts[:, :5], cache=cache)
    rows, counts = torch.tensor([3, 0]), torch.tensor([4, 2])
    got = model(texts[rows, 5:9], cache=cache, rows=rows, counts=counts)
    torch.testing.assert_close(got[0], full[3, 5:9], rtol=0, atol=1e-4)
    torch.testing.assert_close(got[1, :2], full[0, 5:7], rtol=0, atol=1e-4)
    assert cache.lengths.tolist() == [7, 5, 5, 9]
    got = model(texts[1:3, 5:6], cache=cache, rows=torch.tensor([1, 2]))
    torch.testing.assert_close(got[:, 0], full[1:3, 5], rtol=0, atol=1e-4)


def test_gradients_are_finite_and_reach_every_parameter(model: Decoder) -> None:
    ids = some_ids(model, 2, 12)
    targets, weights = ids.roll(-1, 1), torch.ones(2, 12)
    loss = weighted_loss_sum(model.hidden(ids), model.output_weight, targets, weights)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # A bias on keys shifts all scores of a query alike, which the softmax doesn't see.
        assert parameter.grad.abs().max() > (0 if not name.endswith("key.bias") else -1), name


def test_it_learns_a_fixed_text_from_its_own_start_values(architecture: ModuleType) -> None:
    model = build(architecture.tiny())
    ids = some_ids(model, 4, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        weights = torch.ones(4, 15)
        loss = weighted_loss_sum(model.hidden(ids[:, :-1]), model.output_weight, ids[:, 1:], weights) / 60
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(model.config.vocab_size), abs=0.5)
    assert losses[-1] < 0.5 * losses[0]


@torch.no_grad()
def test_growing_the_vocabulary_keeps_old_logits(model: Decoder) -> None:
    ids = some_ids(model, 2, 8)
    before, old = model(ids), model.config.vocab_size
    model.resize_vocabulary(old + 5, torch.Generator().manual_seed(0))
    after = model(ids)
    assert after.shape[-1] == model.config.vocab_size == old + 5
    torch.testing.assert_close(after[..., :old], before, rtol=0, atol=1e-6)
    assert after[..., old:].isfinite().all()
    assert len({round(value, 6) for value in after[0, -1, old:].tolist()}) == 5  # new tokens are told apart


@torch.no_grad()
def test_save_and_load(architecture: ModuleType, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = scrambled(architecture, vocab_size=tokenizer.vocab_size)
    checkpoint.save(tmp_path / "m", model, tokenizer, {"stage": "pretrain", "loss": 1.5})
    read = checkpoint.load(tmp_path / "m")
    ids = some_ids(model, 2, 12)
    assert torch.equal(read.model(ids), model(ids))
    assert read.provenance == {"stage": "pretrain", "loss": 1.5}
    assert read.tokenizer.hash == tokenizer.hash
    assert read.model.config.architecture == model.config.architecture


@torch.no_grad()
def test_our_folder_opens_in_transformers(architecture: ModuleType, tokenizer: Tokenizer, tmp_path: Path) -> None:
    if architecture.REFERENCE is None:
        pytest.skip("no class in transformers")
    transformers = pytest.importorskip("transformers")
    for tied in (True, False):
        model = scrambled(architecture, vocab_size=tokenizer.vocab_size, tied=tied)
        checkpoint.save(tmp_path / "m", model, tokenizer)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
        assert type(theirs).__name__ == architecture.REFERENCE
        ids = some_ids(model, 2, 12)
        torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_their_folder_opens_here(architecture: ModuleType, tmp_path: Path) -> None:
    if architecture.REFERENCE is None:
        pytest.skip("no class in transformers")
    transformers = pytest.importorskip("transformers")
    cls = getattr(transformers, architecture.REFERENCE)
    torch.manual_seed(0)
    theirs = cls(cls.config_class(**architecture.to_hub(architecture.tiny()))).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    model, head = checkpoint.load_model(tmp_path)
    assert head is None
    ids = some_ids(model, 2, 12)
    torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=0, atol=1e-5)
