"""`keepsight attribute RUN --images DIR --tasks FILE`: what a model pays for its skill, over its training."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from keepsight.settings import read_command

_FREE = ("out", "label", "sources", "device")  # what a point does not hang on


@dataclass(frozen=True)
class AttributeConfig:
    """What is walked through, and what it is measured on.

    Attributes:
        sources: folders of `keepsight train` runs that kept their weights (keep_weights: true), one for each seed; or
            two models or more, in the order of their training (the first arguments).
        images: folder of pictures, with a subfolder for each class or none; or a HuggingFace data set on disk.
        tasks: file of questions, as `keepsight evaluate` takes it.
        out: a folder; what lies there finished is not done again, also where there are more sources now.
        label: name in reports; null = the folder's.
        labels: JSON file of label sets, as `keepsight diagnose` takes it; null = the subfolders.
        limit: ask only so many questions, the first ones.
        batch_size: pictures or questions at once.
        max_new_tokens: length limit of an answer.
        seed: of the splits and samples.
        skip_broken: leave out and count pictures that cannot be read.
        device: "auto" (a GPU if there is one), "cpu", "cuda", …
    """

    sources: list[str]
    images: str
    tasks: str
    out: str
    label: str | None = None
    labels: str | None = None
    limit: int | None = None
    batch_size: int = 8
    max_new_tokens: int = 32
    seed: int = 0
    skip_broken: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, how in (
            ("sources", "as the first arguments"),
            ("images", "with --images DIR"),
            ("tasks", "with --tasks FILE"),
            ("out", "with --out DIR"),
        ):
            if not getattr(self, name):
                raise ValueError(f"{name} is not given; give it {how}.")
        for name in ("batch_size", "max_new_tokens", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; allowed: 1 or more.")


def parse(arguments: Sequence[str]) -> AttributeConfig:
    """The command's settings."""
    return read_command(
        AttributeConfig,
        arguments,
        command="attribute",
        usage="RUN [RUN …] --images DIR --tasks FILE --out DIR [options]",
        description="Skill against what the layers still tell, over a training: one r a run, intervals over seeds.",
        first="sources",
        lists="sources",
    )


def main(arguments: Sequence[str]) -> None:
    """Walk through the trainings, write the run with its points, rows and report, print the r."""
    config = parse(arguments)
    from keepsight.commands.console import console, device_named, quiet
    from keepsight.commands.diagnose import images_of, read_labels
    from keepsight.evaluation import load_questions

    quiet()
    from keepsight import attribution
    from keepsight.report import build, table, verdict
    from keepsight.results.points import FIDELITY

    questions = load_questions(config.tasks)[: config.limit]
    images = images_of(config.images)
    labels = read_labels(config.labels, images, None) if config.labels else None
    if FIDELITY in (labels or {}):
        raise ValueError(
            f"'{config.labels}' has a label set '{FIDELITY}', which is what a layer's fidelity is called; rename it."
        )
    device = device_named(config.device)
    trainings = _trainings(config.sources)
    run = _open(config)
    kept = {key: value for key, value in asdict(config).items() if key not in _FREE}
    settings = {"labels": labels, "seed": config.seed, "batch_size": config.batch_size} | (
        {"skip_broken": True} if config.skip_broken else {}
    )
    points = []
    for name, training in trainings.items():
        folder = Path(config.out) / name
        points += attribution.look(
            training.models(folder, device),
            images,
            questions,
            folder,
            training=name,
            settings=settings,
            batch_size=config.batch_size,
            max_new_tokens=config.max_new_tokens,
            config=kept | {"source": name},
            told=partial(_tell, name),
        )
    attribution.conclude(run, points, **_known(config, trainings))
    run.write_config(config)
    page = build([run], Path(config.out) / "report.html")
    console.print(table([run]))
    console.print(verdict([run]), markup=False)
    console.print(f"report: {page}", markup=False)


def _open(config: AttributeConfig) -> Any:
    """A new run, or the one to go on with.

    Raises:
        FileExistsError: the folder holds another run or other files.
        ValueError: the run was started with other settings.
    """
    from keepsight.results import RUN_FILE, RunDirectory

    out = Path(config.out)
    if (out / RUN_FILE).is_file() and (run := RunDirectory.open(out)).kind == "attribution":
        if changes := run.changes(config, _FREE):
            raise ValueError(f"'{out}' was made with other settings ({changes}); choose another --out")
        return run
    with RunDirectory.staged(out, label=_label(config), kind="attribution", seed=config.seed) as run:
        run.write_config(config)
    return run


def _label(config: AttributeConfig) -> str:
    return config.label or Path(config.out).resolve().name


def _known(config: AttributeConfig, trainings: Mapping[str, Training]) -> dict[str, Any]:
    """What run.json tells of the trainings: where PRe acted in all of them, their seeds; and of this command."""
    from keepsight.results import command_line

    layers = {training.info.get("pre_layer") for training in trainings.values()}
    layer = layers.pop() if len(layers) == 1 else None
    seeds = {seed for training in trainings.values() if type(seed := training.info.get("seed")) is int}
    return {
        "label": _label(config),
        "command": command_line(),
        "pre_layer": layer if type(layer) is int else None,
        "seeds": sorted(seeds),
    }


def _tell(training: str, point: str, done: bool) -> None:
    from keepsight.commands.console import console

    console.print(f"{training}: {point}" + (" (done before)" if done else ""), markup=False)


Models = Iterator[tuple[str, str, Callable[[], tuple[Any, Any]]]]  # as `attribution.look` takes them


@dataclass(frozen=True)
class Training:
    """What is walked through. models: (folder of its points, device) → its models in order; info: its run.json."""

    models: Callable[[Path, str], Models]
    info: Mapping[str, Any] = field(default_factory=dict)


def _trainings(sources: Sequence[str]) -> dict[str, Training]:
    """The runs by name, or the models given as one training.

    Raises:
        ValueError: runs and models together, one model alone, two runs of one name or of the same weights, or a run
            that kept none.
    """
    from keepsight.results import RUN_FILE, RunDirectory
    from keepsight.training.history import moments

    runs = [source for source in sources if (Path(source) / RUN_FILE).is_file()]
    if runs and len(runs) < len(sources):
        other = next(source for source in sources if source not in runs)
        raise ValueError(f"'{other}' is no training run, others are; give runs (one a seed), or models only.")
    if not runs:
        if len(sources) < 2:
            raise ValueError(f"'{sources[0]}' is no training run; give one, or two models or more.")
        return {"models": Training(partial(_models, sources))}
    names = [Path(run).resolve().name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"two runs are called alike ({', '.join(names)}); rename a folder.")
    opened = [RunDirectory.open(run) for run in runs]
    for run in opened:
        moments(run)  # now, not after the first has been walked through
    ends = [(run.info.get("model") or {}).get("fingerprint") for run in opened]
    if twins := [name for name, end in zip(names, ends, strict=True) if end and ends.count(end) > 1]:
        raise ValueError(
            f"the runs {', '.join(twins)} ended in the same weights, so they are no replicates, and an interval over "
            "them would be feigned; give one of them, or trainings of several seeds."
        )
    return {name: Training(partial(_run, run), run.info) for name, run in zip(names, opened, strict=True)}


def _run(run: Any, folder: Path, device: str) -> Models:
    from keepsight.results import RUN_FILE
    from keepsight.training.history import moments, replay

    todo = replay(run, lambda moment: not (folder / moment.name / RUN_FILE).is_file())

    def following() -> tuple[Any, Any]:
        _, model, processor = next(todo)
        return model.to(device), processor

    for moment in moments(run):
        yield moment.name, f"training started {run.info.get('created')}", following


def _models(sources: Sequence[str], folder: Path, device: str) -> Models:
    from keepsight.vlm.load import load_model

    def load(source: str) -> tuple[Any, Any]:
        model, processor = load_model(source)
        return model.to(device), processor

    for number, source in enumerate(sources):
        yield f"{number:02d}-{Path(source).name}", _written(source), partial(load, source)


def _written(source: str) -> str:
    """Which weights a model's name stands for now, so that other ones of that name are not taken for done."""
    folder = Path(source).resolve()
    if not folder.is_dir():
        return source  # of the hub
    changed = max((file.stat().st_mtime for file in folder.glob("*.safetensors")), default=0.0)
    return f"{folder}, written {datetime.datetime.fromtimestamp(changed, datetime.UTC).isoformat(timespec='seconds')}"
