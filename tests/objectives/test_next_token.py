"""Next-token prediction of a model with experts: the loss against transformers'."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nestling.loading.batches import TokenBatch
from nestling.model.architectures import qwen3_moe
from nestling.model.config import Experts
from nestling.model.decoder import Decoder, build
from nestling.objectives.next_token import NextToken, Settings
from nestling.training.contract import MICROBATCH, Term

BALANCE = 0.3


class OneBatch:
    def __init__(self, batch: TokenBatch) -> None:
        self._batch = batch

    def batch(self, step: int) -> TokenBatch:
        return self._batch


def rows() -> TokenBatch:
    line = torch.randint(97, (4, 17), generator=torch.Generator().manual_seed(5))
    place = torch.arange(16).expand(4, -1)
    return TokenBatch(line[:, :-1], line[:, 1:], torch.ones(4, 16), place, torch.zeros_like(place))


def model() -> Decoder:
    experts = Experts(count=4, per_token=2, d_ff=24, balance=BALANCE)
    made = build(qwen3_moe.tiny().with_(experts=experts))
    generator = torch.Generator().manual_seed(3)
    for parameter in made.parameters():
        parameter.data.normal_(0.1, 0.2, generator=generator)
    return made


def fused(ours: Decoder) -> dict[str, torch.Tensor]:
    """Our weights under transformers' names in memory, which join gate and up of all experts."""
    state = qwen3_moe.export_weights(ours.state_dict(), ours.config)
    for layer, block in enumerate(ours.blocks):
        part, name = block.feed_forward, f"model.layers.{layer}.mlp.experts"
        state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
        state |= {f"{name}.gate_up_proj": torch.cat([part.gate.weight, part.up.weight], 1)}
        state |= {f"{name}.down_proj": part.down.weight}
    return {"lm_head.weight": state["model.embed_tokens.weight"], **state}


def objective(decoder: Decoder, microbatches: int = 1) -> NextToken:
    settings = Settings(microbatches=microbatches)
    return NextToken(settings, decoder, OneBatch(rows()), torch.ones(97, dtype=torch.long), None)


def loss_of(terms: list[Term], counts: dict[str, float]) -> torch.Tensor:
    return sum((term.weight * term.sum / counts[term.per] for term in terms), torch.zeros(()))


def test_loss_and_gradients_with_expert_balance_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    ours, batch = model(), rows()
    theirs = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**qwen3_moe.to_hub(ours.config)))
    theirs.load_state_dict(fused(ours))
    found = theirs(batch.ids, output_router_logits=True)
    reference = torch.nn.functional.cross_entropy(found.logits.flatten(0, 1), batch.targets.flatten())
    (reference + BALANCE * found.aux_loss).backward()

    learning = objective(ours)
    (update,) = learning.updates(1)
    terms = learning.terms(update.microbatches[0])
    assert [(term.name, term.per, term.weight) for term in terms] == [
        ("cross_entropy", "tokens", 1.0),
        ("expert_balance", MICROBATCH, BALANCE),
    ]
    assert terms[1].sum.item() == pytest.approx(found.aux_loss.item(), rel=1e-5)
    loss_of(terms, {**update.counts, MICROBATCH: 1}).backward()
    router = ours.blocks[0].feed_forward.router.weight.grad
    torch.testing.assert_close(router, theirs.model.layers[0].mlp.gate.weight.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.embedding.weight.grad, theirs.model.embed_tokens.weight.grad, rtol=1e-4, atol=1e-5)


def test_a_microbatch_gets_the_balance_of_its_own_rows() -> None:
    learning = objective(model(), microbatches=2)
    (update,) = learning.updates(1)
    together = [learning.terms(piece)[1].sum.item() for piece in update.microbatches]
    alone = [objective(model()).terms(piece)[1].sum.item() for piece in reversed(update.microbatches)]
    assert together == pytest.approx(alone[::-1])
    assert together[0] != pytest.approx(together[1], rel=1e-4)


def test_without_gradient_there_is_no_balance() -> None:
    learning = objective(model())
    (update,) = learning.updates(1)
    with torch.no_grad():
        assert [term.name for term in learning.terms(update.microbatches[0])] == ["cross_entropy"]


def test_a_gpu_finds_its_next_batch_ready() -> None:
    """While it computes, the host reads on; a resumed run and a CPU read when a step begins."""
    asked: list[int] = []

    class Steps(OneBatch):
        def batch(self, step: int) -> TokenBatch:
            asked.append(step)
            return replace(self._batch, ids=self._batch.ids * 0 + step)

    what = NextToken(Settings(), model(), Steps(rows()), torch.ones(97).long(), None)
    for device, reads in (("cpu", [0, 1, 4]), ("cuda", [0, 1, 2, 4, 5])):
        asked.clear()
        what.device = torch.device(device)
        for step in (1, 2, 5):
            (update,) = what.updates(step)
            assert int(update.microbatches[0].ids[0, 0]) == step - 1
        assert asked == reads
