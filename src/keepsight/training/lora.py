"""LoRA (2106.09685) in the recipe, through PEFT: beside frozen weights of the language model, small ones that learn.

The adapters are put into the model in place, and the names of the parameters that learned before stay as they were.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from keepsight.pre.handle import HEAD
from keepsight.training.config import LoraConfig
from keepsight.vlm.view import Vlm

ADAPTER = "lora_"  # starts the names of PEFT's LoRA parameters


def check_available(lora: LoraConfig) -> None:
    """Refuse, before anything is loaded, what this machine cannot do.

    Raises:
        ImportError: if a package is missing.
        ValueError: for 4 bits without CUDA, or a model in shards.
    """
    if lora.rank is None:
        return
    if find_spec("peft") is None:
        raise ImportError('LoRA needs PEFT: pip install "keepsight[train]"')
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1"):
        raise ValueError(
            f"lora.rank is {lora.rank} under FSDP: adapters cannot be joined from shards yet. Launch without FSDP "
            "(one whole model a process; with LoRA it needs little beside its weights), or set lora.rank to null."
        )
    if lora.load_in_4bit and find_spec("bitsandbytes") is None:
        raise ImportError(
            "lora.load_in_4bit needs bitsandbytes, which is not installed: pip install bitsandbytes, or set "
            "lora.load_in_4bit to false."
        )
    if lora.load_in_4bit and not torch.cuda.is_available():
        raise ValueError(
            "lora.load_in_4bit is true and no CUDA device is visible: the 4-bit layers are made on a GPU. Run on one, "
            "or set lora.load_in_4bit to false."
        )


def targets(model: nn.Module, lora: LoraConfig) -> dict[str, nn.Linear]:
    """The linear layers that get an adapter, by name: those of the decoder, so never of encoder, projector or LM head.

    Raises:
        ValueError: if a name in `lora.target_modules` is that of none.
    """
    vlm = Vlm(model)
    inside = {id(module) for module in vlm.decoder.modules()}
    linear = {
        name: module
        for name, module in vlm.base.named_modules()
        if isinstance(module, nn.Linear) and id(module) in inside and HEAD not in name.split(".")
    }
    if lora.target_modules is None:
        return linear

    def is_called(name: str, wanted: str) -> bool:
        return name == wanted or name.endswith(f".{wanted}")

    for wanted in lora.target_modules:
        if not any(is_called(name, wanted) for name in linear):
            raise ValueError(
                f"lora.target_modules has {wanted!r}, and no linear layer of the language model is called so; it has "
                f"{sorted({name.rpartition('.')[2] for name in linear})}. Give some of them, or null for all."
            )
    return {n: m for n, m in linear.items() if any(is_called(n, wanted) for wanted in lora.target_modules)}


def adapt(model: nn.Module, lora: LoraConfig, *, quantise: bool = True) -> Any:
    """Put adapters into the model, in place, and quantise what they stand beside if the settings say so too.

    What learned goes on learning; the adapters' weights are drawn from the global generator.

    Returns:
        PEFT's view of the model, for `merge_and_unload` and `save_adapter`.

    Raises:
        ValueError: see `targets`.
    """
    import peft

    chosen = targets(model, lora)
    if lora.load_in_4bit and quantise:
        _quantise(model, targets(model, replace(lora, target_modules=None)))
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert lora.rank is not None
    alpha: Any = lora.numerator  # PEFT divides it by the rank, and declares an int
    wrapped = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=lora.rank,
            lora_alpha=alpha,
            lora_dropout=lora.dropout,
            target_modules=list(chosen),
            task_type="CAUSAL_LM",
        ),
    )
    for parameter in learning:  # PEFT has frozen all, PRe's head too
        parameter.requires_grad_(True)
    return wrapped


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to a LoRA matrix."""
    return any(part.startswith(ADAPTER) for part in name.split("."))


def _quantise(model: Any, layers: dict[str, nn.Linear]) -> None:
    """Replace linear layers by bitsandbytes' NF4 ones, whose weights are packed when they move to the GPU."""
    import bitsandbytes as bnb

    for name, layer in layers.items():
        computing = torch.bfloat16 if layer.weight.dtype == torch.float32 else layer.weight.dtype
        packed = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=computing,
            quant_type="nf4",
            device=torch.device("meta"),
        )
        packed.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=packed)
        packed.bias = layer.bias
        model.set_submodule(name, packed)
    model.is_loaded_in_4bit = True  # what PEFT asks


def save_adapter(wrapped: Any, learned: Iterable[str], folder: Path, *, base: str) -> None:
    """Write what learned as a PEFT adapter: the LoRA weights, and whole modules for what learned besides (projector).

    ``PeftModel.from_pretrained(base_model, folder)`` gives the trained model. PRe's head is left out.

    Args:
        wrapped: from `adapt`. learned: names, in the model, of the parameters that learned.
        base: name of the model that it stands on, for adapter_config.json.
    """
    model = wrapped.get_base_model()
    wanted = {name for name in learned if HEAD not in name.split(".")}
    state = {
        f"base_model.model.{name.replace('.default.', '.') if is_adapter(name) else name}": parameter.detach()
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name in wanted
    }
    settings = wrapped.peft_config["default"]
    settings.modules_to_save = _whole_modules(model, {name for name in wanted if not is_adapter(name)}) or None
    settings.base_model_name_or_path = base
    settings.inference_mode = True
    folder.mkdir(parents=True, exist_ok=True)
    settings.save_pretrained(folder)
    save_file(
        {name: tensor.cpu().clone().contiguous() for name, tensor in state.items()},
        folder / "adapter_model.safetensors",
        {"format": "pt"},
    )


def _whole_modules(model: nn.Module, names: set[str]) -> list[str]:
    """The fewest modules that hold these parameters and no others."""
    found: list[str] = []

    def visit(prefix: str, module: nn.Module) -> None:
        own = {f"{prefix}.{name}" if prefix else name for name, _ in module.named_parameters()}
        if own and own <= names:
            found.append(prefix)
        elif own & names:
            for name, child in module.named_children():
                visit(f"{prefix}.{name}" if prefix else name, child)

    visit("", model)
    return found
