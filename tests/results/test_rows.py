"""Rows: what a Measurement accepts, and files that are whole or not there."""

import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from keepsight.results import Measurement, StorageError, read_rows, write_rows
from keepsight.results import storage as storage_module

ROWS = [
    Measurement("gap", 0.25, layer=4, low=0.2, high=0.3, n=12, unit="objects", variant="centred", seed=3),
    Measurement("probe_accuracy", 0.5, layer=0, target="Größe <b>", note="ünïcode"),
    Measurement("contrast", None, layer=1, note="coupling is near zero"),
]


def test_rows_come_back_as_they_went(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    assert read_rows(path) == ROWS
    first = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    assert first["metric"] == "gap"
    assert first["layer"] == 4
    assert first["tokens"] == "all"
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -np.inf, torch.tensor(float("nan"))])
def test_a_value_that_is_not_finite_becomes_none_with_a_note(value: float) -> None:
    row = Measurement("gap", value, low=float("nan"), high=1.0)
    assert row.value is None
    assert row.low is None
    assert row.high == 1.0
    assert row.note == f"not a finite number: {float(value)}"
    assert Measurement("gap", value, note="layer 3").note.startswith("layer 3; not a finite number")


def test_array_scalars_become_plain_numbers(tmp_path: Path) -> None:
    row = Measurement("gap", np.float32(0.5), layer=np.int64(2), n=torch.tensor(7), low=torch.tensor(0.25))
    assert type(row.value) is float
    assert type(row.layer) is int
    assert type(row.n) is int
    assert read_rows(write_rows(tmp_path / "r.jsonl", [row])) == [Measurement("gap", 0.5, layer=2, n=7, low=0.25)]


def test_a_missing_value_needs_a_reason() -> None:
    with pytest.raises(ValueError, match="'gap' without a value needs a note that says why"):
        Measurement("gap", None)
    with pytest.raises(ValueError, match="needs a metric name"):
        Measurement("", 1.0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"metric": "gap", "value": 1, "colour": "red"}', r"rows.jsonl:2: unknown fields \['colour'\]; allowed are"),
        ('{"metric": "gap"}', r"rows.jsonl:2: the fields \['value'\] are missing"),
        ('{"metric": "gap", "val', r"rows.jsonl:2: this line is not JSON .* cut off or edited"),
        ('{"metric": "gap", "value": 1, "layer": "3"}', "field 'layer' is \"3\"; allowed is int or null"),
        ('{"metric": "gap", "value": true}', "field 'value' is true; allowed is float or null or int"),
        ('{"metric": "gap", "value": null}', "rows.jsonl:2: a Measurement of 'gap' without a value needs a note"),
        ("[1, 2]", "rows.jsonl:2: expected an object"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"metric": "gap", "value": 1}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_rows(path)


def test_missing_rows_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no rows at '.*nowhere.jsonl'"):
        read_rows(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_keeps_the_old_rows_and_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS[:1])

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage_module.os, call, full)
    with pytest.raises(StorageError, match=r"cannot write '.*rows.jsonl': the disk is full: free some space") as error:
        write_rows(path, ROWS)
    monkeypatch.undo()
    assert error.value.errno == errno.ENOSPC
    assert read_rows(path) == ROWS[:1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.jsonl"]


def test_the_kernel_refusing_a_write_midway_leaves_nothing(tmp_path: Path) -> None:
    """A real failure inside write(2): the process may not make files above 4 KiB."""
    script = textwrap.dedent(
        f"""
        import resource
        from pathlib import Path
        from keepsight.results import Measurement, StorageError, write_rows
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            write_rows(Path({str(tmp_path)!r}) / "rows.jsonl", [Measurement("gap", 0.1)] * 1000)
        except StorageError as error:
            print(error)
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "rows.jsonl': the file-size limit is reached" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_device_without_space_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's own ENOSPC, through a temporary file that is /dev/full."""
    real_open = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode="r", **kw: real_open(Path("/dev/full"), "wb", **kw))
    with pytest.raises(StorageError, match="the disk is full"):
        write_rows(tmp_path / "rows.jsonl", ROWS)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot write '.*gone/rows.jsonl': the folder does not exist: create it"):
        write_rows(tmp_path / "gone" / "rows.jsonl", ROWS)
