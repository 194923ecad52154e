"""`keepsight diagnose MODEL --images DIR`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from keepsight.settings import read_command


@dataclass(frozen=True)
class DiagnoseConfig:
    """What is measured, on what.

    Attributes:
        model: directory in transformers format, folder of a `keepsight train` run, or hub id (the first argument).
        images: folder of pictures, with a subfolder for each class or none; or a HuggingFace data set on disk.
        masks: folder with <stem>.png for each picture: 0 background, 255 ignored, other values objects.
        mask_format: what masks hold: "index" (as above), "coco-stuff", "ade20k" or "voc"; see docs/data.md.
        mask_suffix: what the masks' names end in after the picture's stem, such as _mask.png; null = the format's own.
        classes: diagnose these classes only: "cat,dog"; "all" = all.
        limit: diagnose at most so many pictures, drawn with the seed evenly from the classes; null = all.
        labels: JSON file {"label set": {"picture's path in the folder": "label", …}, …}; null = the subfolders.
        out: the run's folder.
        label: the run's name in the report; null = the model's.
        layers: "all", or a list of layers such as [0,8,16] or [0,middle,last].
        batch_size: pictures at once.
        seed: of the splits and samples.
        skip_broken: leave out and count pictures that cannot be read.
        metrics: groups of numbers: "default" (all but objects and bleeding), "all", or some of probes, structure,
            objects, bleeding, spectrum, fidelity, lens, maps.
        nulls: null models to measure as well: "none", or random_weights (takes as long again).
        initial: model directory or hub id that the training of the vision encoder began with: its output is what
            fidelity predicts; null = the model's own.
        prune_keep: shares of the visual tokens, such as [0.5,0.1]: probe the middle and the last layer also with only
            so many kept after layer prune_layer. Each takes a forward over the pictures.
        prune_layer: the layer after which they are dropped.
        prune_by: which are kept: "attention", "random" or "uniform", as in `keepsight evaluate`.
        split_components: count each connected part of a mask's value as an object (for semantic masks).
        exact: take all tokens where the default takes a seeded sample (spectrum, fidelity, lens). They go to the
            temporary folder: 4 bytes · layers · width a token.
        device: "auto" (a GPU if there is one), "cpu", "cuda", …
        device_map: for models larger than one device: "auto" spreads the weights over all GPUs and, where these are too
            few, memory; others as transformers takes them. null = all on `device`. Needs accelerate.
        dtype: of the weights: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
        trust_remote_code: run Python code that comes with the checkpoint. Off unless you know its author.
        keep_features: folder for what is taken from the model, to go on from after a stop, or to diagnose again with
            other labels without a forward; null = it is not kept.
        overwrite: replace the run that the folder holds.
    """

    model: str
    images: str
    out: str
    masks: str | None = None
    mask_format: Literal["index", "coco-stuff", "ade20k", "voc"] = "index"
    mask_suffix: str | None = None
    classes: str = "all"
    limit: int | None = None
    labels: str | None = None
    label: str | None = None
    layers: list[int | str] | str = "all"
    batch_size: int = 8
    seed: int = 0
    skip_broken: bool = False
    split_components: bool = False
    exact: bool = False
    metrics: str = "default"
    nulls: str = "none"
    initial: str | None = None
    prune_keep: list[float] = field(default_factory=list)
    prune_layer: int = 2
    prune_by: Literal["attention", "random", "uniform"] = "attention"
    device: str = "auto"
    device_map: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    trust_remote_code: bool = False
    keep_features: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name, how in (
            ("model", "as the first argument"),
            ("images", "with --images DIR"),
            ("out", "with --out DIR"),
        ):
            if not getattr(self, name):
                raise ValueError(f"{name} is not given; give it {how}.")
        if isinstance(self.layers, str) and self.layers != "all":
            raise ValueError(f"layers is {self.layers!r}; allowed: 'all' or a list such as [0,8,16] or [0,middle].")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; allowed: 1 or more.")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; allowed: 0 or more.")


def parse(arguments: Sequence[str]) -> DiagnoseConfig:
    """The command's settings."""
    return read_command(
        DiagnoseConfig,
        arguments,
        command="diagnose",
        usage="MODEL --images DIR --out DIR [--masks DIR] [options]",
        description="Measure what is left of pictures at every layer of a model.",
        first="model",
    )


def main(arguments: Sequence[str]) -> None:
    """Diagnose, write the run's folder, print the table and the verdict."""
    config = parse(arguments)
    from keepsight.processes import rank, world_size
    from keepsight.results import RunDirectory

    # A folder that cannot take the run is refused before the work, not after it; by the process that will write it.
    if rank() == 0:
        RunDirectory.check(config.out, kind="diagnosis", overwrite=config.overwrite)
    from keepsight.commands.console import console, device_named, quiet, training_run

    quiet()
    from keepsight.diagnosis import diagnose
    from keepsight.diagnosis.nulls import wanted_nulls
    from keepsight.diagnosis.rows import wanted_metrics
    from keepsight.report import table, verdict
    from keepsight.vlm.load import load_model, model_folder
    from keepsight.vlm.pruning import Pruning

    metrics = wanted_metrics(_listed(config.metrics))
    nulls = wanted_nulls(() if config.nulls == "none" else _listed(config.nulls))
    device = device_named(config.device)
    images = images_of(config.images)
    labels = None
    if config.labels:
        labels = read_labels(config.labels, images, config.masks, config.mask_format, config.mask_suffix)

    def load(name: str) -> tuple[Any, Any]:
        options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code, "dtype": config.dtype}
        found, beside = load_model(name, device_map=config.device_map, **options)
        return found if config.device_map else found.to(device), beside

    model, processor = load(config.model)
    first = load(config.initial)[0] if config.initial else None
    trained = training_run(Path(model_folder(config.model)))
    label = config.label or trained.get("label") or Path(config.model).resolve().name
    result = diagnose(
        model,
        processor,
        images,
        labels=labels,
        masks=config.masks,
        mask_format=config.mask_format,
        mask_suffix=config.mask_suffix,
        classes=() if config.classes == "all" else _listed(config.classes),
        limit=config.limit,
        layers=config.layers,
        batch_size=config.batch_size,
        seed=config.seed,
        skip_broken=config.skip_broken,
        split_components=config.split_components,
        exact=config.exact,
        metrics=metrics,
        nulls=nulls,
        initial=first,
        prunings=[Pruning(config.prune_layer, keep, config.prune_by) for keep in config.prune_keep],
        pre_layer=trained.get("pre_layer"),
        label_run=label,
        keep_features=config.keep_features,
        several_processes=world_size() > 1,
    )
    if rank():
        return  # the first process has everything
    if trained.get("training_seed") is not None:
        result.info["training_seed"] = trained["training_seed"]
    run = result.save(config.out, overwrite=config.overwrite, config=config, report=True)
    console.print(table([run]))
    for reason in run.info.get("skipped", []):
        console.print(f"left out: {reason}", style="yellow", markup=False)
    console.print(verdict([run]), markup=False)
    console.print(f"report: {run.path / 'report.html'}", markup=False)


def read_labels(
    path: str, images: Any, masks: str | None, mask_format: str = "index", mask_suffix: str | None = None
) -> dict[str, list[str | None]]:
    """Label sets from a JSON file, one label (or None) for each picture in its order.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is not UTF-8 or not {"label set": {"picture": "label"}}, or names pictures that are not there.
    """
    from keepsight.diagnosis.data.pictures import find_pictures

    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"the label file '{path}' does not exist.")
    try:
        sets = json.loads(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as cause:
        raise ValueError(f"'{path}' is not UTF-8 text ({cause.reason}); save it as UTF-8.") from cause
    except json.JSONDecodeError as cause:
        raise ValueError(f"'{path}' is not valid JSON ({cause}).") from cause
    if not isinstance(sets, dict) or not sets or not all(isinstance(labels, dict) for labels in sets.values()):
        raise ValueError(f'\'{path}\' must hold {{"label set": {{"picture": "label", …}}, …}}.')
    for target, labels in sets.items():
        for name, label in labels.items():
            if isinstance(label, list | dict):
                raise ValueError(
                    f"'{path}' gives '{name}' the label {label!r:.40} in '{target}'; a picture has one label in each "
                    "label set, a text: give several as label sets of their own."
                )
    found = find_pictures(images, masks=masks, mask_format=mask_format, mask_suffix=mask_suffix)
    names = [item.name for item in found.items]
    for target, labels in sets.items():
        if unknown := sorted(set(labels) - set(names)):
            raise ValueError(
                f"'{path}' labels {len(unknown)} pictures in '{target}' that are not there, such as '{unknown[0]}'; "
                f"names are paths in the image folder, such as '{names[0]}'."
            )
    return {target: [labels.get(name) for name in names] for target, labels in sets.items()}


def _listed(text: str) -> list[str]:
    """ "a, b" → ["a", "b"]"""
    return [name.strip() for name in text.split(",")]


def images_of(path: str) -> Any:
    """A folder of pictures as it is; a data set that `save_to_disk` wrote, loaded.

    Raises:
        ValueError: for a data set of several splits, or one that cannot be read.
    """
    folder = Path(path)
    splits = folder / "dataset_dict.json"
    if not splits.is_file() and not (folder / "state.json").is_file():
        return path
    try:
        import datasets  # noqa: F401
    except ImportError as cause:
        raise ImportError('HuggingFace data sets need extra packages: pip install "keepsight[train]"') from cause
    if not splits.is_file():
        return _loaded(folder)
    names = sorted(entry.parent.name for entry in folder.glob("*/state.json"))
    if len(names) != 1:
        raise ValueError(
            f"'{path}' holds the splits {names}; give the folder of one of them, such as "
            f"--images {folder / (names or ['train'])[0]}"
        )
    return _loaded(folder / names[0])


def _loaded(folder: Path) -> Any:
    from datasets import load_from_disk

    from keepsight.errors import reason

    try:
        return load_from_disk(str(folder))
    except Exception as cause:  # a file of it is missing or cut off: which kind, depends
        raise ValueError(f"the data set '{folder}' cannot be loaded ({reason(cause)}); save it again.") from cause
