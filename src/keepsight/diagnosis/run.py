"""`diagnose`: one forward pass over the pictures, every number at every layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from keepsight.diagnosis.collect.batches import DEFAULT_PROMPT, Loader
from keepsight.diagnosis.data.pictures import find_pictures
from keepsight.diagnosis.data.selection import select
from keepsight.diagnosis.examples import open_examples
from keepsight.diagnosis.nulls import RANDOM, wanted_nulls
from keepsight.diagnosis.prepare import check_labels, check_settings, chosen_layers, initial_encoder
from keepsight.diagnosis.pruning import check_prunings
from keepsight.diagnosis.result import Diagnosis
from keepsight.diagnosis.rows import DEFAULT_METRICS, MASKED, wanted_metrics
from keepsight.diagnosis.study import Study
from keepsight.processes import team as team_of
from keepsight.vlm import Vlm
from keepsight.vlm.chat import render_prompt
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
        exact: take all tokens where the default takes a seeded sample (spectrum, fidelity, lens). They go to the
            temporary folder: 4 bytes · layers · width a token.
        calibration_images: size of the seeded subset that fixes mean, sinks and channels of each layer; one in
            64 pictures unless given, but 8 to 32.
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
    vlm, team = Vlm(model), team_of(several_processes)
    wanted, null_models, prunings = wanted_metrics(metrics), wanted_nulls(nulls), check_prunings(vlm, prunings)
    found = find_pictures(images, labels, masks, mask_format, mask_suffix)  # which also tells masks from pictures
    if not set(MASKED) & set(wanted) and keep_features is None:
        masks, found = None, found.without_masks()
    pictures = select(found, classes, limit, seed)
    chosen = chosen_layers(vlm, layers)
    for target, values in pictures.labels.items() if "probes" in wanted else ():
        check_labels(target, values, selected=len(pictures) < len(found))
    check_settings(processor, prompt, batch_size, seed)
    how: dict[str, Any] = {
        "batch_size": batch_size,
        "seed": seed,
        "exact": exact,
        "calibration_images": calibration_images,
        "skip_broken": skip_broken,
        "split_components": split_components,
        "mask_format": mask_format,
    }
    rendered = render_prompt(processor, prompt)
    loader = Loader(vlm, processor, pictures.items, rendered, batch_size, seed, split_components, skip_broken)
    folder = None if keep_features is None else Path(keep_features)
    encoder = initial_encoder(initial, vlm)
    study = Study(pictures, chosen, wanted, how, encoder, folder, team, progress)

    looked = study.look(loader, "model")
    untrained = study.untrained_rows(loader) if RANDOM in null_models else []

    def finish() -> Diagnosis:
        maps = study.maps(loader, looked)
        pruned = study.pruned_rows(loader, looked, prunings)
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
            "processes": team.size,
        }
        info = {"label": label_run, "pre_layer": pre_layer, "targets": dict(targets or {})}
        info |= study.information(loader, looked)
        examples = open_examples(pictures, list(maps), split_components, list(maps.values()))
        return Diagnosis(looked.rows + pruned + untrained, info, config, examples, looked.per_image.finish())

    result = team.from_first(team.together(lambda: finish() if team.first else None))
    assert result is not None
    return result
