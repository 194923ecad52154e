"""Rows on the disk: what was put in and not committed is written over."""

from pathlib import Path

import numpy as np
import pytest
import torch

from keepsight.diagnosis.collect.store import LayerStore
from keepsight.results import StorageError


def test_rows_come_back_and_uncommitted_ones_do_not(tmp_path):
    store = LayerStore(tmp_path / "rows", 2, 3)
    first = torch.arange(12.0).view(2, 2, 3)
    store.append(first)
    store.put(0, torch.full((4, 3), 7.0))  # a batch that stops halfway: only one of the layers
    assert store.rows == 2
    again = -torch.arange(6.0).view(2, 1, 3)
    store.append(again)
    for layer in range(2):
        np.testing.assert_array_equal(store.read(layer), torch.cat([first[layer], again[layer]]))
        np.testing.assert_array_equal(
            store.gather(layer, np.array([2, 0])), torch.stack([again[layer, 0], first[layer, 0]])
        )
    np.testing.assert_array_equal(store.rows_of(1, np.array([2, 1]))[1:], first[1, 1:])
    store.append(torch.empty(2, 0, 3))
    assert store.rows == 3
    store.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_the_temporary_folders(tmp_path):
    store = LayerStore(tmp_path / "rows", 1, 3)
    store._files[0] = open("/dev/full", "wb", buffering=0)  # noqa: SIM115 - closed with the store
    with pytest.raises(
        StorageError, match=r"temporary folder '.*' cannot take .* \(No space left on device\); set TMPDIR"
    ):
        store.append(torch.ones(1, 2, 3))
    store.close()
