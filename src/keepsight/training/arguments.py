"""A stage's settings → `transformers.TrainingArguments`, with every clash named."""

import dataclasses
import difflib
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from keepsight.processes import world_size
from keepsight.training.config import StageConfig, TrainConfig

# What the recipe's own fields decide, with the field to use instead.
OWNED = {
    "output_dir": "out",
    "seed": "seed",
    "data_seed": "seed",
    "learning_rate": "<stage>.lr",
    "per_device_train_batch_size": "<stage>.micro_batch_size",
    "gradient_accumulation_steps": "<stage>.batch_size",
    "num_train_epochs": "<stage>.epochs",
    "max_steps": "<stage>.max_steps",
    "warmup_steps": "<stage>.warmup_ratio",
    "warmup_ratio": "<stage>.warmup_ratio",
    "lr_scheduler_type": "<stage>.lr_scheduler",
    "weight_decay": "<stage>.weight_decay",
    "save_strategy": "save_steps",
    "save_steps": "save_steps",
    "save_total_limit": "keep_weights",  # an older checkpoint stays until the new one is whole
    "save_only_model": "keep_weights",  # --resume needs the optimizer
    "resume_from_checkpoint": "--resume",
    "remove_unused_columns": "nothing: it must stay off",
}


STAGES = "stages"  # the folder of a run that holds what `Trainer` saves


def check_trainer_settings(settings: dict[str, Any]) -> None:
    """Refuse names that `TrainingArguments` does not have, and those that the recipe's own fields decide.

    Raises:
        ValueError: naming the setting and what to write instead.
    """
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    for name in settings:
        if name in OWNED:
            raise ValueError(f"trainer.{name} is decided by the recipe: use {OWNED[name]} instead.")
        if name not in known:
            near = difflib.get_close_matches(name, known - set(OWNED), n=3)
            hint = f"; near it are {', '.join(near)}" if near else ""
            raise ValueError(f"trainer.{name} is no field of transformers.TrainingArguments{hint}.")


def training_arguments(config: TrainConfig, name: str, stage: StageConfig) -> TrainingArguments:
    """The HF arguments of one stage.

    Raises:
        ValueError: if the batch cannot be divided over processes and micro-batches, if several GPUs are visible to one
            process, or if transformers refuses a setting.
    """
    check_trainer_settings(config.trainer)
    processes = world_size()
    micro = stage.micro_batch_size or max(1, stage.batch_size // processes)
    if stage.batch_size % (micro * processes):
        raise ValueError(
            f"{name}.batch_size is {stage.batch_size}, which {processes} process{'es' * (processes > 1)} with "
            f"{name}.micro_batch_size {micro} cannot make up; choose a micro_batch_size that divides "
            f"{stage.batch_size} / {processes}."
        )
    if processes == 1 and torch.cuda.device_count() > 1 and not config.trainer.get("use_cpu"):
        raise ValueError(
            f"{torch.cuda.device_count()} GPUs are visible to one process; start one process for each with "
            "torchrun --nproc_per_node, or choose one with CUDA_VISIBLE_DEVICES."
        )
    settings: dict[str, Any] = {
        "logging_steps": 10,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_find_unused_parameters": not _reentrant(config.trainer),
        **config.trainer,
    }
    try:
        return TrainingArguments(
            output_dir=str(Path(config.out) / STAGES / name),
            seed=config.seed,
            learning_rate=stage.lr,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=stage.batch_size // (micro * processes),
            num_train_epochs=stage.epochs,
            max_steps=stage.max_steps or -1,
            warmup_steps=stage.warmup_ratio,
            lr_scheduler_type=stage.lr_scheduler,
            weight_decay=stage.weight_decay,
            save_strategy="no" if config.save_steps is None else "steps",
            save_steps=_on_logged_steps(config.save_steps, settings),
            remove_unused_columns=False,
            **settings,
        )
    except (ValueError, TypeError) as cause:
        raise ValueError(f"transformers refuses the trainer settings of stage '{name}': {cause}") from cause


def _reentrant(settings: dict[str, Any]) -> bool:
    """Whether checkpointing is of the kind under which DDP must not look for unused parameters.

    Else it must: an encoder that learns has layers behind the one that is read. `Trainer` lets it only without
    checkpointing.
    """
    names = ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
    return any((settings.get(name) or {}).get("use_reentrant") for name in names)


def _on_logged_steps(save_steps: int | None, settings: dict[str, Any]) -> int:
    """`save_steps` rounded up to a logged step: between two logs `Trainer` holds sums that no checkpoint has.

    Raises:
        ValueError: for logging that is not every so many steps.
    """
    logging = settings["logging_steps"]
    if save_steps is None:
        return 500  # not used
    if settings.get("logging_strategy", "steps") != "steps" or logging < 1 or logging != int(logging):
        raise ValueError(
            f"trainer.logging_strategy is {settings.get('logging_strategy', 'steps')!r} and trainer.logging_steps "
            f"{logging}, with save_steps {save_steps}: checkpoints must fall on logged steps, or a resumed run's "
            "curves would differ. Log every so many whole steps, or set save_steps to null for no checkpoints."
        )
    return -(-save_steps // int(logging)) * int(logging)
