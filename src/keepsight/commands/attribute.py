"""`keepsight attribute RUN --images DIR --tasks FILE`: what a model pays for its skill, over its training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from keepsight.settings import read_command

_FREE = ("out", "sources", "device")  # what a point does not hang on


@dataclass(frozen=True)
class AttributeConfig:
    """What is walked through, and what it is measured on.

    Attributes:
        sources: folders of `keepsight train` runs that kept their weights (keep_weights: true), one for each seed; or
            two models or more, in the order of their training (the first arguments).
        images: folder of pictures, with a subfolder for each class or none; or a HuggingFace data set on disk.
        tasks: file of questions, as `keepsight evaluate` takes it.
        out: a folder; what lies there finished is not done again.
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
    """Walk through the trainings, write points, rows and the page, print the r of the middle layer."""
    config = parse(arguments)
    from keepsight.commands.console import console, device_named, quiet
    from keepsight.commands.diagnose import images_of, read_labels
    from keepsight.evaluation import load_questions

    quiet()
    from keepsight import attribution
    from keepsight.report.attribution import draw
    from keepsight.results import RunDirectory, make_folder, write_rows

    questions = load_questions(config.tasks)[: config.limit]
    images = images_of(config.images)
    labels = read_labels(config.labels, images, None) if config.labels else None
    device = device_named(config.device)
    trainings = _trainings(config.sources)
    kept = {key: value for key, value in asdict(config).items() if key not in _FREE}
    settings = {"labels": labels, "seed": config.seed, "batch_size": config.batch_size} | (
        {"skip_broken": True} if config.skip_broken else {}
    )
    make_folder(config.out)
    told, rows = {}, []
    for name, source in trainings.items():
        folder = Path(config.out) / name
        points = attribution.look(
            source(folder, device),
            images,
            questions,
            folder,
            settings=settings,
            batch_size=config.batch_size,
            max_new_tokens=config.max_new_tokens,
            config=kept | {"source": name},
            told=partial(_tell, name),
        )
        told[name] = points
        rows.append(attribution.correlations(points))
    pooled = attribution.over_seeds(rows)
    write_rows(Path(config.out) / "attribution.jsonl", pooled)
    depth = int(RunDirectory.open(Path(config.out) / next(iter(told)) / points[0].name).info["depth"])
    for row in pooled:
        if row.layer == depth // 2:
            interval = "" if row.low is None else f" [{row.low:+.2f}, {row.high:+.2f}]"
            number = f"r = {row.value:+.2f}{interval}" if row.value is not None else "no r"
            console.print(f"{row.target} at layer {row.layer}: {number}, {row.n} {row.unit}; {row.note}", markup=False)
    page = draw(told, pooled, depth // 2, Path(config.out) / "attribution.html")
    console.print(f"page: {page}", markup=False)


def _tell(training: str, point: str, done: bool) -> None:
    from keepsight.commands.console import console

    console.print(f"{training}: {point}" + (" (done before)" if done else ""), markup=False)


Source = Callable[[Path, str], Iterator[tuple[str, Callable[[], tuple[Any, Any]]]]]


def _trainings(sources: Sequence[str]) -> dict[str, Source]:
    """Training → its models in order: of every run, or of the models given.

    Raises:
        ValueError: runs and models together, one model alone, or two runs of one name.
    """
    from keepsight.results import RUN_FILE, RunDirectory

    runs = [source for source in sources if (Path(source) / RUN_FILE).is_file()]
    if runs and len(runs) < len(sources):
        other = next(source for source in sources if source not in runs)
        raise ValueError(f"'{other}' is no training run, others are; give runs (one a seed), or models only.")
    if not runs:
        if len(sources) < 2:
            raise ValueError(f"'{sources[0]}' is no training run; give one, or two models or more.")
        return {"models": partial(_models, sources)}
    names = [Path(run).resolve().name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"two runs are called alike ({', '.join(names)}); rename a folder.")
    opened = [RunDirectory.open(run) for run in runs]
    return {name: partial(_run, run) for name, run in zip(names, opened, strict=True)}


def _run(run: Any, folder: Path, device: str) -> Iterator[tuple[str, Callable[[], tuple[Any, Any]]]]:
    from keepsight.results import RUN_FILE
    from keepsight.training.history import moments, replay

    todo = replay(run, lambda moment: not (folder / moment.name / RUN_FILE).is_file())

    def following() -> tuple[Any, Any]:
        _, model, processor = next(todo)
        return model.to(device), processor

    for moment in moments(run):
        yield moment.name, following


def _models(sources: Sequence[str], folder: Path, device: str) -> Iterator[tuple[str, Callable[[], tuple[Any, Any]]]]:
    from keepsight.vlm.load import load_model

    def load(source: str) -> tuple[Any, Any]:
        model, processor = load_model(source)
        return model.to(device), processor

    for number, source in enumerate(sources):
        yield f"{number:02d}-{Path(source).name}", partial(load, source)
