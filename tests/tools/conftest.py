"""What the tests of tools share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sandboxes.arena import SECRET, Arena, complete

from nestling.tools import _sandbox


@pytest.fixture(params=_sandbox.WRAPPERS)
def arena(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Arena]:
    """One arena for each kind of sandbox that is complete on this machine; nothing of a call is left when it ends."""
    yield from _arena(request.param, tmp_path, monkeypatch)


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Arena]:
    """An arena with the sandbox that a user of this machine gets."""
    yield from _arena("auto", tmp_path, monkeypatch)


def _arena(wrapper: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Arena]:
    if not complete(wrapper):
        pytest.skip(f"no complete isolation with {wrapper} on this machine")
    here = Arena(tmp_path, wrapper)
    here.private.mkdir()
    here.outside.mkdir()
    (here.outside / "secret.txt").write_text(SECRET)
    monkeypatch.setattr(tempfile, "tempdir", str(here.private))
    monkeypatch.setenv("NESTLING_SECRET", SECRET)
    yield here
    assert here.processes() == [], "a process outlived its call"
    assert list(here.private.iterdir()) == [], "a private folder was left"
