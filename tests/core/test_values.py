"""Value types, random streams, metrics files."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nestling.core.errors import UserError
from nestling.core.metrics import MetricsLog, Progress, read_metrics
from nestling.core.registry import find
from nestling.core.runtime import detect, measured_peak, stream_seed, torch_stream
from nestling.core.types import Conversation, PromptRow, Ranking


def test_openai_tool_calls_round_trip() -> None:
    call = {"type": "function", "function": {"name": "calculator", "arguments": '{"expression": "1 + 2"}'}}
    row = {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}], "tools": ["calculator"]}
    read = Conversation.from_row(row)
    assert read.messages[0].tool_calls[0].arguments == {"expression": "1 + 2"}
    assert read.to_row()["messages"][0]["tool_calls"] == [call]
    assert Conversation.from_row(read.to_row()) == read


def test_tools_are_names_or_definitions() -> None:
    definition = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    row = {"messages": [{"role": "user", "content": "1 + 2?"}], "tools": ["calculator", definition]}
    assert Conversation.from_row(row).to_row() == row
    asked = {"prompt": row["messages"], "meta": {"tools": [definition]}}
    assert PromptRow.from_row(asked).tools == (definition,)
    assert PromptRow.from_row(asked).offering(["add"]).to_row()["meta"] == {"tools": ["add"]}
    for bad in ({"name": "add"}, {"function": {"name": 3}}, 3):
        with pytest.raises(UserError, match="a tool is its name, or"):
            Conversation.from_row({**row, "tools": [bad]})
        with pytest.raises(UserError, match="a tool is its name, or"):
            PromptRow.from_row({**asked, "meta": {"tools": [bad]}})


def test_rankings_by_rank_and_by_score_agree() -> None:
    prompt = [{"role": "user", "content": "Hi"}]
    ranked = Ranking.from_row(
        {"prompt": prompt, "responses": [{"content": "a", "rank": 2}, {"content": "b", "rank": 1}]}
    )
    assert [r.value for r in ranked.responses] == [-2, -1]
    with pytest.raises(UserError, match="neither score nor rank"):
        Ranking.from_row({"prompt": prompt, "responses": [{"content": "a"}, {"content": "b"}]})


def test_streams_are_named_and_repeatable() -> None:
    first, again = torch_stream(1, "data"), torch_stream(1, "data")
    assert torch.equal(torch.rand(4, generator=first), torch.rand(4, generator=again))
    assert (
        len({stream_seed(1, "a", "b"), stream_seed(1, "ab"), stream_seed(2, "a", "b"), stream_seed(1, "b", "a")}) == 4
    )


def test_metrics_drop_rows_that_a_resume_repeats(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 1.0 / step})
    log.write({"step": 4, "loss": math.nan})
    log.close()
    path.write_text(path.read_text() + '{"step": 5, "lo')
    MetricsLog(path, from_step=2).close()
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


def test_an_unknown_name_lists_the_folder() -> None:
    with pytest.raises(UserError, match="did you mean 'cosine'"):
        find("training.schedules", "cosin")


def test_the_peak_is_a_plausible_speed() -> None:
    here = detect("cpu", "fp32")
    assert 1e8 < measured_peak(here, size=256, seconds=0.05) < 1e15
    assert 1e6 < measured_peak(replace(here, dtype=torch.float8_e4m3fn), size=256, seconds=0.05) < 1e15


def test_unknown_devices_and_precisions_are_refused() -> None:
    with pytest.raises(UserError, match="unknown device"):
        detect(device="abacus")
    with pytest.raises(UserError, match="unknown precision"):
        detect(dtype="fp12")


def test_a_line_of_progress_comes_soon_and_then_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Progress, "FIRST_LINE", 0.0)
    with Progress("pretrain", 10, "steps") as progress:
        for _ in range(5):
            progress.advance(loss=2.0)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("pretrain: 1/10 steps  loss 2")


@pytest.mark.parametrize("name", ["gpu", "cpu:x", "cuda:99", "cpu:1"])
def test_a_device_that_is_not_here_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"^--device: "):
        detect(name)
