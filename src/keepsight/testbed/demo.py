"""`keepsight demo`: train a tiny model without and with PRe, look inside both, and write up what the numbers show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from keepsight import report
from keepsight.diagnosis import diagnose
from keepsight.evaluation.vqa import VqaItem, answer_accuracy, text_only_prior
from keepsight.pre import PReConfig
from keepsight.results import Measurement, RunDirectory
from keepsight.testbed.drawing import render
from keepsight.testbed.folders import vqa_items, write_folder
from keepsight.testbed.language import questions
from keepsight.testbed.models import Language, build_vlm
from keepsight.testbed.scenes import ASKED, UNASKED, Scene, draw_scenes
from keepsight.training import ConversationDataset, Encoder, LlavaConversations
from keepsight.training.config import DataConfig, ModelConfig, StageConfig, TrainConfig
from keepsight.training.recipe import train

ARMS = (("without PRe", 0.0), ("with PRe", 0.5))
TARGETS = {**dict.fromkeys(ASKED, "asked"), **dict.fromkeys(UNASKED, "never asked")}
_TRAIN_WORLD, _TEST_WORLD = 5000, 6000  # seeds of scenes, the demo's own added; pretraining uses others


@dataclass(frozen=True)
class Size:
    """How long the demo trains and on how much it is measured.

    Attributes:
        steps: of stage 2, of `batch` pictures with `turns` questions each.
        diagnosed: held-out pictures that the probes are trained and tested on.
        asked: held-out pictures whose questions are answered.
    """

    steps: int = 120
    batch: int = 16
    turns: int = 10
    diagnosed: int = 600
    asked: int = 100


QUICK, FULL = Size(), Size(steps=800, diagnosed=1500, asked=400)


def run(
    out: str | Path = "runs/demo",
    *,
    full: bool = False,
    seed: int = 0,
    steps: int | None = None,
    language: Language = "llama",
    overwrite: bool = False,
    console: Console | None = None,
) -> Path:
    """The main job on the testbed's tiny pretrained parts, offline on a CPU.

    Both arms start from the same model, whose projector has been through stage 1 (captions; it is shipped with the
    package), and go through stage 2 on the same pictures and questions in the same order; PRe acts in stage 2 only.
    Writes the runs `without-pre` and `with-pre`, the data, and `report.html` into `out`.

    Args:
        full: train longer and measure on more pictures.
        steps: of stage 2, instead of the default; with very few, everything else shrinks too.
        language: which tiny language model: "llama" or "qwen2".
        overwrite: replace a demo that is already there.

    Returns:
        The report's path.

    Raises:
        FileExistsError: `out` holds a demo already, or other files.
    """
    console = console or Console()
    out = Path(out)
    size = FULL if full else QUICK
    if steps is not None:
        if steps < 1:
            raise ValueError(f"steps is {steps}; the demo needs at least 1.")
        size = Size(steps, size.batch, size.turns, min(size.diagnosed, 240 + 10 * steps), min(size.asked, 5 + steps))
    _check_vacant(out, overwrite)
    transformers_logging.disable_progress_bar()

    console.print(
        f"A tiny LLaVA (CLIP-style encoder, 8-layer {language} language model) learns to answer questions about drawn "
        f"scenes, twice: without and with predictive regularization. {size.steps} steps of {size.batch} pictures each."
    )
    with _progress(console) as bar:
        drawing = bar.add_task("Drawing scenes", total=None, note="")
        train_scenes = draw_scenes(_TRAIN_WORLD + seed, size.steps * size.batch)
        test_scenes = draw_scenes(_TEST_WORLD + seed, max(size.diagnosed, size.asked))
        data = out / "data"
        if not (data / "questions.json").is_file():
            write_folder(data, train_scenes, turns=size.turns)
        model, processor = build_vlm(language, seed)
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        dataset = ConversationDataset(
            LlavaConversations(data / "questions.json", data / "images"), Encoder(processor), cache_megabytes=512
        )
        bar.update(drawing, total=1, completed=1)

        asked = test_scenes[: size.asked]
        prior = text_only_prior(_questions(train_scenes, size.turns), _questions(asked, size.turns)).rows
        runs = []
        for name, weight in ARMS:
            model.load_state_dict(start)
            config = TrainConfig(
                model=ModelConfig(path=f"keepsight testbed ({language})"),
                out=str(out / name.lower().replace(" ", "-")),
                label=name,
                data=DataConfig(conversations=str(data / "questions.json"), image_folder=str(data / "images")),
                projector=StageConfig(enabled=False),
                full=StageConfig(
                    train=("projector", "language_model"),
                    lr=2e-3,
                    batch_size=size.batch,
                    max_steps=size.steps,
                    lr_scheduler="cosine",
                ),
                pre=PReConfig(layer="middle", weight=weight, seed=seed),
                seed=seed,
                trainer={"use_cpu": True, "disable_tqdm": True, "report_to": [], "logging_steps": 10},
            )
            arm = train(
                config, model=model, processor=processor, datasets={"full": dataset}, callbacks=[_Bar(bar, name)]
            )
            runs.append(_look_inside(arm, model, processor, test_scenes, asked, prior, size, seed, bar, name))

    path = report.build(runs, out / "report.html", "What a tiny LLaVA still sees, without and with PRe")
    console.print(report.table(runs))
    _print_answers(console, runs)
    console.print(f"\n[bold]{report.verdict(runs)}[/bold]")
    console.print(f"\nReport: {path}")
    return path


def _look_inside(
    arm: RunDirectory,
    model: Any,
    processor: Any,
    scenes: Sequence[Scene],
    asked: Sequence[Scene],
    prior: Sequence[Measurement],
    size: Size,
    seed: int,
    bar: Progress,
    name: str,
) -> RunDirectory:
    """Diagnose one arm, let it answer held-out questions, and add the rows to its run."""
    looking = bar.add_task(f"Looking inside, {name}", total=None, note="")
    chosen = scenes[: size.diagnosed]
    pictures, masks = render(chosen)
    truth = [scene.labels() for scene in chosen]
    result = diagnose(
        model,
        processor,
        [Image.fromarray(picture) for picture in pictures],
        labels={target: [row[target] for row in truth] for target in TARGETS},
        masks=list(masks),
        batch_size=32,
        seed=seed,
        targets=TARGETS,
        pre_layer=arm.info["pre_layer"],
        label_run=name,
        progress=False,
    )
    answers = answer_accuracy(model, processor, vqa_items(asked, size.turns), batch_size=64, max_new_tokens=4).rows
    arm.write_rows([*result.rows, *answers, *prior])
    arm.write_examples(result.examples)
    kept = ("depth", "width", "prompt", "counts", "targets")
    arm.update(**{key: result.info[key] for key in kept}, seeds=[seed])
    bar.update(looking, total=1, completed=1)
    return arm


def _questions(scenes: Sequence[Scene], turns: int) -> list[VqaItem]:
    return [
        VqaItem(turn.question, turn.answer, kind=turn.kind, picture=(scene.seed, scene.index))
        for scene in scenes
        for turn in questions(scene, turns)
    ]


def _print_answers(console: Console, runs: Sequence[RunDirectory]) -> None:
    for run in runs:
        rows = {row.metric: row for row in run.read_rows() if row.metric.startswith("answer_") and not row.target}
        answers, prior = rows["answer_accuracy"], rows["answer_prior"]
        assert answers.value is not None
        assert prior.value is not None
        console.print(
            f"Held-out questions {run.label}: {answers.value:.1%} right [{answers.low:.1%}, {answers.high:.1%}], "
            f"{100 * (answers.value - prior.value):.0f} points above the text-only prior of {prior.value:.1%} "
            f"(n = {answers.n} questions)"
        )


def _check_vacant(out: Path, overwrite: bool) -> None:
    for name, _ in ARMS:
        folder = out / name.lower().replace(" ", "-")
        if (folder / "run.json").is_file() and not overwrite:
            raise FileExistsError(
                f"'{out}' holds a demo already. Choose another folder with --out, or pass --overwrite to replace it."
            )


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description:27s}"),
        BarColumn(bar_width=16),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, refresh_per_second=4) as bar:
        yield bar


class _Bar(TrainerCallback):
    """One bar a training, with its loss and cosine."""

    def __init__(self, bar: Progress, name: str) -> None:
        self.bar, self.name = bar, name
        self.task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.task = self.bar.add_task(f"Training {self.name}", total=state.max_steps, note="")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.advance(self.task)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "lm_loss" in logs:
            cosine = f" cosine {logs['pre_cosine']:.2f}" if "pre_cosine" in logs else ""
            self.bar.update(self.task, note=f"loss {logs['lm_loss']:.2f}{cosine}")
