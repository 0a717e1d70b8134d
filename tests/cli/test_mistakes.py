"""Mistakes in commands, recipes and settings: one line with the place and the way out, before any work."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from calls import TINY, CommandLine

from nestling.cli import app
from nestling.cli.runs import recipe_path

SETTINGS = [
    ("tokenizer.vocab_size=200", "tokenizer.vocab_size: must be greater than or equal to 257 (got 200)"),
    ("pretrain.model.d_model=33", "pretrain.model: d_model 33 is not divisible by n_heads 2; use d_model 32"),
    ("pretrain.model.d_modle=32", "pretrain.model.d_modle: unknown setting; did you mean 'd_model'?"),
    ("pretrain.model.architecture=qwen", "pretrain.model.architecture: nothing in model/architectures has this name"),
    ("pretrain.training.optimizer=adamm", "pretrain.training.optimizer: nothing in training/optimizers has this name"),
    ("pretrain.training.schedule=cosin", "did you mean 'cosine'?"),
    ("sft.training.learning_rate=-1", "sft.training.learning_rate: must be greater than 0 (got -1)"),
    ("pretrian.context=9", "--set pretrian.context: the recipe has no such stage; did you mean 'pretrain'?"),
    (
        "rankings.sources.0.source=wrld",
        "rankings.sources.0.source: nothing in corpus/sources has this name (got 'wrld')",
    ),
    (
        "rankings.sources.0.settings.cuont=5",
        "rankings.sources.0.settings.cuont: unknown setting; did you mean 'count'?",
    ),
    ("corpus.sources.1.weight=2", "--set corpus.sources.1.weight: the list has no place '1'; use 0 to 0"),
    ("evaluate.tasks.fact_recal={count: 3}", "did you mean 'fact_recall'?"),
    ("evaluate.tasks.fact_recall.cuont=3", "evaluate.tasks.fact_recall.cuont: unknown setting; did you mean 'count'?"),
    ("evaluate.world=null", "evaluate.world: the tasks ask for facts of a world"),
    ("ppo.reads.policy=sfft", "ppo.reads.policy: input not found (got 'sfft')"),
    ("ppo.stage=pppo", "ppo.stage: nothing in stages has this name (got 'pppo'); did you mean 'ppo'?"),
    ("pretrain.batch_rows.x=3", "no setting 'x' inside a plain value (got 4)"),
    ("pretrain.batch_rows", "--set: an override has the form key=value (got 'pretrain.batch_rows')"),
    ("pretrain.batch_rows=[", "--set pretrain.batch_rows: the value is not YAML in line 1"),
    ("corpus=5", "stages.corpus: a stage's settings must be a mapping (got 5)"),
    ("name=../elsewhere", "name: this can't be the name of a folder (got '../elsewhere')"),
    ("seed=x", "seed: must be a valid integer"),
]


@pytest.mark.parametrize(("override", "reason"), SETTINGS)
def test_a_bad_setting_is_refused_before_any_work(
    nestling: CommandLine, tmp_path: Path, override: str, reason: str
) -> None:
    assert reason in nestling.refused("run", TINY, "--out", tmp_path / "run", "--set", override)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("run", "dmeo"), "no such recipe (got 'dmeo'); did you mean 'demo'?"),
        (("run", TINY, "--until", "sftt"), "--until: the recipe has no such stage (got 'sftt'); did you mean 'sft'?"),
        (("run", TINY, "--text", "/no/such"), "--text: no such file or folder (got '/no/such')"),
        (("run", TINY, "--on-bad-row", "maybe"), "--on-bad-row: unknown policy (got 'maybe'); use stop or skip"),
        (("run", TINY, "--dtype", "int3"), "--dtype: unknown precision (got 'int3'); use auto, fp32, bf16, fp16"),
        (("run", TINY, "--device", "gpu"), "--device: unknown device (got 'gpu'); use auto, cpu, cuda or mps"),
        (("run", TINY, "--device", "cuda:99"), "--device: this machine has no such device (got 'cuda:99')"),
        (("run", TINY, "--threads", "0"), "invalid value for '--threads'"),
        (("run", TINY, "--bogus"), "no such option: --bogus"),
        (("frobnicate",), "no such command 'frobnicate'"),
        (("chat",), "missing argument 'MODEL'; nestling chat --help"),
        (
            ("corpus", "--sources", "[{source: world, settings: {size: huge}}]"),
            "corpus.sources.0.settings.size: must be",
        ),
    ],
)
def test_a_bad_command_is_refused(nestling: CommandLine, words: tuple[object, ...], reason: str) -> None:
    assert reason in nestling.refused(*words)


RECIPES = {
    "broken.yaml": (b"stages:\n  corpus: {a: 1\n  tokenizer: {}\n", "broken YAML in line 3, column 12"),
    "tab.yaml": (b"stages:\n\tcorpus: {}\n", "broken YAML in line 2, column 1: found character '\\t'"),
    "list.yaml": (b"- corpus\n", "a recipe needs a mapping `stages:`"),
    "bytes.yaml": (bytes(range(128, 256)), "this is not UTF-8 text"),
    "key.yaml": (b"seeed: 3\nstages: {corpus: {}}\n", "seeed: unknown setting; did you mean 'seed'?"),
    "stage.yaml": (b"stages: {corps: {}}\n", "corps.stage: nothing in stages has this name"),
    "order.yaml": (b"stages: {tokenizer: {}}\n", "tokenizer.reads.corpus: input not found"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_broken_recipe_is_refused(nestling: CommandLine, tmp_path: Path, name: str) -> None:
    content, reason = RECIPES[name]
    (tmp_path / name).write_bytes(content)
    assert reason in nestling.refused("run", tmp_path / name, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_is_no_recipe(nestling: CommandLine, tmp_path: Path) -> None:
    assert f"{tmp_path}: this is a folder, not a recipe" in nestling.refused("run", tmp_path)


def test_a_folder_hides_no_recipe_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora").mkdir()
    assert recipe_path("lora").name == "lora.yaml"


def test_a_folder_without_a_run_or_model_is_named(nestling: CommandLine, tmp_path: Path) -> None:
    assert f"{tmp_path}: not a run folder" in nestling.refused("report", tmp_path)
    for verb in ("chat", "generate"):
        assert f"{tmp_path}: no model here; name a run folder" in nestling.refused(verb, tmp_path)


def test_help_answers_without_torch(nestling: CommandLine) -> None:
    """The list of verbs costs no import of what they do; each verb's own help is complete."""
    listed = nestling("--help").out
    assert "Pre-train a base model on token shards" in listed
    assert "Talk to a model in the terminal" in listed
    assert "--training.learning-rate" in nestling("sft", "--help").out


@pytest.mark.parametrize(("verb", "fix"), [("run", "higher objective.microbatches"), ("serve", "fewer or shorter texts")])
def test_a_full_gpu_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str, fix: str
) -> None:
    def full(**_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB")

    monkeypatch.setattr(app, "build_app", lambda word: full)
    monkeypatch.setattr(sys, "argv", ["nestling", verb])
    with pytest.raises(SystemExit) as left:
        app.main()
    assert left.value.code == app.USER_ERROR
    said = capsys.readouterr().err
    assert said.startswith(f"error: CUDA out of memory. Tried to allocate 2.00 GiB; compute less at once: {fix}")
    assert said.count("\n") == 1
