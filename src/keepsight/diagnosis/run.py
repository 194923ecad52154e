"""`diagnose`: one forward pass over the pictures, every number at every layer."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from keepsight.diagnosis.accumulate import Accumulator
from keepsight.diagnosis.batches import DEFAULT_PROMPT, Loader
from keepsight.diagnosis.data import find_pictures
from keepsight.diagnosis.examples import choose_examples, open_examples
from keepsight.diagnosis.maps import similarity_maps
from keepsight.diagnosis.nulls import RANDOM_WEIGHTS, as_null, random_weights, wanted_nulls
from keepsight.diagnosis.passes import measure
from keepsight.diagnosis.probe import stratified_split
from keepsight.diagnosis.result import Diagnosis
from keepsight.diagnosis.rows import DEFAULT_METRICS, all_rows, open_lens, wanted_metrics
from keepsight.diagnosis.summary import too_small
from keepsight.results import Measurement, PerImage, PerImageBuilder, fingerprint, prompt_hash, versions
from keepsight.results.maps import SimilarityMap
from keepsight.vlm import Vlm
from keepsight.vlm.chat import render_prompt
from keepsight.vlm.inference import inference


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
    metrics: Sequence[str] = DEFAULT_METRICS,
    nulls: Sequence[str] = (),
    targets: Mapping[str, str] | None = None,
    pre_layer: int | None = None,
    progress: bool = True,
    label_run: str = "model",
) -> Diagnosis:
    """What every layer still holds of the pictures, in one forward pass over them.

    Args:
        model: any model that `keepsight.vlm.Vlm` takes; its mode is left as it was.
        processor: its processor, with a chat template.
        images: a folder (a class per subfolder, or flat), a list of paths or PIL images, or a Hugging Face dataset.
        labels: one label per picture, or {target: labels}; None takes the subfolders or the dataset's class columns.
            Without labels the probes are skipped.
        masks: folder of `<stem>.png`, or one uint8 array [H, W] (or None) per picture. Without masks
            the patch structure is skipped.
        layers: "all", or layers as `Vlm.resolve_layer` takes them.
        prompt: the text after the picture; causal models never see it, as the forward stops after the picture.
        skip_broken: leave pictures out that cannot be read, and count them.
        split_components: make objects of the connected parts of each mask value.
        exact: take all tokens where the default takes a seeded sample (spectrum, fidelity). They go to the temporary
            folder: 4 bytes · layers · width a token.
        calibration_images: size of the seeded subset that fixes mean, sinks and channels of each layer; one in
            sixteen pictures unless given, but 8 to 32.
        metrics: which groups of numbers: "probes", "structure", "bleeding", "spectrum", "fidelity", "lens", "maps".
            Norms, sinks and homogeneity are always there.
        nulls: null models that cost a diagnosis of their own: "random_weights", a language model of the same shape and
            random weights behind the same encoder and projector. Its rows have "random weights" in `variant`.
        targets: label set → "asked" or "never asked", for the report.
        pre_layer: the layer PRe was trained at, for the report.
        label_run: what the report calls this run.

    Returns:
        The diagnosis. Nothing of it grows with the number of pictures: features go to a temporary folder.

    Raises:
        ValueError: bad pictures, masks, labels or layers; the text says which and what to do.
    """
    vlm = Vlm(model)
    wanted, null_models = wanted_metrics(metrics), wanted_nulls(nulls)
    pictures = find_pictures(images, labels, masks if {"structure", "bleeding"} & set(wanted) else None)
    chosen = _layers(vlm, layers)
    for target, values in pictures.labels.items() if "probes" in wanted else ():
        _check_labels(target, values)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")
    if seed < 0:
        raise ValueError(f"seed is {seed}; allowed: 0 or more")
    for token in ("image_token", "boi_token"):
        if (placeholder := getattr(processor, token, None)) and placeholder in prompt:
            raise ValueError(
                f"the prompt {prompt[:60]!r} holds the image placeholder {placeholder!r}; give the text alone, the "
                "picture is put before it"
            )
    has_masks = any(item.mask is not None for item in pictures.items)
    rendered = render_prompt(processor, prompt)
    loader = Loader(vlm, processor, pictures.items, rendered, batch_size, seed, split_components, skip_broken)

    def look(vlm: Vlm, loader: Loader) -> tuple[list[Measurement], Accumulator, list[int], PerImage]:
        with tempfile.TemporaryDirectory(prefix="keepsight-") as folder, inference(vlm.model):
            accumulator, done = measure(
                vlm,
                loader,
                chosen,
                Path(folder),
                exact=exact,
                calibration_images=calibration_images,
                encoder="fidelity" in wanted,
                bleeding="bleeding" in wanted,
                progress=progress,
            )
            per_image = PerImageBuilder([pictures.items[index].name for index in done])
            rows = all_rows(
                vlm,
                loader,
                accumulator,
                wanted,
                pictures.labels,
                done,
                vlm.resolve_layer("middle"),
                per_image,
                seed=seed,
                has_masks=has_masks,
                unlabelled=pictures.unlabelled,
                progress=progress,
            )
        return rows, accumulator, done, per_image.finish()

    rows, accumulator, done, per_image = look(vlm, loader)
    shown = choose_examples(pictures, done)
    maps: list[SimilarityMap | None] = [None] * len(shown)
    if "maps" in wanted:
        with inference(model):
            read = open_lens(vlm, loader) if "lens" in wanted else None
            maps = similarity_maps(vlm, loader, shown, chosen, read=None if isinstance(read, str) else read)
    if "random_weights" in null_models:
        twin = Vlm(random_weights(vlm, seed))
        rows += as_null(look(twin, replace(loader, vlm=twin))[0], RANDOM_WEIGHTS)
    left_out = sum(len(too_small(values, done)) for values in pictures.labels.values() if "probes" in wanted)
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
            **({"classes left out of probes": left_out} if left_out else {}),
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
        "metrics": list(wanted),
        "nulls": list(null_models),
        "exact": exact,
        "calibration_images": calibration_images,
    }
    return Diagnosis(rows, info, config, open_examples(pictures, shown, split_components, maps), per_image)


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
