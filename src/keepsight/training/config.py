"""What a training run is: the model, the data, two stages, PRe. One YAML recipe; any field is a flag."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from keepsight.pre.config import PReConfig

Part = Literal["projector", "language_model", "encoder"]
PARTS: tuple[Part, ...] = ("projector", "language_model", "encoder")
STAGES = ("projector", "full")


@dataclass(frozen=True)
class ModelConfig:
    """Where the model comes from: a whole model (`path`), or an encoder and a language model to put together.

    Attributes:
        path: directory or hub id of an image-text-to-text model.
        vision: directory or hub id of the vision encoder, where the model is put together.
        language: directory or hub id of the language model, where the model is put together.
        vision_feature_layer: which hidden state of the encoder is handed over; -2 as in LLaVA-1.5.
        vision_feature_select_strategy: "default" leaves out the encoder's class token, "full" keeps all tokens; null
            lets the encoder decide.
        image_size: side of the square input in pixels; null = the image processor's own.
        dtype: of the weights: "auto" (the checkpoint's; float32 where the model is put together), "float32",
            "bfloat16" or "float16".
        trust_remote_code: run Python code that comes with the checkpoint. Off unless you know its author.
    """

    path: str | None = None
    vision: str | None = None
    language: str | None = None
    vision_feature_layer: int = -2
    vision_feature_select_strategy: Literal["default", "full"] | None = None
    image_size: int | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        parts = (self.vision is not None, self.language is not None)
        if self.path is None and parts != (True, True):
            raise ValueError(
                f"model has path=None, vision={self.vision!r}, language={self.language!r}; give either `model.path`, "
                "or both `model.vision` and `model.language`."
            )
        if self.path is not None and any(parts):
            raise ValueError(
                f"model has path={self.path!r} and vision={self.vision!r}, language={self.language!r}; give either "
                "`model.path`, or both `model.vision` and `model.language`, not all."
            )


@dataclass(frozen=True)
class DataConfig:
    """Training conversations: LLaVA's JSON with a picture folder, or a HuggingFace data set.

    Attributes:
        conversations: LLaVA's JSON (or JSON lines) file.
        image_folder: the folder in which its pictures lie; nothing outside it is read.
        dataset: a HuggingFace data set with `messages` and `images`: saved on disk, or a hub id.
        split: of the HuggingFace data set.
        cache_megabytes: keep encoded samples in memory up to this size; for small sets read several times.
    """

    conversations: str | None = None
    image_folder: str | None = None
    dataset: str | None = None
    split: str = "train"
    cache_megabytes: int = 0

    def __post_init__(self) -> None:
        if self.conversations is not None and self.dataset is not None:
            raise ValueError(
                f"data has conversations={self.conversations!r} and dataset={self.dataset!r}; give one of the two."
            )
        if self.cache_megabytes < 0:
            raise ValueError(f"cache_megabytes is {self.cache_megabytes}; allowed: 0 (no cache) or more.")

    @property
    def given(self) -> bool:
        """Whether it names any data."""
        return self.conversations is not None or self.dataset is not None


@dataclass(frozen=True)
class LoraConfig:
    """LoRA: in the stages that train the language model, small matrices beside its weights learn instead of these.

    LLaVA's published settings are rank 128, alpha 256, dropout 0.05, `full.lr` 2e-4 and `full.projector_lr` 2e-5.

    Attributes:
        rank: of the matrices; null = no LoRA.
        alpha: the matrices' product counts alpha / rank; null = twice the rank.
        dropout: on what goes into the matrices.
        target_modules: names of the language model's linear layers that get them, such as [q_proj, v_proj]; null =
            all of them. Never the encoder's, the projector's or the output layer.
        load_in_4bit: hold the weights beside them in 4 bits (QLoRA; needs bitsandbytes and CUDA).
    """

    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.05
    target_modules: tuple[str, ...] | None = None
    load_in_4bit: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, list):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"lora.rank is {self.rank}; allowed: 1 or more, or null for no LoRA.")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"lora.alpha is {self.alpha}; allowed: a number above 0, or null for twice the rank.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout is {self.dropout}; allowed: 0 up to, not including, 1.")
        if self.target_modules is not None and not self.target_modules:
            raise ValueError("lora.target_modules is an empty list; give names such as [q_proj, v_proj], or null.")
        given = [name for name in ("alpha", "target_modules", "load_in_4bit") if getattr(self, name)]
        if self.rank is None and given:
            raise ValueError(f"lora.{given[0]} is {getattr(self, given[0])!r} without LoRA; set lora.rank (128).")

    @property
    def numerator(self) -> float:
        """`alpha`, its default resolved."""
        return self.alpha if self.alpha is not None else 2.0 * (self.rank or 0)


@dataclass(frozen=True)
class StageConfig:
    """One stage of training.

    Attributes:
        enabled: whether the stage is run.
        train: the parts that learn: "projector", "language_model", "encoder"; the others are frozen.
        lr: peak learning rate.
        projector_lr: the projector's, where it is another; null = lr.
        batch_size: samples per optimizer step, over all processes.
        micro_batch_size: samples per process and forward; null = batch_size over the number of processes. What is
            missing to batch_size is accumulated.
        epochs: passes over the data; max_steps wins where both are given.
        max_steps: optimizer steps.
        warmup_ratio: share of the steps in which the learning rate rises.
        lr_scheduler: "cosine", "linear", "constant" or "constant_with_warmup".
        weight_decay: of AdamW.
        pre: whether PRe acts in this stage.
        pre_weight: λ in this stage, where it is another than `pre.weight`; the head goes on from stage to stage.
        data: the stage's own data; left empty, that of the run.
    """

    enabled: bool = True
    train: tuple[Part, ...] = ("projector",)
    lr: float = 1e-3
    projector_lr: float | None = None
    batch_size: int = 256
    micro_batch_size: int | None = None
    epochs: float = 1.0
    max_steps: int | None = None
    warmup_ratio: float = 0.03
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    weight_decay: float = 0.0
    pre: bool = True
    pre_weight: float | None = None
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        if not self.train or not set(self.train) <= set(PARTS):
            raise ValueError(f"train is {list(self.train)}; allowed: one or more of {list(PARTS)}.")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr is {self.lr}; allowed: a finite number above 0.")
        if self.projector_lr is not None:
            if not (math.isfinite(self.projector_lr) and self.projector_lr > 0):
                raise ValueError(f"projector_lr is {self.projector_lr}; allowed: a number above 0, or null for lr.")
            if "projector" not in self.train:
                raise ValueError(f"projector_lr is {self.projector_lr} and train is {list(self.train)}; add projector.")
        for name in ("batch_size", "micro_batch_size", "max_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; allowed: 1 or more.")
        if self.pre_weight is not None and not (math.isfinite(self.pre_weight) and self.pre_weight >= 0):
            raise ValueError(f"pre_weight is {self.pre_weight}; allowed: 0 or more, or null for pre.weight.")
        if self.pre_weight is not None and not self.pre:
            raise ValueError(f"pre_weight is {self.pre_weight} and pre is false; set one of them: false is λ = 0.")
        if not (math.isfinite(self.epochs) and self.epochs > 0):
            raise ValueError(f"epochs is {self.epochs}; allowed: a finite number above 0.")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio is {self.warmup_ratio}; allowed: 0 up to, not including, 1.")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay is {self.weight_decay}; allowed: 0 or more.")


def _full_stage() -> StageConfig:
    return StageConfig(train=("projector", "language_model"), lr=2e-5, batch_size=128)


@dataclass(frozen=True)
class TrainConfig:
    """A training run in two stages, LLaVA's: the projector alone, then the projector with the language model.

    The defaults are LLaVA-1.5's published hyperparameters, and the paper's for PRe. Relative paths start at the
    working directory.

    Attributes:
        out: the run's folder; it must not hold a run yet. From the command line, runs/<names of the recipes> unless
            it is set.
        label: the run's name in reports; null = the folder's name.
        seed: of data order, initialisation and dropout.
        max_length: longest sequence, picture tokens included; null = no limit. Pictures are never cut.
        save_steps: optimizer steps between checkpoints, from which --resume goes on (rounded up to a multiple of
            trainer.logging_steps); one is also written at the end of each stage. null = none.
        keep_weights: keep the weights of every checkpoint (not its optimizer), so that `keepsight attribute` can look
            at the model over its training; else only the newest checkpoint stays.
        skip_broken: leave out and count entries whose pictures cannot be read or would be cut, instead of stopping.
        trainer: further `transformers.TrainingArguments`, for both stages, such as {bf16: true}.
    """

    model: ModelConfig
    out: str
    label: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    projector: StageConfig = field(default_factory=StageConfig)
    full: StageConfig = field(default_factory=_full_stage)
    pre: PReConfig = field(default_factory=PReConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    seed: int = 0
    max_length: int | None = 2048
    save_steps: int | None = 500
    keep_weights: bool = False
    skip_broken: bool = False
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.out:
            raise ValueError("out is not set; give the folder of the run with `out:` or --out.")
        stages = self.stages()
        if not stages:
            raise ValueError("no stage is enabled; set projector.enabled or full.enabled.")
        for name, stage in stages.items():
            if not self.data_of(stage).given:
                raise ValueError(
                    f"stage '{name}' has no data; set `data.conversations` (LLaVA JSON) or `data.dataset` "
                    f"(HuggingFace), or the stage's own `{name}.data.…`."
                )
        if self.lora.rank is not None and not any(self.uses_lora(stage) for stage in stages.values()):
            raise ValueError(
                f"lora.rank is {self.lora.rank} and no stage trains the language model: add language_model to a "
                "stage's `train`, or set lora.rank to null."
            )
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; allowed: 0 or more.")
        if self.save_steps is not None and self.save_steps < 1:
            raise ValueError(f"save_steps is {self.save_steps}; allowed: 1 or more, or null for no checkpoints.")
        if self.keep_weights and self.save_steps is None:
            raise ValueError("keep_weights is on and save_steps is null, so there are no checkpoints; set save_steps.")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length is {self.max_length}; allowed: 1 or more, or null for no limit.")

    def stages(self) -> dict[str, StageConfig]:
        """The stages that are run, in order."""
        return {name: stage for name in STAGES if (stage := getattr(self, name)).enabled}

    def uses_lora(self, stage: StageConfig) -> bool:
        """Whether the stage trains adapters in place of the language model's weights."""
        return self.lora.rank is not None and "language_model" in stage.train

    def weight_in(self, stage: StageConfig) -> float:
        """λ in the stage."""
        return self.pre_in(stage).weight

    def pre_in(self, stage: StageConfig) -> PReConfig:
        """PRe as the stage wants it; `observe` is for stages with λ = 0."""
        if not stage.pre:
            return replace(self.pre, weight=0.0, observe=False)
        if stage.pre_weight is None:
            return self.pre
        return replace(self.pre, weight=stage.pre_weight, observe=self.pre.observe and stage.pre_weight == 0)

    @property
    def uses_pre(self) -> bool:
        """Whether PRe trains the model in any stage."""
        return any(self.weight_in(stage) > 0 for stage in self.stages().values())

    def data_of(self, stage: StageConfig) -> DataConfig:
        """The stage's own data, else the run's."""
        return stage.data if stage.data.given else self.data
