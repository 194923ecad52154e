"""`diagnose`: one forward pass over the pictures, every number at every layer."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from keepsight.diagnosis.accumulate import Accumulator
from keepsight.diagnosis.batches import DEFAULT_PROMPT, Loader
from keepsight.diagnosis.data import find_pictures
from keepsight.diagnosis.examples import choose_examples, open_examples
from keepsight.diagnosis.kept import TAKEN, open_kept
from keepsight.diagnosis.maps import similarity_maps
from keepsight.diagnosis.nulls import RANDOM_WEIGHTS, as_null, random_weights, wanted_nulls
from keepsight.diagnosis.passes import measure
from keepsight.diagnosis.prepare import check_labels, check_settings, chosen_layers, initial_encoder
from keepsight.diagnosis.pruning import check_prunings, pruning_rows
from keepsight.diagnosis.result import Diagnosis
from keepsight.diagnosis.rows import DEFAULT_METRICS, MASKED, all_rows, open_lens, wanted_metrics
from keepsight.diagnosis.selection import select
from keepsight.diagnosis.summary import too_small
from keepsight.processes import team
from keepsight.results import Measurement, PerImageBuilder, fingerprint, prompt_hash, versions
from keepsight.results.maps import SimilarityMap
from keepsight.vlm import Vlm
from keepsight.vlm.chat import render_prompt
from keepsight.vlm.inference import inference
from keepsight.vlm.pruning import Pruning


def diagnose(
    model: nn.Module,
    processor: Any,
    images: Any,
    *,
    labels: Any = None,
    masks: Any = None,
    mask_format: str = "index",
    mask_suffix: str | None = None,
    classes: Sequence[str] = (),
    limit: int | None = None,
    layers: str | Iterable[int | str] = "all",
    batch_size: int = 8,
    seed: int = 0,
    prompt: str = DEFAULT_PROMPT,
    skip_broken: bool = False,
    split_components: bool = False,
    exact: bool = False,
    calibration_images: int | None = None,
    metrics: str | Sequence[str] = DEFAULT_METRICS,
    nulls: str | Sequence[str] = (),
    initial: nn.Module | None = None,
    prunings: Sequence[Pruning] = (),
    targets: Mapping[str, str] | None = None,
    pre_layer: int | None = None,
    keep_features: str | Path | None = None,
    several_processes: bool = False,
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
        mask_format, mask_suffix: what the masks hold and what their names end in, see docs/data.md.
        classes: diagnose the pictures of these classes only.
        limit: diagnose at most so many, drawn with the seed evenly from the classes.
        layers: "all", or layers as `Vlm.resolve_layer` takes them.
        prompt: the text after the picture; causal models never see it, as the forward stops after the picture.
        skip_broken: leave pictures out that cannot be read, and count them.
        split_components: make objects of the connected parts of each mask value.
        exact: take all tokens where the default takes a seeded sample (spectrum, fidelity). They go to the temporary
            folder: 4 bytes · layers · width a token.
        calibration_images: size of the seeded subset that fixes mean, sinks and channels of each layer; one in
            sixteen pictures unless given, but 8 to 32.
        metrics: which groups of numbers: "probes", "structure", "objects", "bleeding", "spectrum", "fidelity", "lens",
            "maps"; or "all". Default: all but objects and bleeding. Norms, sinks and homogeneity are always there.
        nulls: null models that cost a diagnosis of their own: "random_weights", a language model of the same shape and
            random weights behind the same encoder and projector. Its rows have "random weights" in `variant`.
        initial: the checkpoint that the training of a trainable vision encoder began with: fidelity then predicts *its*
            encoder's output, the same for every run that began there. None: the model's own encoder.
        prunings: probe the middle and the last layer also when visual tokens are pruned on the way (rows
            `probe_accuracy_pruned`); each takes a forward over the pictures.
        targets: label set → "asked" or "never asked", for the report.
        pre_layer: the layer PRe was trained at, for the report.
        keep_features: a folder for what is taken from the model: 4 bytes · layers · width a picture and a sampled
            token. A diagnosis that was stopped goes on from it; one with other labels or metrics of the same features
            needs no forward for them.
        several_processes: share the pictures out over the processes that torchrun started; each must call this, and
            each gets the diagnosis.
        label_run: what the report calls this run.

    Returns:
        The diagnosis. Nothing of it grows with the number of pictures: features go to a temporary folder.

    Raises:
        ValueError: bad pictures, masks, labels or layers; the text says which and what to do.
        RuntimeError: another process failed (`several_processes`).
        StorageError: `keep_features` cannot be written.
    """
    vlm = Vlm(model)
    wanted, null_models = wanted_metrics(metrics), wanted_nulls(nulls)
    prunings, members = check_prunings(vlm, prunings), team(several_processes)
    masks = masks if set(MASKED) & set(wanted) or keep_features is not None else None
    pictures = select(find_pictures(images, labels, masks, mask_format, mask_suffix), classes, limit, seed)
    chosen = chosen_layers(vlm, layers)
    for target, values in pictures.labels.items() if "probes" in wanted else ():
        check_labels(target, values)
    check_settings(processor, prompt, batch_size, seed)
    has_masks = any(item.mask is not None for item in pictures.items)
    rendered = render_prompt(processor, prompt)
    loader = Loader(vlm, processor, pictures.items, rendered, batch_size, seed, split_components, skip_broken)
    encoder = initial_encoder(initial, vlm)
    how: dict[str, Any] = {
        "batch_size": batch_size,
        "seed": seed,
        "exact": exact,
        "calibration_images": calibration_images,
        "skip_broken": skip_broken,
        "split_components": split_components,
        "mask_format": mask_format,
    }
    config = {
        **how,
        "images": str(images) if isinstance(images, (str, Path)) else type(images).__name__,
        "masks": str(masks) if isinstance(masks, (str, Path)) else masks is not None,
        "mask_suffix": mask_suffix,
        "classes": list(classes),
        "limit": limit,
        "layers": chosen,
        "prompt": prompt,
        "metrics": list(wanted),
        "nulls": list(null_models),
        "prunings": [asdict(pruning) for pruning in prunings],
        "processes": members.size,
    }

    def look(vlm: Vlm, loader: Loader, name: str) -> tuple[list[Measurement], Accumulator, list[int], PerImageBuilder]:
        """In the first process rows of all pictures, in the others none; `name`: where features are kept."""
        kept, taken = None, {group: group in wanted for group in TAKEN}
        if keep_features is not None:
            kept = members.together(
                partial(open_kept, Path(keep_features) / name, vlm, encoder, loader, chosen, taken, how)
            )
            taken = kept.taken
        with tempfile.TemporaryDirectory(prefix="keepsight-") as folder, inference(vlm.model):
            accumulator, done = measure(
                vlm,
                loader,
                chosen,
                Path(folder),
                exact=exact,
                calibration_images=calibration_images,
                encoder=(vlm if encoder is None else encoder) if taken["fidelity"] else None,
                bleeding=taken["bleeding"],
                by_object=taken["objects"],
                progress=progress and members.first,
                team=members,
                kept=kept,
            )
            per_image = PerImageBuilder([pictures.items[index].name for index in done])
            rows = members.together(
                lambda: (
                    all_rows(
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
                    if members.first
                    else []
                )
            )
        return rows, accumulator, done, per_image

    rows, accumulator, done, per_image = look(vlm, loader, "model")
    untrained: list[Measurement] = []
    if "random_weights" in null_models:
        twin = Vlm(random_weights(vlm, seed))
        untrained = as_null(look(twin, replace(loader, vlm=twin), "random_weights")[0], RANDOM_WEIGHTS)

    def finish() -> Diagnosis | None:
        if not members.first:
            return None
        shown = choose_examples(pictures, done)
        maps: list[SimilarityMap | None] = [None] * len(shown)
        pruned: list[Measurement] = []
        with inference(model):
            if "maps" in wanted:
                read = open_lens(vlm, loader) if "lens" in wanted else None
                maps = similarity_maps(vlm, loader, shown, chosen, read=None if isinstance(read, str) else read)
            if prunings:
                pruned = pruning_rows(
                    vlm, loader, prunings, pictures.labels, done, per_image, seed=seed, progress=progress
                )
        left_out = sum(len(too_small(values, done)) for values in pictures.labels.values() if "probes" in wanted)
        rare = {
            "animated images, first frame taken": len(loader.seen.animated),
            "repeated images": pictures.repeated,
            "classes left out of probes": left_out,
        }
        broken = loader.seen.broken
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
                "skipped images": len(broken),
                "images with objects": accumulator.images_with_objects,
                "objects": accumulator.objects,
                "skipped objects": accumulator.skipped_objects,
                **{name: count for name, count in rare.items() if count},
            },
            "skipped": [broken[index] for index in sorted(broken)][:20],
            "targets": dict(targets or {}),
        }
        examples = open_examples(pictures, shown, split_components, maps)
        return Diagnosis(rows + pruned + untrained, info, config, examples, per_image.finish())

    result = members.from_first(members.together(finish))
    assert result is not None
    return result
