"""Fine-tuning, reward model and PPO with adapters: what is written, what is left alone, and going on after a kill."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nestling.core import pipeline
from nestling.core.errors import UserError
from nestling.core.recipe import Recipe, build_recipe, load_recipe
from nestling.core.runtime import detect
from nestling.core.storage import content_hash
from nestling.core.types import Conversation
from nestling.model import checkpoint
from nestling.model.adapters import adaptation, trained
from nestling.model.locate import checkpoint_folder
from nestling.objectives import ppo
from nestling.tokenizer.conversation import render
from nestling.training.precision import Weights

RECIPE = Path(__file__).with_name("tiny.yaml")
ADAPTERS = "{rank: 4, alpha: 8, dropout: 0.1}"
ADAPTED = ("sft", "reward", "ppo")


def recipe(*overrides: str) -> Recipe:
    every_step = [
        f"{stage}.training={{steps: 4, save_every: 0, keep: 9, log_every: 1, compile: off}}" for stage in ADAPTED
    ]
    given = [f"{stage}.adapters={ADAPTERS}" for stage in ADAPTED]
    found = load_recipe(RECIPE, [*every_step, *given, "ppo.training.steps=2", *overrides])
    return found.model_copy(update={"stages": tuple(spec for spec in found.stages if spec.name != "evaluate")})


def run(out: Path, *overrides: str) -> dict[str, dict[str, object]]:
    return pipeline.run(recipe(*overrides), out, detect("cpu", "fp32"), quiet=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapters") / "run"
    run(out)
    return out


def copy_without(finished: Path, out: Path, *stages: str) -> Path:
    """A copy of a run in which these stages never began."""
    shutil.copytree(finished, out)
    for stage in stages:
        shutil.rmtree(out / stage)
    return out


def test_only_adapters_and_new_rows_are_written(finished: Path) -> None:
    names = set(load_file(finished / "sft" / "model" / "adapter_model.safetensors"))
    assert all("lora_" in name or "trainable_tokens_delta" in name for name in names)
    assert not (finished / "sft" / "model" / "model.safetensors").exists()
    saved = json.loads((finished / "sft" / "resume" / "step-00000004" / "state.json").read_text())
    assert "lora_a" in json.dumps(saved)
    assert "attention.query.weight" not in json.dumps(saved), "no state of frozen weights is kept"


def test_the_base_is_the_pretrained_model_with_room_for_chat_tokens(finished: Path) -> None:
    base, grown = (checkpoint.load(finished / place).model for place in ("pretrain/model", "sft/base"))
    adapted = checkpoint.load(finished / "sft" / "model", merge=False).model
    old = base.config.vocab_size
    assert grown.config.vocab_size == adapted.config.vocab_size > old
    for name, value in base.state_dict().items():
        assert torch.equal(
            value, grown.state_dict()[name][:old] if name == "embedding.weight" else grown.state_dict()[name]
        )
        if name != "embedding.weight":
            assert torch.equal(value, adapted.state_dict()[name])


def test_something_was_learnt(finished: Path) -> None:
    for stage in ("sft", "ppo"):
        model = checkpoint.load(finished / stage / "model", merge=False).model
        assert any(value.abs().max() > 1e-4 for name, value in trained(model).items() if name.endswith("lora_b"))
    before, after = (surprise(finished, place) for place in ("sft/base", "sft/model"))
    assert after < before


def surprise(finished: Path, place: str) -> float:
    """Nats per token that the assistant wrote in the conversations learnt from; the same rows whatever the model."""
    found = checkpoint.load(finished / place)
    total = count = 0.0
    for line in (finished / "conversations" / "train.jsonl").read_text().splitlines()[:30]:
        row = Conversation.from_row(json.loads(line))
        told = render(found.tokenizer, row.messages, row.tools)
        ids, mask = torch.tensor(told.ids[:256]), torch.tensor(told.mask[:256])
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(found.model.eval()(ids[None])[0, :-1], ids[1:], reduction="none")
        total, count = total + float(losses[mask[1:]].sum()), count + int(mask[1:].sum())
    return total / count


def test_later_stages_train_the_same_adapters_on_the_same_base(finished: Path) -> None:
    origins = {stage: adaptation(checkpoint.load(finished / stage / "model", merge=False).model) for stage in ADAPTED}
    assert {origin.base.resolve() for origin in origins.values()} == {(finished / "sft" / "base").resolve()}
    assert checkpoint.load(finished / "reward" / "model").head is not None
    assert checkpoint_folder(finished) == finished / "ppo" / "model"


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_killed_run_goes_on_to_the_same_adapter(finished: Path, tmp_path: Path, stage: str) -> None:
    out = copy_without(finished, tmp_path / "run")
    for place in ("model", "stage.json", "base", *(f"resume/step-0000000{n}" for n in (2, 3, 4))):
        target = out / stage / place
        if target.exists():
            shutil.rmtree(target) if target.is_dir() else target.unlink()
    run(out)
    file = Path(stage) / "model" / "adapter_model.safetensors"
    assert content_hash(out / file) == content_hash(finished / file)


def test_ppo_shares_the_frozen_weights(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Policy and reference, value and reward model: two bases in memory, not four."""
    seen = {}

    def watched(settings, materials, build=ppo.build):
        made = build(settings, materials)
        sides = {
            "policy": made.cast.policy,
            "reference": made.cast.reference,
            "value": made.value,
            "reward": made.cast.reward,
        }
        for name, model in sides.items():
            pointers = {p.data_ptr() for p in model.parameters() if not p.requires_grad and p.ndim == 2}
            seen[name] = {pointer for pointer in pointers if pointer}
            seen[f"{name} learns"] = any(p.requires_grad for p in model.parameters())
        return made

    monkeypatch.setattr(ppo, "build", watched)
    run(copy_without(finished, tmp_path / "run", "ppo"))
    assert seen["policy"]
    assert seen["policy"] <= seen["reference"]
    assert seen["value"]
    assert seen["value"] <= seen["reward"]
    assert [seen[f"{name} learns"] for name in ("policy", "reference", "value", "reward")] == [True, False, True, False]


def test_pretraining_goes_on_with_adapters(finished: Path, tmp_path: Path) -> None:
    out = copy_without(finished, tmp_path / "run", *ADAPTED)
    data = load_recipe(RECIPE).model_dump()
    stages = {
        spec["name"]: {"stage": spec["stage"], "reads": spec["reads"], **spec["settings"]} for spec in data["stages"]
    }
    kept = {name: stages[name] for name in ("corpus", "tokenizer", "tokenize", "ngram", "pretrain")}
    more = {**kept["pretrain"], "reads": {"start": "pretrain"}, "adapters": {"rank": 2}, "sample_every": 0}
    plan = build_recipe({"name": "more", "seed": 3, "stages": {**kept, "more": more}})
    report = pipeline.run(plan, out, detect("cpu", "fp32"), quiet=True)["more"]
    assert report["val_bpb"] > 0
    origin = adaptation(checkpoint.load(out / "more" / "model", merge=False).model)
    assert origin.base.resolve() == (out / "pretrain" / "model").resolve()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sft.adapters={rank: 0}", "greater than or equal to 1"),
        ("sft.adapters={targets: [querry]}", "querry"),
        ("pretrain.adapters={rank: 2}", "adapters need a model to start from"),
        ("reward.adapters={rank: 3, alpha: 8}", "has other adapters already"),
    ],
)
def test_mistakes_are_one_line(finished: Path, tmp_path: Path, override: str, words: str) -> None:
    out = copy_without(finished, tmp_path / "run", "reward", "ppo")
    with pytest.raises(UserError, match=words) as caught:
        run(out, override)
    assert "\n" not in str(caught.value)


def test_full_training_starts_from_the_merged_model(finished: Path, tmp_path: Path) -> None:
    out = copy_without(finished, tmp_path / "run", "reward", "ppo")
    pipeline.run(recipe("reward.adapters=null"), out, detect("cpu", "fp32"), until="reward", quiet=True)
    assert (out / "reward" / "model" / "model.safetensors").exists()


def test_frozen_weights_have_no_master(finished: Path) -> None:
    """No fp32 copy and no optimiser state of what doesn't learn; the tensors themselves are used and left as they are."""
    model = checkpoint.load(finished / "sft" / "model", dtype=torch.bfloat16, merge=False).model
    frozen = {name: p.data_ptr() for name, p in model.named_parameters() if not p.requires_grad}
    weights = Weights({"model": model}, torch.bfloat16)
    assert weights.masters.keys() == {f"model.{name}" for name in trained(model)}
    assert {master.dtype for master in weights.masters.values()} == {torch.float32}
    assert {name: p.data_ptr() for name, p in model.named_parameters() if not p.requires_grad} == frozen
    weights.close()
    assert {name: p.data_ptr() for name, p in model.named_parameters() if not p.requires_grad} == frozen
    assert {p.dtype for p in trained(model).values()} == {torch.float32}


def test_bf16_keeps_the_base_as_it_is(finished: Path, tmp_path: Path) -> None:
    """Frozen weights of bf16, adapters of fp32: what is written is fp32 and was learnt."""
    out = copy_without(finished, tmp_path / "run", "sft", "reward", "ppo")
    plan = recipe("sft.training.precision=bf16")
    pipeline.run(plan, out, detect("cpu", "fp32"), until="sft", quiet=True)
    tensors = load_file(out / "sft" / "model" / "adapter_model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    assert any(value.abs().max() > 1e-4 for name, value in tensors.items() if "lora_B" in name)
