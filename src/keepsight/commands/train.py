"""`keepsight train RECIPE.yaml`."""

import shlex
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from keepsight.settings import add_fields, build, normalise
from keepsight.training.config import TrainConfig


def parse(arguments: Sequence[str]) -> TrainConfig:
    """The run's configuration: the recipe, then the flags that override it."""
    return build(TrainConfig, read(arguments))


def read(arguments: Sequence[str]) -> Namespace:
    """The values of all flags."""
    parser = ArgumentParser(
        prog="keepsight train",
        usage="keepsight train RECIPE.yaml [OVERRIDE.yaml …] [--pre.layer 16] [--FIELD VALUE …] [--resume] "
        "[--print-config]",
        description="Train in two stages, LLaVA's: the projector, then the projector with the language model. "
        "Any field of the recipe is a flag. --pre.weight 0 trains without PRe.",
    )
    parser.add_argument(
        "--config",
        action="config",
        help="The recipe, also as the first argument. A later file overrides an earlier one.",
    )
    parser.add_argument(
        "--resume", action="store_true", help="Go on where the run in --out stopped; start it where there is none."
    )
    add_fields(parser, TrainConfig)
    given = normalise(arguments or ["--help"], TrainConfig)
    recipes = [file for flag, file in pairwise(given) if flag == "--config"]
    recipes += [argument.removeprefix("--config=") for argument in given if argument.startswith("--config=")]
    if recipes:  # every recipe, and every recipe with its overrides, has a folder of its own
        parser.set_defaults(out=str(Path("runs", "+".join(Path(file).stem for file in recipes))))
    return parser.parse_args(given)


def main(arguments: Sequence[str]) -> None:
    """Train, and say where the model lies and what was left out."""
    values = read(arguments)
    config = build(TrainConfig, values)
    if find_spec("accelerate") is None:
        raise ImportError('training needs extra packages: pip install "keepsight[train]"')
    from keepsight.commands.console import console, quiet

    quiet()
    from keepsight.training.recipe import train
    from keepsight.training.record import MODEL, PROGRESS, read_curves

    run = train(config, resume=values.resume)
    for name in config.stages():
        console.print(f"stage {name}: {_last(read_curves(run.path), name)}", markup=False)
    for what, count in run.info["counts"].items():
        if what.split(": ")[1] not in PROGRESS:
            console.print(f"{what}: {count}", style="yellow", markup=False)
    console.print(f"model and processor: {run.path / MODEL}", markup=False)
    console.print(f"next: keepsight diagnose {shlex.quote(str(run.path))} --images DIR --out DIR", markup=False)


def _last(curves: list[dict[str, Any]], stage: str) -> str:
    """The stage's first and last logged language-model loss, and the last PRe cosine with its margin."""
    logged = [entry for entry in curves if entry["stage"] == stage and "lm_loss" in entry]
    if not logged:
        return "nothing was logged; lower trainer.logging_steps"
    text = f"loss {logged[0]['lm_loss']:.3f} → {logged[-1]['lm_loss']:.3f}"
    if "pre_cosine" in logged[-1]:
        text += f", PRe cosine {logged[-1]['pre_cosine']:.3f}"
    if "pre_margin" in logged[-1]:
        text += f" (margin over other pictures' anchors {logged[-1]['pre_margin']:.3f})"
    return text
