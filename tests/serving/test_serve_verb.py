"""`nestling serve` as people start it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest

from nestling.cli.serve import KEY_VARIABLE, _keys, serve
from nestling.core.errors import UserError
from nestling.model import checkpoint
from nestling.serving.settings import Key


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory) -> Path:
    """The tiny model as a checkpoint folder."""
    place = tmp_path_factory.mktemp("served") / "tiny"
    checkpoint.save(place, model, tokenizer, {"stage": "test"})
    return place


def test_it_serves_until_ctrl_c(folder, tmp_path):
    """The address is told, OpenAI's client works with the key of the environment, Ctrl-C ends it with 130."""
    command = [
        str(Path(sys.executable).with_name("nestling")),
        "serve",
        f"mine={folder}",
        "--port",
        "0",
        "--tool",
        "calculator",
    ]
    environment = os.environ | {"NESTLING_API_KEY": "sk-one", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment) as process:
        assert process.stderr is not None
        address = re.match(r"http://127\.0\.0\.1:\d+", process.stderr.readline())
        assert address, process.stderr.read()
        client = openai.OpenAI(base_url=f"{address[0]}/v1", api_key="sk-one", max_retries=5)
        assert [one.id for one in client.models.list()] == ["mine"]
        asked = [{"role": "user", "content": "What is 2 + 3?"}]
        reply = client.chat.completions.create(model="mine", messages=asked, temperature=0)
        assert reply.choices[0].message.content == "It is 5."
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
    assert (tmp_path / "nestling.db").exists()


def test_a_run_is_shown_before_it_has_a_model(tmp_path):
    """Its state is told; what needs a model says that there is none."""
    (tmp_path / "runs" / "early").mkdir(parents=True)
    (tmp_path / "runs" / "early" / "recipe.json").write_text('{"name": "early", "stages": [{"name": "corpus"}]}')
    command = [str(Path(sys.executable).with_name("nestling")), "serve", "runs/early", "--port", "0", "--store", "none"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment) as process:
        assert process.stderr is not None
        assert "no model yet" in process.stderr.readline()
        address = re.match(r"http://127\.0\.0\.1:\d+", process.stderr.readline())
        assert address, process.stderr.read()
        told = [httpx.get(f"{address[0]}{path}").json()["data"] for path in ("/api/runs", "/v1/models")]
        refused = httpx.post(f"{address[0]}/tokenize", json={"prompt": "a"})
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
    assert [(run["name"], run["state"]) for run in told[0]] == [("early", "stopped")]
    assert told[1] == []
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_model")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ["nowhere"]}, "no model here"),
        ({"models": None}, "what is to be served"),
        ({"models": None, "runs": Path("nowhere")}, "no such folder"),
        ({"host": "0.0.0.0"}, "without a key"),
        ({"tool": ["spoon"]}, "spoon"),
        ({"key_file": "keys.txt"}, "not a name and a key"),
        ({"config": "wrong.yaml"}, "did you mean 'rows'"),
        ({"models": ["{folder}", "tiny={folder}"]}, "two models have the same name"),
        ({"models": ["auto={folder}"]}, "belongs to the router"),
    ],
)
def test_mistakes_are_told_in_one_line(folder, tmp_path, monkeypatch, options, message):
    """Before anything is served."""
    monkeypatch.chdir(tmp_path)
    Path("keys.txt").write_text("ann\n")
    Path("wrong.yaml").write_text("row: 3\n")
    given = {name: Path(value) if name in ("key_file", "config") else value for name, value in options.items()}
    models = [name.format(folder=folder) for name in given.pop("models", [str(folder)]) or []]
    with pytest.raises(UserError, match=message) as caught:
        serve(models, store="none", **given)
    assert "\n" not in str(caught.value)


def test_keys_come_from_a_file_and_the_environment(tmp_path, monkeypatch):
    """Training runs are for the keys that say so, and for the one of the environment."""
    (tmp_path / "keys.txt").write_text("# name key\nann a\n\nbob b runs\n")
    monkeypatch.setenv(KEY_VARIABLE, "mine")
    found = [Key(**row) for row in _keys(tmp_path / "keys.txt")]
    told = [(key.name, key.secret.get_secret_value(), key.runs) for key in found]
    assert told == [("ann", "a", False), ("bob", "b", True), ("default", "mine", True)]


def test_a_taken_port_is_told(folder):
    """With the way out."""
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="choose another port"):
        serve([str(folder)], port=taken.getsockname()[1], store="none")
