"""The model card of an exported checkpoint: what was trained on what, how, and where the curves ended."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from keepsight.results import RunDirectory
from keepsight.results.provenance import versions
from keepsight.training.config import DataConfig, TrainConfig
from keepsight.training.record import PROGRESS

# What is shown of the last logged step of a stage.
LOGGED = {
    "step": "step",
    "lm_loss": "language-model loss",
    "pre_loss": "L_PRe",
    "pre_cosine": "cosine to the anchor",
    "pre_margin": "margin over another picture's anchor",
}


def model_card(
    run: RunDirectory,
    config: TrainConfig,
    curves: Iterable[Mapping[str, Any]],
    *,
    form: str,
    steps: Mapping[str, int] | None,
) -> ModelCard:
    """The card of a run's export.

    Args:
        curves: what was logged, each entry with its stage.
        form: "merged" or "adapter".
        steps: of a checkpoint of an unfinished run, the steps taken by stage; None for a finished run.
    """
    model = config.model
    data = ModelCardData(
        base_model=_on_the_hub(model.path, model.vision, model.language) or None,
        datasets=_on_the_hub(*(config.data_of(stage).dataset for stage in config.stages().values())) or None,
        library_name="peft" if form == "adapter" else "transformers",
        pipeline_tag="image-text-to-text",
        tags=["keepsight", *(["predictive-regularization"] if config.uses_pre else [])],
    )
    parts = [
        f"# {run.label}",
        _summary(run, config, form, steps),
        "## Use",
        f"```python\n{_USE_ADAPTER if form == 'adapter' else _USE}```",
        "## Training",
        _stages(run, config, steps),
        "## The last logged step",
        _last(config, list(curves)),
        "## How it was made",
        _made(run, config),
        f"<details><summary>configuration</summary>\n\n```yaml\n{_text(run)}```\n\n</details>",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


_USE = """from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(FOLDER)
processor = AutoProcessor.from_pretrained(FOLDER)
"""
_USE_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForImageTextToText

model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(BASE_MODEL), FOLDER)
"""


def _on_the_hub(*names: str | None) -> list[str]:
    """Those that are hub ids, not folders of somebody's machine."""
    found = [n for n in names if n and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", n) and not Path(n.split("/")[0]).exists()]
    return list(dict.fromkeys(found))


def _summary(run: RunDirectory, config: TrainConfig, form: str, steps: Mapping[str, int] | None) -> str:
    model = config.model
    origin = _code(model.path) if model.path else f"{_code(model.vision)} and {_code(model.language)}, put together"
    text = f"{origin}, trained by [keepsight](https://arxiv.org/abs/2603.20808) {_pre(run, config)}."
    if form == "adapter":
        text += " These files are an adapter; they need the model that they stand on."
    if steps is not None:
        taken = ", ".join(f"{name} after {number} steps" for name, number in steps.items())
        text += f" **The run had not ended**: this is its newest checkpoint ({taken})."
    return text


def _pre(run: RunDirectory, config: TrainConfig) -> str:
    pre = config.pre
    if not config.uses_pre:
        return "without predictive regularization (λ = 0): a baseline"
    layer, depth = run.info.get("pre_layer"), run.info.get("depth")
    where = f"layer {layer} of {depth}" if layer and depth else f"layer {pre.layer}"
    weights = dict.fromkeys(f"{weight:g}" for s in config.stages().values() if (weight := config.weight_in(s)) > 0)
    anchor = f"{pre.anchor} ({_code(pre.anchor_model)})" if pre.anchor_model else pre.anchor
    control = f", control {pre.control}" if pre.control else ""
    return (
        f"with predictive regularization: λ = {' and '.join(weights)}, {where}, anchor {anchor}, {pre.granularity} "
        f"{pre.distance}{control}. Its head is not in these files"
    )


def _stages(run: RunDirectory, config: TrainConfig, steps: Mapping[str, int] | None) -> str:
    rows = []
    for name, stage in config.stages().items():
        taken = run.info["counts"].get(f"{name}: steps", 0) if steps is None else steps.get(name, 0)
        lora = config.uses_lora(stage)
        rows.append(
            {
                "stage": name,
                "learned": ", ".join("LoRA" if lora and p == "language_model" else p for p in stage.train),
                "data": _data(config.data_of(stage)),
                "steps": taken,
                "batch": stage.batch_size,
                "learning rate": f"{stage.lr:g}"
                + (f" (projector {stage.projector_lr:g})" if stage.projector_lr else ""),
                "λ": f"{config.weight_in(stage):g}",
            }
        )
    text = _table(rows)
    if config.lora.rank is not None:
        text += (
            f"\n\nLoRA: rank {config.lora.rank}, alpha {config.lora.numerator:g}, dropout {config.lora.dropout:g}, on "
            f"{', '.join(config.lora.target_modules or ('all linear layers of the language model',))}"
            f"{', over weights in 4 bits' if config.lora.load_in_4bit else ''}."
        )
    left = {key: n for key, n in run.info["counts"].items() if key.split(": ")[1] not in PROGRESS}
    if left:
        text += "\n\nLeft out or shortened: " + ", ".join(f"{key} {number}" for key, number in left.items()) + "."
    return text


def _data(data: DataConfig) -> str:
    return _code((data.dataset and f"{data.dataset} ({data.split})") or data.conversations)


def _last(config: TrainConfig, curves: list[Mapping[str, Any]]) -> str:
    rows = []
    for name in config.stages():
        logged = [entry for entry in curves if entry["stage"] == name and "lm_loss" in entry]
        if logged:
            values = {title: logged[-1].get(key) for key, title in LOGGED.items()}
            rows.append({"stage": name, **{t: v if isinstance(v, int) else _number(v) for t, v in values.items()}})
    if not rows:
        return "Nothing was logged."
    return _table(rows) + "\n\nOn training data, one seed: these describe the run, not what the model can do."


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _made(run: RunDirectory, config: TrainConfig) -> str:
    def listed(found: Mapping[str, str | None]) -> str:
        return ", ".join(f"{package} {version}" for package, version in found.items() if version)

    return "\n".join(
        (
            f"- command: {_code(run.info.get('command'))}",
            f"- seed: {config.seed}",
            f"- started: {run.info.get('created')}",
            f"- trained with: {listed(run.info.get('versions', {}))}",
            f"- exported with: {listed(versions())}",
        )
    )


def _text(run: RunDirectory) -> str:
    return (run.path / "config.yaml").read_text(encoding="utf-8")


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    lines += ["| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows]
    return "\n".join(lines)


def _code(value: str | None) -> str:
    """A value as code: no Markdown in it acts, no column ends in it."""
    return "`" + str(value).replace("`", "'").replace("|", "¦").replace("\n", " ") + "`"
