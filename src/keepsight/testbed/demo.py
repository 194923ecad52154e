"""`keepsight demo`: train a tiny model without and with PRe, look inside both, and write up what the numbers show."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from transformers.utils import logging as transformers_logging

from keepsight import report
from keepsight.evaluation import text_only_prior
from keepsight.pre import PReConfig
from keepsight.results import make_folder, write_file
from keepsight.testbed._bars import TrainingBar, progress
from keepsight.testbed._inside import bare_questions, look_inside, print_answers
from keepsight.testbed.folders import remove_folder, write_folder
from keepsight.testbed.models import LAYERS_AT_WORK, Language, build_vlm
from keepsight.testbed.scenes import draw_scenes
from keepsight.training import ConversationDataset, Encoder, LlavaConversations
from keepsight.training.config import DataConfig, ModelConfig, StageConfig, TrainConfig
from keepsight.training.recipe import train

ARMS = (("without PRe", 0.0), ("with PRe", 0.5))
MARK, REPORT = "demo.txt", "report.html"
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
        FileExistsError: `out` holds a demo already, or other files where the data go.
        ValueError: fewer than one step, or an unknown language model.
    """
    console = console or Console()
    out = Path(out)
    size = FULL if full else QUICK
    if steps is not None:
        if steps < 1:
            raise ValueError(f"steps is {steps}; the demo needs at least 1.")
        size = Size(steps, size.batch, size.turns, min(size.diagnosed, 240 + 10 * steps), min(size.asked, 5 + steps))
    _claim(out, overwrite)
    transformers_logging.disable_progress_bar()

    console.print(
        f"A tiny LLaVA (CLIP-style encoder, 8-layer {language} language model) learns to answer questions about drawn "
        f"scenes, twice: without and with predictive regularization. {size.steps} steps of {size.batch} pictures each."
    )
    with progress(console) as bar:
        drawing = bar.add_task("Drawing scenes", total=None, note="")
        train_scenes = draw_scenes(_TRAIN_WORLD + seed, size.steps * size.batch)
        test_scenes = draw_scenes(_TEST_WORLD + seed, max(size.diagnosed, size.asked))
        data = out / "data"
        write_folder(data, train_scenes, turns=size.turns)
        model, processor = build_vlm(language, seed)
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        dataset = ConversationDataset(
            LlavaConversations(data / "questions.json", data / "images"), Encoder(processor), cache_megabytes=512
        )
        bar.update(drawing, total=1, completed=1)

        asked = test_scenes[: size.asked]
        prior = text_only_prior(bare_questions(train_scenes, size.turns), bare_questions(asked, size.turns))
        runs = []
        for name, weight in ARMS:
            model.load_state_dict(start)
            arm = train(
                _configuration(out, name, weight, size, language, seed),
                model=model,
                processor=processor,
                datasets={"full": dataset},
                callbacks=[TrainingBar(bar, name)],
            )
            looking = bar.add_task(f"Looking inside, {name}", total=None, note="")
            diagnosed = test_scenes[: size.diagnosed]
            runs.append(look_inside(arm, model, processor, diagnosed, asked, turns=size.turns, prior=prior, seed=seed))
            bar.update(looking, total=1, completed=1)

    path = report.build(runs, out / REPORT, "What a tiny LLaVA still sees, without and with PRe")
    console.print(report.table(runs))
    print_answers(console, runs)
    console.print(f"\n[bold]{escape(report.verdict(runs))}[/bold]")
    console.print(f"\n{LAYERS_AT_WORK}", style="dim")
    console.print(f"\nReport: {path}", markup=False)
    return path


def _configuration(out: Path, name: str, weight: float, size: Size, language: Language, seed: int) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(path=f"keepsight testbed ({language})"),
        out=str(_folder(out, name)),
        label=name,
        data=DataConfig(conversations=str(out / "data" / "questions.json"), image_folder=str(out / "data" / "images")),
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
        save_steps=None,
        trainer={"use_cpu": True, "disable_tqdm": True, "report_to": [], "logging_steps": 10},
    )


def _folder(out: Path, name: str) -> Path:
    return out / name.lower().replace(" ", "-")


def _claim(out: Path, overwrite: bool) -> None:
    """Make the folder the demo's own; of a demo that is replaced, or was stopped, only what a demo writes goes.

    Raises:
        FileExistsError: it holds a demo and `overwrite` is off, or anything else.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"'{out}' is a file; choose a folder with --out.")
    if out.is_dir() and any(out.iterdir()) and not (out / MARK).is_file():
        raise FileExistsError(
            f"'{out}' is not empty and holds no keepsight demo; nothing was touched. Choose a new or empty folder with "
            "--out."
        )
    arms = [_folder(out, name) for name, _ in ARMS]
    if (out / REPORT).is_file() and not overwrite:
        raise FileExistsError(
            f"'{out}' holds a demo already. Choose another folder with --out, or pass --overwrite to replace it."
        )
    if (out / "data").is_dir():
        remove_folder(out / "data")
    for arm in arms:
        if arm.is_dir():
            shutil.rmtree(arm)
    make_folder(out)
    write_file(out / MARK, "Written by keepsight demo, which may replace what it wrote here.\n")
