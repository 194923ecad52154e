"""A training run → a checkpoint for others: plain transformers files (or a PEFT adapter) and a model card."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any, Literal, get_args

from keepsight.results import RunDirectory, staged_folder, write_file
from keepsight.results.storage import disk_error
from keepsight.settings import read_yaml
from keepsight.training.arguments import STAGES
from keepsight.training.card import model_card
from keepsight.training.checkpoints import latest, load_weights, read_state
from keepsight.training.config import TrainConfig
from keepsight.training.history import ChangedModelError, starting_model
from keepsight.training.lora import adapt, is_adapter, save_adapter
from keepsight.training.record import ADAPTER, MODEL, curves_of, read_curves

Form = Literal["merged", "adapter"]


class ExportError(ValueError):
    """A run that cannot be exported so; the text says why and what to do."""


def export(path: str | Path, out: str | Path, *, form: Form = "merged", unfinished: bool = False) -> Path:
    """Write what a `keepsight train` run trained, without a trace of PRe's head, with a model card.

    Args:
        path: the run's folder.
        out: a new or empty folder; it is filled whole or not at all.
        form: of a run with LoRA: "merged" into the weights, or the "adapter" by itself in PEFT's format, with the
            projector in it. Of a run without LoRA there is only "merged": all weights.
        unfinished: of a run that has not ended, its newest checkpoint.

    Returns:
        `out`.

    Raises:
        FileNotFoundError: if `path` holds no run.
        FileExistsError: if `out` holds something.
        ExportError: for a run that was no training, has not ended, has lost files, or has no adapter.
        StorageError: if `out` cannot be written; nothing is left there.
    """
    if form not in get_args(Form):
        raise ExportError(f"form is {form!r}; allowed: {', '.join(map(repr, get_args(Form)))}.")
    run, out = RunDirectory.open(path), Path(out)
    if run.kind != "training":
        raise ExportError(
            f"'{run.path}' holds a {run.kind or 'run of unknown kind'}, not a training; give a folder that "
            "`keepsight train` wrote."
        )
    config = _config(run)
    if form == "adapter" and config.lora.rank is None:
        raise ExportError(f"'{run.path}' was trained without LoRA, so it has no adapter; export it as 'merged'.")
    if form == "adapter" and config.model.path is None:
        raise ExportError(
            f"the model of '{run.path}' was put together from {config.model.vision} and {config.model.language}, so "
            "there is no checkpoint that an adapter could stand on; export it as 'merged'."
        )
    finished = bool(run.info.get("finished"))
    if not finished and not unfinished:
        raise ExportError(
            f"the run in '{run.path}' has not ended: go on with `keepsight train … --resume`, or export its newest "
            "checkpoint with --unfinished."
        )
    with staged_folder(out) as stage:
        try:
            steps = None
            if finished:
                _copy(run.path / (ADAPTER if form == "adapter" else MODEL), stage)
                curves = read_curves(run.path)
            else:
                steps, curves = _from_checkpoint(run, config, form, stage)
            card = model_card(run, config, curves, form=form, steps=steps)
            write_file(stage / "README.md", str(card))
        except Exception as cause:
            raise disk_error(out, cause) or cause from cause
    return out


def _config(run: RunDirectory) -> TrainConfig:
    file = run.path / "config.yaml"
    if not file.is_file():
        raise ExportError(f"'{file}' is missing, without which the run's model is not known; restore it.")
    return read_yaml(TrainConfig, file)


def _copy(source: Path, stage: Path) -> None:
    if not (source / "config.json").is_file() and not (source / "adapter_config.json").is_file():
        raise ExportError(f"'{source}' is missing or empty, though the run has ended; restore it, or train again.")
    files = [file for file in sorted(source.rglob("*")) if file.is_file()]
    _check_room(stage, sum(file.stat().st_size for file in files))
    for file in files:
        target = stage / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, target)


def _check_room(stage: Path, needed: int) -> None:
    """Say now what would else be found after gigabytes."""
    if shutil.disk_usage(stage).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _from_checkpoint(
    run: RunDirectory, config: TrainConfig, form: Form, stage: Path
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Build the model as the run did, and read the newest checkpoint; returns steps by stage, and what was logged."""
    kept = {name: found for name in config.stages() if (found := latest(run.path / STAGES / name))}
    if not kept:
        raise ExportError(
            f"'{run.path}' holds no whole checkpoint: the run has not ended, and none was written before it stopped. "
            "Go on with `keepsight train … --resume`."
        )
    try:
        model, processor = starting_model(run, config)
    except ChangedModelError as cause:
        raise ExportError(str(cause)) from cause
    adapted = None
    if any(config.uses_lora(config.stages()[name]) for name in kept):
        adapted = adapt(model, config.lora, quantise=False)
    learned = load_weights(model, list(kept.values())[-1], heads=False)
    _check_room(stage, sum(p.numel() * p.element_size() for n, p in model.named_parameters() if not is_adapter(n)))
    if form == "adapter":
        if adapted is None:
            raise ExportError(f"the run in '{run.path}' has not reached a stage with LoRA yet; export it as 'merged'.")
        assert config.model.path is not None
        save_adapter(adapted, learned, stage, base=config.model.path)
    else:
        model = model if adapted is None else adapted.merge_and_unload()
        model.save_pretrained(stage)
        processor.save_pretrained(stage)
    states = {name: read_state(folder) for name, folder in kept.items()}
    logged = [entry for name, state in states.items() for entry in curves_of(name, state["log_history"])]
    return {name: int(state["global_step"]) for name, state in states.items()}, logged
