"""Fetching: only the pinned file is read, and a part is whole or not there."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from tests.real import fetch


def test_a_file_with_another_hash_is_refused(tmp_path):
    wheel = fetch.Wheel("thing==1", "thing-1-py3-none-any.whl", hashlib.sha256(b"pinned").hexdigest())
    (tmp_path / wheel.file).write_bytes(b"changed")
    found = hashlib.sha256(b"changed").hexdigest()
    with pytest.raises(RuntimeError, match=rf"has SHA-256 {found}, pinned is {wheel.sha256}.*fetch again"):
        fetch._wheel(tmp_path, wheel)
    (tmp_path / wheel.file).write_bytes(b"pinned")
    assert fetch._wheel(tmp_path, wheel) == tmp_path / wheel.file


def test_a_fetched_file_with_another_hash_never_reaches_the_cache(tmp_path, monkeypatch):
    wheel = fetch.Wheel("thing==1", "thing-1-py3-none-any.whl", "0" * 64)
    monkeypatch.setattr(fetch, "_run", lambda command, folder: (folder / wheel.file).write_bytes(b"half a whe"))
    with pytest.raises(RuntimeError, match="pinned is 0000"):
        fetch._wheel(tmp_path, wheel)
    assert list(tmp_path.iterdir()) == []
    other = replace(wheel, file="thing-2-py3-none-any.whl")
    with pytest.raises(RuntimeError, match=r"pip gave \['thing-1-py3-none-any.whl'\] for thing==1, pinned is thing-2"):
        fetch._wheel(tmp_path, other)


def test_a_part_is_whole_or_not_there_and_built_once(tmp_path):
    target, built = tmp_path / "part", []

    def stops_halfway(out: Path) -> None:
        (out / "first").write_text("1")
        raise KeyboardInterrupt

    def build(out: Path) -> None:
        built.append(out)
        (out / "first").write_text("1")

    with pytest.raises(KeyboardInterrupt):
        fetch._whole(target, stops_halfway)
    assert list(tmp_path.iterdir()) == []
    assert fetch._whole(target, build) == fetch._whole(target, build) == target
    assert len(built) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["part"]


def test_the_error_of_a_failing_command_is_shown(tmp_path):
    with pytest.raises(RuntimeError, match=r"`ls nowhere` failed \(\d\): .*nowhere"):
        fetch._run(["ls", "nowhere"], tmp_path)
