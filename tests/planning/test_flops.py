"""Operations: equal to what torch counts in the real model, to the published formulas, and to published runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nestling.core import registry
from nestling.model import experts
from nestling.model.decoder import Decoder
from nestling.model.hub import make_config
from nestling.model.likelihood import weighted_loss_sum
from nestling.planning.flops import flops_per_token, six_n_d
from nestling.planning.time import Speed

GPT3: dict[str, Any] = {
    "architecture": "gpt2", "vocab_size": 50257, "context": 2048, "d_model": 12288, "n_layers": 96, "n_heads": 96,
}  # fmt: skip
LLAMA_65B: dict[str, Any] = {
    "architecture": "llama", "vocab_size": 32000, "context": 2048, "d_model": 8192, "n_layers": 80, "n_heads": 64, "d_ff": 22016,
}  # fmt: skip
DAY = 86400


@pytest.mark.parametrize("name", registry.names("model.architectures"))
def test_forward_and_backward_are_what_torch_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "_has_grouped_kernel", lambda *_: False)  # which torch's counter doesn't know
    config = registry.find("model.architectures", name).tiny()
    model, rows, width = Decoder(config), 2, 12
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1)
    ids = torch.zeros(rows, width, dtype=torch.long)
    expected = flops_per_token(config, width)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids)
    assert counter.get_total_flops() == rows * width * expected.forward
    with FlopCounterMode(display=False) as counter:
        weighted_loss_sum(model.hidden(ids), model.output_weight, ids, torch.ones(rows, width)).backward()
    assert counter.get_total_flops() == rows * width * expected.training


def test_the_formula_of_the_textbooks() -> None:
    """24 b s h² + 4 b s² h per layer and 2 b s h V for the logits, forward."""
    config = make_config(GPT3)
    h, s, layers, vocabulary = config.d_model, config.context, config.n_layers, config.vocab_size
    assert flops_per_token(config).forward == layers * (24 * h * h + 4 * s * h) + 2 * h * vocabulary
    recomputed = flops_per_token(config).recomputed()
    assert recomputed == 4 * layers * (24 * h * h + 4 * s * h) + 3 * 2 * h * vocabulary


def test_gpt3_took_314_zettaflop() -> None:
    assert six_n_d(make_config(GPT3), 300e9) == pytest.approx(3.14e23, rel=0.002)
    exact = 300e9 * flops_per_token(make_config(GPT3)).training
    assert 1.0 < exact / six_n_d(make_config(GPT3), 300e9) < 1.04  # attention's scores are what 6 N D leaves out


def test_gpt3_on_1024_a100_takes_34_days_with_recomputation_and_25_without() -> None:
    """Narayanan et al., 2021: 140 TFLOP/s of each, 8 N D. 140 of 312 is 45 %."""
    cluster = Speed(peak=312e12, utilisation=140 / 312, devices=1024)
    assert cluster.seconds(six_n_d(make_config(GPT3), 300e9, recomputed=True)) / DAY == pytest.approx(34, abs=0.5)
    assert cluster.seconds(six_n_d(make_config(GPT3), 300e9)) / DAY == pytest.approx(25.4, abs=0.5)


def test_llama_65b_takes_21_days_at_its_published_speed() -> None:
    """Touvron et al., 2023: 380 tokens/s on each of 2,048 A100, 1.4 T tokens."""
    each = six_n_d(make_config(LLAMA_65B), 1)
    speed = Speed(peak=312e12, utilisation=380 * each / 312e12, devices=2048)
    assert speed.seconds(1.4e12 * each) / DAY == pytest.approx(21, abs=0.3)
    assert 0.4 < speed.utilisation < 0.55


def test_experts_cost_what_a_token_uses() -> None:
    tiny = registry.find("model.architectures", "qwen3_moe").tiny()
    more = tiny.with_(experts={**tiny.experts.model_dump(), "count": 8})
    routers = 2 * (8 - 4) * tiny.d_model * (tiny.n_layers - 1)
    assert flops_per_token(more).forward - flops_per_token(tiny).forward == routers
