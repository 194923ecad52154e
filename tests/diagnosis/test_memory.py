import ctypes
import sys

import pytest
import torch

from keepsight.diagnosis.memory import _trim, give_back


def resident() -> int:
    """Bytes."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.skipif(not sys.platform.startswith("linux") or _trim() is None, reason="needs glibc")
def test_holes_are_given_back():
    """Blocks of 64 kB, below what glibc maps apart; every tenth stays, so that none of the heap's end is free."""
    blocks = [torch.ones(1 << 14) for _ in range(1000)]
    del blocks[::10]
    before = resident()
    kept = blocks[::9]
    del blocks
    give_back()
    assert before - resident() > 40e6
    assert all(bool((block == 1).all()) for block in kept)


def test_other_c_libraries_have_none(monkeypatch):
    class Musl:
        pass

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Musl())
    _trim.cache_clear()
    try:
        assert _trim() is None
        give_back()
    finally:
        _trim.cache_clear()
