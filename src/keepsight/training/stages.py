"""The stages of a run, one after another: freeze, attach, train, and keep what goes from one stage to the next."""

import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from keepsight.images import ImageError
from keepsight.pre import Handle, PReConfig, attach
from keepsight.results import RunDirectory, write_file
from keepsight.training import record
from keepsight.training.arguments import STAGES
from keepsight.training.checkpoints import (
    Checkpoints,
    latest,
    load_weights,
    read_seen,
    read_state,
    save_weights,
)
from keepsight.training.collator import Collator
from keepsight.training.config import StageConfig, TrainConfig
from keepsight.training.conversations import ConversationError
from keepsight.training.data import ConversationDataset
from keepsight.training.encode import CutError
from keepsight.training.freeze import parts, train_only
from keepsight.training.lora import adapt
from keepsight.training.sharding import check_deepspeed, is_sharded, release, whole_weights
from keepsight.training.trainer import PReTrainerMixin, set_apart


class KeepsightTrainer(PReTrainerMixin, Trainer):
    """HF `Trainer` with PRe, whose checkpoints hold what has learned, see `keepsight.training.checkpoints`.

    Its log also counts what was left out or shortened so far, one number a reason, such as
    ``skipped_unreadable_image``.
    """

    learned: frozenset[str] = frozenset()
    projector_lr: float | None = None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.projector_lr is not None:
            set_apart(optimizer, parts(self.pre.vlm.model)["projector"], self.projector_lr, "keepsight_projector")
        return optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and isinstance(self.train_dataset, ConversationDataset):
            _agree(self, self.train_dataset)
            skipped = self.train_dataset.skipped()
            logs |= {f"skipped_{reason.replace(' ', '_')}": float(count) for reason, count in skipped.items()}
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        assert output_dir is not None
        model = self.pre.vlm.model
        # ZeRO-3's settings may gather no weights to be saved; FSDP2 gives them to the main process, and the rest none.
        if state_dict is not None and not state_dict and not is_sharded(model):
            state_dict = whole_weights(model)
        if self.args.should_save:  # of a sharded model, all processes come here, and the main one has the weights
            save_weights(model, Path(output_dir), self.learned, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_weights(self.pre.vlm.model, Path(resume_from_checkpoint))


class Stages:
    """What a run's stages share.

    Args:
        run: where curves and counts are written; None in all processes but the main one.
        resuming: begin each stage from its newest whole checkpoint.

    Attributes:
        model: trained in place. adapted: PEFT's view of it, once a stage trained adapters.
        learned: names of the parameters that learned in any stage so far.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Any,
        processor: Any,
        datasets: Mapping[str, ConversationDataset],
        callbacks: Sequence[TrainerCallback],
        run: RunDirectory | None,
        *,
        resuming: bool,
    ) -> None:
        self.config = config
        self.model = model
        self.processor = processor
        self.datasets = datasets
        self.callbacks = callbacks
        self.run = run
        self.resuming = resuming
        self.adapted: Any = None
        self.learned: set[str] = set()
        self._handle: Handle | None = None
        self._curves: list[dict[str, Any]] = []

    def train(self, number: int, name: str, arguments: TrainingArguments) -> None:
        """Train a stage, or what a stopped run left of it.

        Raises:
            ImageError, CutError, ConversationError: for data that cannot be used.
            DeadLossError: if PRe would train nothing.

        Before the first checkpoint, bad data takes the run back, and so does whatever fails in the first step (a batch
        too large for the memory), so that the corrected command can use the folder.
        """
        stage, dataset = self.config.stages()[name], self.datasets[name]
        if self.adapted is None and self.config.uses_lora(stage):
            set_seed(self.config.seed + number)
            self.adapted = adapt(self.model, self.config.lora)
        learning = train_only(self.model, stage.train)
        handle = self._handle = _attach(self.model, self.config.pre_in(stage), self._handle)
        self.learned |= {key for key, parameter in self.model.named_parameters() if parameter.requires_grad}
        checkpoint = self._kept(name) if self.resuming else None
        totals: dict[str, int] = {}
        if checkpoint is not None:
            seen, state = read_seen(checkpoint), read_state(checkpoint)
            dataset.recall(seen["entries"])
            totals = seen["totals"]
            if state["global_step"] >= state["max_steps"]:  # the next stage goes on from its last picture, too
                load_weights(self.model, checkpoint)
                handle.load_memory(checkpoint)
                self._write(name, learning, state["global_step"], state["log_history"], totals)
                return
        set_seed(self.config.seed + number)  # of its own, so that a stage does not hang on how the one before was run
        dataset.prepare_with(handle.prepare if handle.needs_pictures else None)
        trainer: KeepsightTrainer | None = None
        try:
            trainer = self._trainer(stage, dataset, handle, arguments)  # which refuses what only it can know
            trainer.pre_totals |= totals
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            trainer.read_log()
            _found(trainer, dataset)
            release(trainer)
        except Exception as error:
            unusable = isinstance(error, (ImageError, CutError, ConversationError))
            kept = any(self._kept(stage_name) is not None for stage_name in self.config.stages())
            if unusable and kept:
                raise type(error)(f"{error} What was trained is kept: repeat the command with --resume.") from error
            begun = trainer is not None and trainer.state.global_step > 0
            nothing = not (kept or self.resuming or self._curves) and (unusable or not begun)
            if self.run is not None and nothing:
                if trainer is not None:
                    trainer.state.log_history = []
                shutil.rmtree(self.run.path / STAGES, ignore_errors=True)
                record.undo(self.run)
                self.run = None
            raise
        finally:
            if trainer is not None:
                self._write(name, learning, trainer.state.global_step, trainer.state.log_history, trainer.pre_totals)

    def detach(self) -> dict[str, Any]:
        """Take PRe off the model; returns depth, width and PRe's layer for run.json."""
        handle = self._handle
        assert handle is not None
        used = any(self.config.pre_in(stage).active for stage in self.config.stages().values())
        described = {
            "depth": handle.vlm.depth,
            "width": handle.vlm.width,
            "pre_layer": handle.layer if used else None,
        }
        handle.detach()
        return described

    def _write(
        self, name: str, learning: int, steps: int, history: list[dict[str, Any]], totals: Mapping[str, int]
    ) -> None:
        """The curves so far, and the stage's counts; also of a stage that ended and was killed before this."""
        self._curves += record.curves_of(name, history)
        if self.run is not None:
            write_file(self.run.path / record.CURVES, "".join(json.dumps(entry) + "\n" for entry in self._curves))
            record.count(self.run, name, learning, steps, self.datasets[name], totals)

    def _kept(self, name: str) -> Path | None:
        return latest(Path(self.config.out) / STAGES / name)

    def _trainer(
        self, stage: StageConfig, dataset: ConversationDataset, handle: Handle, arguments: TrainingArguments
    ) -> KeepsightTrainer:
        trainer = KeepsightTrainer(
            model=self.model,
            args=arguments,
            train_dataset=dataset,
            data_collator=Collator(self.processor),
            processing_class=self.processor,
            callbacks=[*self.callbacks],
        )
        check_deepspeed(trainer.accelerator, handle, projector_lr=stage.projector_lr)
        found = partial(_found, trainer, dataset)
        trainer.add_callback(Checkpoints(found, keep_weights=self.config.keep_weights))
        trainer.learned, trainer.projector_lr = frozenset(self.learned), stage.projector_lr
        if self.callbacks:
            trainer.remove_callback(PrinterCallback)
        return trainer


def _attach(model: Any, wanted: PReConfig, handle: Handle | None) -> Handle:
    """PRe as a stage wants it: a head that goes on from the stage before, or one that does nothing."""
    if handle is not None and handle.config.active == wanted.active:
        handle.set_weight(wanted.weight, observe=wanted.observe)
        handle.follow()
        return handle
    if handle is not None:
        handle.detach()
    return attach(model, wanted)


def _agree(trainer: Trainer, dataset: ConversationDataset) -> None:
    """Let all processes know what any has found out about the entries (each must call this)."""
    states = dataset.states.to(trainer.args.device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(states, op=dist.ReduceOp.MAX)
    dataset.recall(states.cpu())


def _found(trainer: KeepsightTrainer, dataset: ConversationDataset) -> dict[str, Any]:
    """What the run has found out so far about the data, in all processes (each must call this)."""
    _agree(trainer, dataset)
    return {"entries": dataset.states.clone(), "totals": trainer.read_totals()}
