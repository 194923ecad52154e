"""`diagnose`: one forward pass over the pictures, every number at every layer."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from keepsight.diagnosis.accumulate import Accumulator, Calibration
from keepsight.diagnosis.batches import DEFAULT_PROMPT, Decoded, Loader, render_prompt
from keepsight.diagnosis.data import Pictures, find_pictures
from keepsight.diagnosis.probe import fit_probes, probe_rows, stratified_split
from keepsight.diagnosis.summary import image_rows, spectrum_rows
from keepsight.results import Example, LoadedRun, Measurement, RunDirectory, fingerprint, prompt_hash, versions
from keepsight.vlm import Vlm, capture

EXAMPLES, EXAMPLE_SIDE = 6, 448
SAMPLE = 4096  # tokens of the spectrum's sample, at least; twice the width if that is more


@dataclass(frozen=True)
class Diagnosis:
    """The numbers of one model on one set of pictures.

    rows: the measurements; info: what made them (label, model, depth, prompt, seed, counts, …); config: the arguments;
    examples: a few of the pictures, for the report.
    """

    rows: list[Measurement]
    info: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)

    def table(self) -> Any:
        """A rich table of the rows."""
        from keepsight.report import table

        return table(self.rows)

    def report(self, path: str | Path) -> Path:
        """Write one HTML file."""
        from keepsight.report import build

        return build([LoadedRun(self.info["label"], self.rows, self.info, "", self.examples)], Path(path))

    def save(self, run_directory: str | Path, *, overwrite: bool = False) -> RunDirectory:
        """Write rows, run metadata, configuration and example pictures.

        Raises:
            FileExistsError: the folder holds a run already and `overwrite` is off.
            StorageError: it cannot be written.
        """
        model = self.info["model"]
        kept = ("depth", "width", "pre_layer", "prompt", "seed", "counts", "targets", "command", "family", "skipped")
        known = {name: self.info[name] for name in kept if name in self.info}
        run = RunDirectory.create(
            run_directory,
            label=self.info["label"],
            model=model["name"],
            fingerprint=model["fingerprint"],
            overwrite=overwrite,
            **known,
        )
        run.write_rows(self.rows)
        run.write_config(self.config)
        run.write_examples(self.examples)
        return run


def diagnose(
    model: nn.Module,
    processor: Any,
    images: Any,
    *,
    labels: Any = None,
    masks: Any = None,
    layers: str | Iterable[int | str] = "all",
    batch_size: int = 8,
    seed: int = 0,
    prompt: str = DEFAULT_PROMPT,
    skip_broken: bool = False,
    split_components: bool = False,
    exact: bool = False,
    calibration_images: int | None = None,
    targets: Mapping[str, str] | None = None,
    pre_layer: int | None = None,
    progress: bool = True,
    label_run: str = "model",
) -> Diagnosis:
    """Probes, patch structure and spectrum of every layer, in one forward pass over the pictures.

    Args:
        model: any model that `keepsight.vlm.Vlm` takes; its mode is left as it was.
        processor: its processor, with a chat template.
        images: a folder (a class per subfolder, or flat), a list of paths or PIL images, or a Hugging Face dataset.
        labels: one label per picture, or {target: labels}; None takes the subfolders or the dataset's class column.
            Without labels the probes are skipped.
        masks: folder of `<stem>.png`, or one uint8 array [H, W] (or None) per picture. Without masks
            the patch structure is skipped.
        layers: "all", or layers as `Vlm.resolve_layer` takes them.
        prompt: the text after the picture; causal models never see it, as the forward stops after the picture.
        skip_broken: leave pictures out that cannot be read, and count them.
        split_components: make objects of the connected parts of each mask value.
        exact: sum the spectrum's covariances over all tokens; the default takes a seeded sample of tokens.
            Memory: 10 · layers · width² · 8 bytes.
        calibration_images: size of the seeded subset that fixes mean, sinks and channels of each layer; one in
            sixteen pictures unless given, but 8 to 32.
        targets: label set → "asked" or "never asked", for the report.
        pre_layer: the layer PRe was trained at, for the report.
        label_run: what the report calls this run.

    Returns:
        The diagnosis. Nothing of it grows with the number of pictures: features go to a temporary folder.

    Raises:
        ValueError: bad pictures, masks, labels or layers; the text says which and what to do.
    """
    vlm = Vlm(model)
    pictures = find_pictures(images, labels, masks)
    chosen = _layers(vlm, layers)
    for target, values in pictures.labels.items():
        _check_labels(target, values)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")
    has_masks = any(item.mask is not None for item in pictures.items)
    rendered = render_prompt(processor, prompt)
    loader = Loader(vlm, processor, pictures.items, rendered, batch_size, seed, split_components, skip_broken)
    with tempfile.TemporaryDirectory(prefix="keepsight-") as folder, _inference(model):
        accumulator, done = measure(
            vlm, loader, chosen, Path(folder), exact=exact, calibration_images=calibration_images, progress=progress
        )
        rows = _probe_rows(vlm, accumulator, pictures, done, seed, progress)
        rows += _without_masks(image_rows(accumulator, seed=seed), has_masks, accumulator, seed)
        for position in _tracked(range(len(chosen)), "spectrum", progress):
            rows += spectrum_rows(accumulator, position, seed=seed)
    info = {
        "label": label_run,
        "versions": versions(),
        "model": {"name": str(getattr(vlm.config, "name_or_path", "")), "fingerprint": fingerprint(model)},
        "family": vlm.family,
        "depth": vlm.depth,
        "width": vlm.width,
        "pre_layer": pre_layer,
        "prompt": rendered,
        "prompt_sha256": prompt_hash(rendered),
        "seed": seed,
        "counts": {
            "images": len(done),
            "skipped images": len(loader.broken),
            "images with objects": accumulator.images_with_objects,
            "objects": accumulator.objects,
            "skipped objects": accumulator.skipped_objects,
        },
        "skipped": [loader.broken[index] for index in sorted(loader.broken)][:20],
        "targets": dict(targets or {}),
    }
    config = {
        "images": str(images) if isinstance(images, (str, Path)) else type(images).__name__,
        "masks": str(masks) if isinstance(masks, (str, Path)) else masks is not None,
        "layers": chosen,
        "batch_size": batch_size,
        "seed": seed,
        "prompt": prompt,
        "skip_broken": skip_broken,
        "split_components": split_components,
        "exact": exact,
        "calibration_images": calibration_images,
    }
    return Diagnosis(rows, info, config, _examples(pictures, done, split_components))


def measure(
    vlm: Vlm,
    loader: Loader,
    layers: Sequence[int],
    folder: Path,
    *,
    exact: bool = False,
    calibration_images: int | None = None,
    progress: bool = False,
) -> tuple[Accumulator, list[int]]:
    """The calibration pass and the main pass: the filled accumulator and the indices of the pictures it holds.

    Raises:
        ValueError: no picture could be read.
    """
    n = len(loader.pictures)
    size = min(n, calibration_images or min(32, max(8, n // 16)))
    subset = np.sort(np.random.default_rng([loader.seed, 5]).permutation(n)[:size])
    calibration, tokens, seen = Calibration(), 0, 0
    for decoded in loader.batches(subset.tolist(), masks=False):
        forward(vlm, decoded, layers, calibration.sink)
        tokens, seen = tokens + len(decoded.batch.image), seen + decoded.batch.n_images
    if not seen:
        raise ValueError(f"none of the {size} pictures of the calibration subset could be read; check the folder")
    loader.rate = min(1.0, max(SAMPLE, 2 * vlm.width) / (n * tokens / seen))
    accumulator = Accumulator(layers, vlm.width, calibration.finish(), folder, exact)
    done: list[int] = []
    total = -(-n // loader.batch_size)
    for decoded in _tracked(loader.batches(range(n), masks=True), "pictures", progress, total):
        accumulate(vlm, decoded, accumulator)
        done += decoded.indices
    return accumulator, done


def accumulate(vlm: Vlm, decoded: Decoded, accumulator: Accumulator) -> None:
    """One batch of the main pass."""
    accumulator.begin(decoded.batch.to(_device(vlm)))
    forward(vlm, decoded, accumulator.layers, accumulator.sink)
    accumulator.end()


def forward(vlm: Vlm, decoded: Decoded, layers: Sequence[int], sink: Any) -> None:
    """A forward without LM head and cache that hands each layer's visual tokens to `sink`."""
    device, dtype = _device(vlm), next(vlm.core.parameters()).dtype
    inputs = {
        name: value.to(device, dtype if value.is_floating_point() else None) if torch.is_tensor(value) else value
        for name, value in decoded.inputs.items()
    }
    with capture(vlm, layers, sink=sink):
        vlm.forward_core(**inputs)


def _device(vlm: Vlm) -> torch.device:
    return next(vlm.core.parameters()).device


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is back in the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _layers(vlm: Vlm, layers: str | Iterable[int | str]) -> list[int]:
    if layers == "all":
        return list(range(vlm.depth + 1))
    listed = [layers] if isinstance(layers, (str, int)) else list(layers)
    if not listed:
        raise ValueError('layers is empty; give "all" or at least one layer')
    return sorted({vlm.resolve_layer(layer) for layer in listed})


def _check_labels(target: str, values: Sequence[str | None]) -> None:
    """Fail before the forward pass, not after it."""
    try:
        stratified_split([value for value in values if value is not None], 0)
    except ValueError as error:
        raise ValueError(f"label set '{target}': {error}") from error


def _probe_rows(
    vlm: Vlm, accumulator: Accumulator, pictures: Pictures, done: list[int], seed: int, progress: bool
) -> list[Measurement]:
    if not pictures.labels:
        return [
            Measurement(
                "probe_accuracy", None, seed=seed, note="no labels: pictures in one flat folder have no classes"
            )
        ]
    rows: list[Measurement] = []
    for target, values in _tracked(pictures.labels.items(), "probes", progress):
        positions = [i for i, index in enumerate(done) if values[index] is not None]
        names = [str(values[done[i]]) for i in positions]

        def read(layer: int, positions: list[int] = positions) -> torch.Tensor:
            return torch.from_numpy(accumulator.pooled.read(accumulator.layers.index(layer))[positions])

        probe = fit_probes(read, accumulator.layers, names, seed=seed)
        rows += probe_rows(probe, target=target, middle=vlm.resolve_layer("middle"), seed=seed)
    return rows


def _without_masks(rows: list[Measurement], has_masks: bool, accumulator: Accumulator, seed: int) -> list[Measurement]:
    """Say why there is no patch structure, where there is none."""
    if has_masks and accumulator.objects:
        return rows
    why = "no object has two patches inside and one outside" if has_masks else "no masks were given"
    return [*rows, Measurement("gap", None, variant="raw", seed=seed, note=why)]


def _examples(pictures: Pictures, done: Sequence[int], split_components: bool) -> list[Example]:
    """A few pictures, evenly spread over the set; those with masks where there are any."""
    masked = [index for index in done if pictures.items[index].mask is not None] or list(done)
    spread = sorted({masked[round(i)] for i in np.linspace(0, len(masked) - 1, min(EXAMPLES, len(masked)))})
    found = []
    for index in spread:
        image, mask = pictures.items[index].open(split_components)
        image.thumbnail((EXAMPLE_SIDE, EXAMPLE_SIDE))
        if mask is not None:
            mask = np.asarray(Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST))
        caption = ", ".join(f"{values[index]}" for values in pictures.labels.values() if values[index] is not None)
        found.append(Example(image, mask, pictures.items[index].name, caption))
    return found


def _tracked(items: Iterable[Any], what: str, progress: bool, total: int | None = None) -> Iterable[Any]:
    """The items behind a progress bar with the time left."""
    if not progress:
        return items
    from rich.progress import track

    return track(items, description=what, total=total)
