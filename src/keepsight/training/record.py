"""What a training leaves in its folder beside the checkpoints: configuration, curves, counts; and going on with it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keepsight.processes import world_size
from keepsight.results import RunDirectory
from keepsight.training.arguments import STAGES
from keepsight.training.checkpoints import remove_halves
from keepsight.training.config import ModelConfig, TrainConfig
from keepsight.training.data import ConversationDataset

CURVES = "curves.jsonl"
MODEL = "model"
ADAPTER = "adapter"
# What may differ when a run goes on, because it does not change what is learned.
_FREE = {"label", "out", "save_steps", "keep_weights", "skip_broken"}


def read_curves(path: str | Path) -> list[dict[str, Any]]:
    """The loss curves of a run's folder: what `Trainer` logged, each entry with its `stage`."""
    lines = (Path(path) / CURVES).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def start(config: TrainConfig) -> RunDirectory:
    """A new run, with its configuration written."""
    run = RunDirectory.create(
        config.out,
        label=config.label or Path(config.out).resolve().name,
        model=model_name(config.model),
        seed=config.seed,
        kind="training",
    )
    run.write_config(config)
    run.update(processes=world_size())
    return run


def reopen(config: TrainConfig) -> RunDirectory:
    """The run to go on with.

    Raises:
        ValueError: if it was started with another configuration or number of processes.
    """
    run = RunDirectory.open(config.out)
    if changed := changes(run, config):
        raise ValueError(
            f"'{config.out}' was started with another configuration ({changed}). Go on with the recipe and flags it "
            "was started with (its config.yaml), or train into another folder."
        )
    now = world_size()
    if (before := run.info.get("processes", now)) != now:  # each has its own pictures and random states
        raise ValueError(
            f"'{config.out}' was started with {before} processes and cannot go on with {now}: give as many as before "
            "(torchrun --nproc_per_node), or train into another folder."
        )
    for name in config.stages():
        remove_halves(run.path / STAGES / name)
    run.write_config(config)
    return run


def changes(run: RunDirectory, config: TrainConfig) -> str:
    """What `config` has other than the run was started with, in words, where it matters; "" for nothing."""
    return run.changes(config, _FREE)


def curves_of(stage: str, history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was logged, without `Trainer`'s closing line, whose times and mean know only the part after a resume."""
    return [{"stage": stage, **entry} for entry in history if "train_runtime" not in entry]


def undo(run: RunDirectory) -> None:
    """Take back a run that left no checkpoint, so that the corrected command can use the folder."""
    for name in ("run.json", "config.yaml"):
        (run.path / name).unlink(missing_ok=True)
    if run.path.is_dir() and not any(run.path.iterdir()):
        run.path.rmdir()


def model_name(config: ModelConfig) -> str:
    """What the run's model is called."""
    return config.path if config.path is not None else f"{config.vision} + {config.language}"


# Counts of what was done; all others say what was left out or shortened.
PROGRESS = ("entries", "steps", "parameters trained", "pictures", "visual tokens", "samples without a picture")


def count(
    run: RunDirectory, name: str, learning: int, steps: int, dataset: ConversationDataset, totals: Mapping[str, int]
) -> None:
    """Write the stage's counts, over all of the run, to run.json."""
    seen = [totals.get(key, 0) for key in ("images", "tokens", "skipped")]
    done = dict(zip(PROGRESS, (len(dataset), steps, learning, *seen), strict=True))
    found = {key: value for key, value in done.items() if value or key in PROGRESS[:3]} | dict(dataset.skipped())
    counts = {**run.info["counts"], **{f"{name}: {key}": value for key, value in found.items()}}
    run.update(counts=counts, **{f"skipped_{name}": dataset.skipped_names()})
