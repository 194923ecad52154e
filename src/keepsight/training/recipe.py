"""The two-stage recipe: load, freeze, attach, train, detach, save. HF `Trainer` does the training."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PrinterCallback, Trainer, TrainerCallback, set_seed

from keepsight.images import ImageError
from keepsight.pre import Handle, attach
from keepsight.results import RUN_FILE, RunDirectory, fingerprint, write_file
from keepsight.training.arguments import STAGES, training_arguments
from keepsight.training.checkpoints import (
    Checkpoints,
    latest,
    load_weights,
    read_memory,
    read_state,
    remove_halves,
    save_weights,
)
from keepsight.training.collator import Collator
from keepsight.training.config import DataConfig, ModelConfig, StageConfig, TrainConfig
from keepsight.training.conversations import ConversationSource
from keepsight.training.data import ConversationDataset, load_source
from keepsight.training.encode import CutError, Encoder
from keepsight.training.freeze import parts, train_only
from keepsight.training.lora import adapt, check_available, merged, save_adapter, targets
from keepsight.training.sharding import is_sharded, whole_weights
from keepsight.training.trainer import PReTrainerMixin, set_apart
from keepsight.vlm.load import load_model

CURVES = "curves.jsonl"
# What may differ when a run goes on, because it does not change what is learned.
_FREE = {"label", "out", "save_steps", "skip_broken"}
MODEL = "model"
ADAPTER = "adapter"


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
    if resuming and (there := RunDirectory.open(config.out)).info.get("finished") and not _differences(there, config):
        return there  # in every process
    run = (_reopen(config) if resuming else _start(config)) if main else None
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
            run.update(model={"name": _model_name(config.model), "before": before})
    except BaseException:
        if run is not None and not resuming:
            _undo(run)
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
        handle = _attach(model, config, stage, handle)
        learned |= {key for key, parameter in model.named_parameters() if parameter.requires_grad}
        checkpoint = latest(Path(config.out) / STAGES / name) if resuming else None
        if checkpoint is not None:
            handle.remember(read_memory(checkpoint))
            state = read_state(checkpoint)
            if state["global_step"] >= state["max_steps"]:
                load_weights(model, checkpoint)
                curves += _curves(name, state["log_history"])
                continue
        set_seed(config.seed + number)  # of its own, so that a stage does not hang on how the one before was run
        datasets[name].prepare_with(handle.prepare if handle.needs_pictures else None)
        trainer = KeepsightTrainer(
            model=model,
            args=arguments[name],
            train_dataset=datasets[name],
            data_collator=Collator(processor),
            processing_class=processor,
            callbacks=[*callbacks, Checkpoints(handle)],
        )
        trainer.learned, trainer.projector_lr = frozenset(learned), stage.projector_lr
        if callbacks:
            trainer.remove_callback(PrinterCallback)
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except (ImageError, CutError) as error:
            kept = latest(Path(config.out) / STAGES / name)
            if kept is not None:
                raise type(error)(f"{error} What was trained is kept: repeat the command with --resume.") from error
            if run is not None and not resuming and not curves:
                trainer.state.log_history = []
                shutil.rmtree(run.path / STAGES, ignore_errors=True)
                _undo(run)
                run = None
            raise
        finally:
            curves += _curves(name, trainer.state.log_history)
            if run is not None:
                write_file(run.path / CURVES, "".join(json.dumps(entry) + "\n" for entry in curves))
                counts = {**run.info["counts"], **_counts(name, learning, trainer, datasets[name])}
                run.update(counts=counts, **{f"skipped_{name}": datasets[name].skipped_names()})
    assert handle is not None
    layer, depth, width = handle.layer, handle.vlm.depth, handle.vlm.width
    handle.detach()
    if adapted is not None and run is not None:
        save_adapter(adapted, learned, run.path / ADAPTER, base=_model_name(config.model))
    if adapted is not None and not config.lora.load_in_4bit:
        model = adapted.merge_and_unload()
    elif adapted is not None and run is not None:  # into the weights themselves, not into their 4 bits
        model = merged(build_model(config.model, seed=config.seed)[0], run.path / ADAPTER)
    model.requires_grad_(True)
    weights = whole_weights(model) if is_sharded(model) else model.state_dict()
    if run is not None:
        model.save_pretrained(run.path / MODEL, state_dict=weights)
        processor.save_pretrained(run.path / MODEL)
        described = {"name": _model_name(config.model), "before": before, "fingerprint": fingerprint(weights)}
        used = any(stage.pre for stage in config.stages().values()) and config.pre.active
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


def read_curves(path: str | Path) -> list[dict[str, Any]]:
    """The loss curves of a run's folder: what `Trainer` logged, each entry with its `stage`."""
    lines = (Path(path) / CURVES).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


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


def _attach(model: Any, config: TrainConfig, stage: StageConfig, handle: Handle | None) -> Handle:
    """PRe as the stage wants it: a head that goes on from the stage before, or one that does nothing."""
    wanted = config.pre if stage.pre else replace(config.pre, weight=0.0, observe=False)
    if handle is not None:
        if handle.config == wanted:
            return handle
        handle.detach()
    return attach(model, wanted)


def _start(config: TrainConfig) -> RunDirectory:
    run = RunDirectory.create(
        config.out,
        label=config.label or Path(config.out).name,
        model=_model_name(config.model),
        seed=config.seed,
        kind="training",
    )
    run.write_config(config)
    return run


def _reopen(config: TrainConfig) -> RunDirectory:
    """The run to go on with.

    Raises:
        ValueError: if it was started with another configuration.
    """
    run = RunDirectory.open(config.out)
    different = _differences(run, config)
    if different:
        listed = "; ".join(f"{name}: {was!r}, now {now!r}" for name, (was, now) in list(different.items())[:5])
        raise ValueError(
            f"'{config.out}' was started with another configuration ({listed}). Go on with the recipe and flags it was "
            "started with (its config.yaml), or train into another folder."
        )
    for name in config.stages():
        remove_halves(run.path / STAGES / name)
    run.write_config(config)
    return run


def _differences(run: RunDirectory, config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    return {name: both for name, both in run.differences(config).items() if name not in _FREE}


def _curves(stage: str, history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was logged, without `Trainer`'s closing line, whose times and mean know only the part after a resume."""
    return [{"stage": stage, **entry} for entry in history if "train_runtime" not in entry]


def _undo(run: RunDirectory) -> None:
    """Take back a run that took no step, so that the corrected command can use the folder."""
    for name in ("run.json", "config.yaml"):
        (run.path / name).unlink(missing_ok=True)
    if run.path.is_dir() and not any(run.path.iterdir()):
        run.path.rmdir()


def _model_name(config: ModelConfig) -> str:
    return config.path if config.path is not None else f"{config.vision} + {config.language}"


def _counts(name: str, learning: int, trainer: Trainer, dataset: ConversationDataset) -> dict[str, int]:
    seen = {"entries": len(dataset), "steps": trainer.state.global_step, "parameters trained": learning}
    return {f"{name}: {key}": value for key, value in (seen | dict(dataset.skipped())).items()}
