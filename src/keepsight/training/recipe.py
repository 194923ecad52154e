"""The two-stage recipe: load, freeze, attach, train, detach, save. HF `Trainer` does the training."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback, set_seed

from keepsight.pre import attach
from keepsight.processes import rank
from keepsight.results import RUN_FILE, RunDirectory, StorageError, fingerprint
from keepsight.results.storage import disk_error
from keepsight.training import record
from keepsight.training.arguments import training_arguments
from keepsight.training.config import DataConfig, ModelConfig, TrainConfig
from keepsight.training.conversations import ConversationError, ConversationSource
from keepsight.training.data import ConversationDataset, load_source
from keepsight.training.encode import Encoder
from keepsight.training.freeze import train_only
from keepsight.training.lora import check_available, save_adapter, targets
from keepsight.training.sharding import load_whole, whole_weights, zero_stage
from keepsight.training.stages import Stages
from keepsight.vlm.load import load_model, with_adapter


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
    LoRA, adapter/ (the same as a PEFT adapter). Bad settings and bad data are refused before a step is taken; such
    a run, and one that fails in its first step, leaves no folder behind.

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
        StorageError: if the disk is full; what was trained up to the last checkpoint is kept.
    """
    check_available(config.lora)
    arguments = {name: training_arguments(config, name, stage) for name, stage in config.stages().items()}
    sharded = [name for name, given in arguments.items() if given.fsdp or zero_stage(given) == 3]
    if config.lora.rank is not None and sharded:
        engine = "FSDP (trainer.fsdp)" if arguments[sharded[0]].fsdp else "DeepSpeed's ZeRO-3"
        raise ValueError(
            f"lora.rank is {config.lora.rank} under {engine}: adapters cannot be joined from shards yet. "
            "Launch without it (one whole model a process; with LoRA it needs little beside its weights), or set "
            "lora.rank to null."
        )
    load_whole()
    main = rank() == 0
    resuming = resume and (Path(config.out) / RUN_FILE).is_file()
    if resuming and (there := RunDirectory.open(config.out)).info.get("finished") and not record.changes(there, config):
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
    stages = Stages(config, model, processor, datasets, callbacks, run, resuming=resuming)
    try:
        for number, name in enumerate(config.stages()):
            stages.train(number, name, arguments[name])
        _save(stages, before)
    except Exception as cause:
        if full := disk_error(Path(config.out), cause):
            told = StorageError(f"{full} Then repeat the command with --resume: it goes on from the last checkpoint.")
            told.errno = full.errno
            raise told from cause
        raise
    PartialState().wait_for_everyone()
    return run or RunDirectory.open(config.out)


def _save(stages: Stages, before: str) -> None:
    """Take PRe off, join adapters and shards, and write the model; every process must call it."""
    config, model, run = stages.config, stages.model, stages.run
    described = stages.detach()
    if stages.adapted is not None and run is not None:
        name = record.model_name(config.model)
        save_adapter(stages.adapted, stages.learned, run.path / record.ADAPTER, base=name)
    if stages.adapted is not None and not config.lora.load_in_4bit:
        model = stages.adapted.merge_and_unload()
    elif stages.adapted is not None and run is not None:  # into the weights themselves, not into their 4 bits
        model = with_adapter(build_model(config.model, seed=config.seed)[0], run.path / record.ADAPTER)
    model.requires_grad_(True)
    weights = whole_weights(model)
    if run is not None:
        model.save_pretrained(run.path / record.MODEL, state_dict=weights)
        stages.processor.save_pretrained(run.path / record.MODEL)
        named = {"name": record.model_name(config.model), "before": before, "fingerprint": fingerprint(weights)}
        run.update(model=named, **described, finished=True)


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
    for name, stage in config.stages().items():
        data = config.data_of(stage)
        if data not in sources:
            settings = {key: value for key, value in asdict(data).items() if key != "cache_megabytes"}
            sources[data] = load_source(**settings, skip_broken=config.skip_broken)
        if config.pre_in(stage).active and not sources[data].pictures:
            raise ConversationError(
                f"none of the {len(sources[data])} entries for the stage '{name}' has a usable picture, so predictive "
                f"regularization would do nothing: give data with pictures, or set {name}.pre: false (--{name}.pre "
                "false), which trains on text alone."
            )
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
