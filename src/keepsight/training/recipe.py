"""The two-stage recipe: load, freeze, attach, train, detach, save. HF `Trainer` does the training."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from transformers import PrinterCallback, Trainer, TrainerCallback, set_seed

from keepsight.images import ImageError
from keepsight.pre import Handle, PReConfig, attach
from keepsight.results import RUN_FILE, RunDirectory, fingerprint, write_file
from keepsight.training import record
from keepsight.training.arguments import STAGES, training_arguments
from keepsight.training.checkpoints import (
    Checkpoints,
    latest,
    load_weights,
    read_memory,
    read_state,
    save_weights,
)
from keepsight.training.collator import Collator
from keepsight.training.config import DataConfig, ModelConfig, TrainConfig
from keepsight.training.conversations import ConversationSource
from keepsight.training.data import ConversationDataset, load_source
from keepsight.training.encode import CutError, Encoder
from keepsight.training.freeze import parts, train_only
from keepsight.training.lora import adapt, check_available, merged, save_adapter, targets
from keepsight.training.sharding import is_sharded, whole_weights
from keepsight.training.trainer import PReTrainerMixin, set_apart
from keepsight.vlm.load import load_model


class KeepsightTrainer(PReTrainerMixin, Trainer):
    """HF `Trainer` with PRe, whose checkpoints hold what has learned, see `keepsight.training.checkpoints`."""

    learned: frozenset[str] = frozenset()
    projector_lr: float | None = None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.projector_lr is not None:
            set_apart(optimizer, parts(self.pre.vlm.model)["projector"], self.projector_lr, "keepsight_projector")
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        assert output_dir is not None
        if self.args.should_save:  # of a sharded model, all processes come here, and the main one has the weights
            save_weights(self.pre.vlm.model, Path(output_dir), self.learned, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_weights(self.pre.vlm.model, Path(resume_from_checkpoint))


def train(
    config: TrainConfig,
    *,
    model: Any = None,
    processor: Any = None,
    datasets: Mapping[str, ConversationDataset] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    resume: bool = False,
) -> RunDirectory:
    """Train as the configuration says and leave a plain transformers checkpoint in `<out>/model`.

    The run's folder holds config.yaml (the resolved configuration), run.json, curves.jsonl (the loss curves: a line
    for each log, with its stage), stages/ (what `Trainer` saves), model/ (weights and processor; LoRA merged) and, with
    LoRA, adapter/ (the same as a PEFT adapter). Bad settings and bad data are refused before a step is taken, and leave
    no folder behind.

    Args:
        config: the run.
        model, processor: instead of what `config.model` names; the model is trained in place.
        datasets: encoded data by stage, instead of what `config.data` names, so that runs can share a cache.
        callbacks: for the `Trainer` of each stage; where there are any, they report instead of its printed logs.
        resume: go on where the run in `config.out` stopped, from its newest whole checkpoint, bit for bit as if it
            had not (on CPU, with the same number of processes); start it where there is none.

    Raises:
        ValueError: for settings or data that cannot be used; the text says which and what to do. With `resume`, for
            a configuration that is not the run's.
        FileExistsError: if `config.out` holds a run or other files.
        DeadLossError: if PRe would train nothing.
    """
    check_available(config.lora)
    arguments = {name: training_arguments(config, name, stage) for name, stage in config.stages().items()}
    main = int(os.environ.get("RANK", "0")) == 0
    resuming = resume and (Path(config.out) / RUN_FILE).is_file()
    if (
        resuming
        and (there := RunDirectory.open(config.out)).info.get("finished")
        and not record.differences(there, config)
    ):
        return there  # in every process
    run = (record.reopen(config) if resuming else record.start(config)) if main else None
    try:
        set_seed(config.seed)
        sources = {} if datasets else _sources(config)  # before the model: cheap, and the likelier to be refused
        if model is not None and config.lora.load_in_4bit:
            raise ValueError("lora.load_in_4bit needs a model by name (config.model), not one in memory.")
        if model is None:
            model, processor = build_model(config.model, seed=config.seed)
        datasets = datasets or _datasets(config, sources, processor)
        for stage in config.stages().values():
            train_only(model, stage.train)
        if config.lora.rank is not None:
            targets(model, config.lora)
        with attach(model, config.pre):
            pass  # a layer that does not exist is refused here
        before = fingerprint(model)
        if run is not None:
            run.update(model={"name": record.model_name(config.model), "before": before})
    except BaseException:
        if run is not None and not resuming:
            record.undo(run)
        raise
    handle: Handle | None = None
    curves: list[dict[str, Any]] = []
    learned: set[str] = set()
    adapted: Any = None
    for number, (name, stage) in enumerate(config.stages().items()):
        if adapted is None and config.uses_lora(stage):
            set_seed(config.seed + number)
            adapted = adapt(model, config.lora)
        learning = train_only(model, stage.train)
        handle = _attach(model, config.pre_in(stage), handle)
        learned |= {key for key, parameter in model.named_parameters() if parameter.requires_grad}
        checkpoint = latest(Path(config.out) / STAGES / name) if resuming else None
        totals: dict[str, int] = {}
        if checkpoint is not None:
            memory, state = read_memory(checkpoint), read_state(checkpoint)
            handle.remember(memory)
            datasets[name].recall(memory["entries"])
            totals = memory["totals"]
            if state["global_step"] >= state["max_steps"]:
                load_weights(model, checkpoint)
                curves += record.curves_of(name, state["log_history"])
                if run is not None:
                    record.count(run, name, learning, state["global_step"], datasets[name], totals)
                continue
        set_seed(config.seed + number)  # of its own, so that a stage does not hang on how the one before was run
        datasets[name].prepare_with(handle.prepare if handle.needs_pictures else None)
        trainer = KeepsightTrainer(
            model=model,
            args=arguments[name],
            train_dataset=datasets[name],
            data_collator=Collator(processor),
            processing_class=processor,
            callbacks=[*callbacks],
        )
        trainer.pre_totals |= totals
        trainer.add_callback(
            Checkpoints(handle, partial(_found, trainer, datasets[name]), keep_weights=config.keep_weights)
        )
        trainer.learned, trainer.projector_lr = frozenset(learned), stage.projector_lr
        if callbacks:
            trainer.remove_callback(PrinterCallback)
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            trainer.read_log()
            _found(trainer, datasets[name])
        except (ImageError, CutError) as error:
            kept = latest(Path(config.out) / STAGES / name)
            if kept is not None:
                raise type(error)(f"{error} What was trained is kept: repeat the command with --resume.") from error
            if run is not None and not resuming and not curves:
                trainer.state.log_history = []
                shutil.rmtree(run.path / STAGES, ignore_errors=True)
                record.undo(run)
                run = None
            raise
        finally:
            curves += record.curves_of(name, trainer.state.log_history)
            if run is not None:
                write_file(run.path / record.CURVES, "".join(json.dumps(entry) + "\n" for entry in curves))
                record.count(run, name, learning, trainer.state.global_step, datasets[name], trainer.pre_totals)
    assert handle is not None
    layer, depth, width = handle.layer, handle.vlm.depth, handle.vlm.width
    handle.detach()
    if adapted is not None and run is not None:
        save_adapter(adapted, learned, run.path / record.ADAPTER, base=record.model_name(config.model))
    if adapted is not None and not config.lora.load_in_4bit:
        model = adapted.merge_and_unload()
    elif adapted is not None and run is not None:  # into the weights themselves, not into their 4 bits
        model = merged(build_model(config.model, seed=config.seed)[0], run.path / record.ADAPTER)
    model.requires_grad_(True)
    weights = whole_weights(model) if is_sharded(model) else model.state_dict()
    if run is not None:
        model.save_pretrained(run.path / record.MODEL, state_dict=weights)
        processor.save_pretrained(run.path / record.MODEL)
        described = {"name": record.model_name(config.model), "before": before, "fingerprint": fingerprint(weights)}
        used = any(config.pre_in(stage).active for stage in config.stages().values())
        run.update(model=described, depth=depth, width=width, pre_layer=layer if used else None, finished=True)
    PartialState().wait_for_everyone()
    return run or RunDirectory.open(config.out)


def build_model(config: ModelConfig, *, seed: int = 0) -> tuple[Any, Any]:
    """Load the model, or put it together from an encoder and a language model; with its processor."""
    if config.path is not None:
        return load_model(config.path, trust_remote_code=config.trust_remote_code, dtype=config.dtype)
    from keepsight.vlm.assemble import assemble

    assert config.vision is not None
    assert config.language is not None
    return assemble(
        config.vision,
        config.language,
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_size=config.image_size,
        dtype=torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype),
        seed=seed,
        trust_remote_code=config.trust_remote_code,
    )


def _sources(config: TrainConfig) -> dict[DataConfig, ConversationSource]:
    """The data that the stages name, checked; stages on the same data share it."""
    sources: dict[DataConfig, ConversationSource] = {}
    for stage in config.stages().values():
        data = config.data_of(stage)
        if data not in sources:
            settings = {name: value for name, value in asdict(data).items() if name != "cache_megabytes"}
            sources[data] = load_source(**settings, skip_broken=config.skip_broken)
    return sources


def _datasets(
    config: TrainConfig, sources: Mapping[DataConfig, ConversationSource], processor: Any
) -> dict[str, ConversationDataset]:
    """The stages' data sets; stages on the same data share one, and so its cache."""
    encoder = Encoder(processor, config.max_length)
    made = {
        data: ConversationDataset(source, encoder, skip_broken=config.skip_broken, cache_megabytes=data.cache_megabytes)
        for data, source in sources.items()
    }
    return {name: made[config.data_of(stage)] for name, stage in config.stages().items()}


def _attach(model: Any, wanted: PReConfig, handle: Handle | None) -> Handle:
    """PRe as a stage wants it: a head that goes on from the stage before, or one that does nothing."""
    if handle is not None and handle.config.active == wanted.active:
        handle.set_weight(wanted.weight, observe=wanted.observe)
        handle.follow()
        return handle
    if handle is not None:
        handle.detach()
    return attach(model, wanted)


def _found(trainer: KeepsightTrainer, dataset: ConversationDataset) -> dict[str, Any]:
    """What the run has found out so far about the data, in all processes (each must call this)."""
    states = dataset.states.to(trainer.args.device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(states, op=dist.ReduceOp.MAX)
    dataset.recall(states.cpu())
    return {"entries": dataset.states.clone(), "totals": dict(trainer.pre_totals)}
