"""What a diagnosis took from the model, kept in a folder: to go on from, or to diagnose again without a forward."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from safetensors import SafetensorError, safe_open

from keepsight.diagnosis.collect.batches import Loader
from keepsight.diagnosis.collect.calibrate import LayerCalibration
from keepsight.diagnosis.collect.record import Record
from keepsight.diagnosis.data.pictures import Picture
from keepsight.results import fingerprint, make_folder, prompt_hash
from keepsight.results.storage import write_file
from keepsight.vlm import Vlm

FORMAT = 2  # of the records; the first had no mean tokens without sinks
MANIFEST, CALIBRATION = "manifest.json", "calibration.safetensors"
TAKEN = ("fidelity", "objects", "bleeding")  # groups whose values are taken in the forward, or not
TENSORS = ("mean", "mean_without_sinks", "channels")


class Kept:
    """A folder of records, one file a batch, and the manifest that says what they are of.

    Args:
        folder: made if it is not there.
        manifest: everything that the records depend on, plain JSON.
        taken: for each group in `TAKEN` whether it is wanted.

    Attributes:
        taken: whether the records have it: as wanted, or more where the folder was made for more.

    Raises:
        ValueError: the folder keeps the records of another diagnosis, or in another format; the text says what differs.
        StorageError: it cannot be written.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], taken: dict[str, bool]) -> None:
        self.folder = folder
        self.taken = taken
        wanted = json.loads(json.dumps({"format": FORMAT} | manifest | taken))
        path = folder / MANIFEST
        # Looked at before the manifest, which another process may be writing: what it adds comes after its manifest.
        occupied = folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir())
        if path.is_file():
            there = _read_manifest(path)
            if (old := there.get("format", 1)) != FORMAT:
                raise ValueError(
                    f"'{folder}' keeps features in the format of another version of keepsight ({old}; this one's is "
                    f"{FORMAT}); choose another folder, or delete it"
                )
            self.taken = {name: bool(there.get(name)) for name in taken}
            wanted |= {name: True for name in taken if self.taken[name]}
            # What was kept until a broken picture ended the work holds none: it is what leaving them out would give.
            laxer = (there.get("skip_broken"), wanted.get("skip_broken")) == (False, True)
            _compare(folder, there | {"skip_broken": True} if laxer else there, wanted)
            if laxer:
                write_file(path, json.dumps(wanted, indent=1))
        elif occupied:
            raise ValueError(f"'{folder}' is not empty and keeps no features of a diagnosis; choose another folder")
        else:
            make_folder(folder)
            write_file(path, json.dumps(wanted, indent=1))

    def batches(self) -> set[int]:
        """The numbers of the batches that are kept whole."""
        return {int(path.stem.partition("-")[2]) for path in self.folder.glob("batch-*.safetensors")}

    def save(self, number: int, record: Record) -> None:
        """Keep a batch.

        Raises:
            StorageError: it cannot be written.
        """
        write_file(self._file(number), record.to_bytes())

    def load(self, number: int) -> Record:
        """A batch that is kept.

        Raises:
            ValueError: its file is damaged.
        """
        path = self._file(number)
        try:
            return Record.from_file(str(path))
        except (SafetensorError, KeyError, TypeError, ValueError) as cause:
            raise ValueError(f"'{path}' is damaged ({cause}); delete it, and its pictures are run again") from cause

    def _file(self, number: int) -> Path:
        return self.folder / f"batch-{number:07d}.safetensors"

    def save_calibration(self, calibration: dict[int, LayerCalibration], tokens: float) -> None:
        """Keep the calibration, and how many tokens an image has on average."""
        tensors = {f"{layer}.{name}": getattr(one, name) for layer, one in calibration.items() for name in TENSORS}
        rest = {
            str(layer): {"threshold": one.threshold, "has_sinks": one.has_sinks} for layer, one in calibration.items()
        }
        said = {"layers": json.dumps(rest), "tokens": json.dumps(tokens)}
        content = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        write_file(self.folder / CALIBRATION, safetensors.torch.save(content, said))

    def load_calibration(self) -> tuple[dict[int, LayerCalibration], float] | None:
        """What was kept, None before that."""
        path = self.folder / CALIBRATION
        if not path.is_file():
            return None
        with safe_open(str(path), "pt") as file:
            said = file.metadata()
            found = {
                int(layer): LayerCalibration(**{name: file.get_tensor(f"{layer}.{name}") for name in TENSORS}, **rest)
                for layer, rest in json.loads(said["layers"]).items()
            }
            return found, json.loads(said["tokens"])


def open_kept(
    folder: Path,
    vlm: Vlm,
    encoder: Vlm | None,
    loader: Loader,
    layers: list[int],
    taken: dict[str, bool],
    how: dict[str, Any],
) -> Kept:
    """The folder of the features that this model gives for the loader's pictures; `how`: the other settings.

    Raises:
        ValueError, StorageError: as `Kept`.
    """
    manifest = {
        "model": fingerprint(vlm.model),
        "initial": None if encoder is None else fingerprint(encoder.model),
        "processor": _image_settings(loader.processor),
        "prompt": prompt_hash(loader.prompt),
        "layers": layers,
        **how,
        "pictures": [identity(item) for item in loader.pictures],
    }
    return Kept(folder, manifest, taken)


def _image_settings(processor: Any) -> int:
    """A checksum of how the processor makes pixels of pictures; 0 where it does not say."""
    settings = getattr(getattr(processor, "image_processor", None), "to_json_string", str)()
    return zlib.crc32(settings.encode())


def identity(picture: Picture) -> list[list[Any]]:
    """Name and size of the files of a picture and of its mask (and when they were changed), or a checksum."""
    return [[picture.name], *(_identity(source) for source in (picture.source, picture.mask))]


def _identity(source: Any) -> list[Any]:
    if callable(source):
        try:
            source = source()
        except (OSError, ValueError) as error:
            return [str(error)]
    if source is None:
        return []
    if isinstance(source, Path):
        if not source.is_file():
            return [str(source)]
        stat = source.stat()
        return [str(source), stat.st_size, stat.st_mtime_ns]
    if not isinstance(source, bytes):
        source = (np.asarray(source) if isinstance(source, list) else source).tobytes()
    return [zlib.crc32(source)]


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as cause:
        raise ValueError(f"'{path}' is damaged ({cause}); delete the folder, and its pictures are run again") from cause


def _compare(folder: Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in sorted({*there, *wanted}):
        old, new = there.get(name), wanted.get(name)
        if old == new:
            continue
        told = f"{name} were other ones" if isinstance(new, list) and name == "pictures" else f"{name}: {old} → {new}"
        raise ValueError(
            f"'{folder}' keeps the features of another diagnosis ({told}); choose another folder for this one, or "
            "delete it"
        )
