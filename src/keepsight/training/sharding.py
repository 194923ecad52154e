"""What PRe needs under engines that shard the model: FSDP2 and DeepSpeed through accelerate."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from keepsight.pre.handle import Handle


def shard_head(accelerator: Any, handle: Handle, optimizer: torch.optim.Optimizer) -> None:
    """Under FSDP2, before accelerate shards the rest: shard the heads by themselves, and the decoder layer by layer.

    Left to accelerate, the heads would be part of the root's group and computed in its low precision; PRe's cosine
    needs float32. The encoder stays in the root's group, unless the configuration names classes to wrap: a process
    without pictures does not call its layers, and the others would wait for its share of them for ever. (Of the
    classes that the model itself names, a LLaVA with CLIP has only some; at the others accelerate 1.15 is an error.)

    Raises:
        ValueError: for an anchor made from averaged weights, which are whole where the model's are shards.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.fsdp_version != 2:
        return
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in handle.vlm.layers})
    if not handle.config.active:
        return
    if handle.predictors.teacher is not None:
        raise ValueError(
            f"the anchor {handle.config.anchor!r} keeps averages of whole weights, and FSDP2 has them in shards: train "
            "under DDP (torchrun without a sharding configuration), or with the anchor 'pre_llm'."
        )
    if not isinstance(handle.predictors, FSDPModule):
        mesh = accelerator.torch_device_mesh
        names = accelerator.parallelism_config.fsdp_dim_names if mesh is not None else ()
        whole = list(handle.parameters())
        fully_shard(handle.predictors, mesh=mesh[tuple(names)] if mesh is not None else None)
        # After the optimizer is built, because `Trainer` would give shards other groups than whole parameters, and the
        # groups of a resumed run must be those of its checkpoint.
        shards = {id(old): new for old, new in zip(whole, handle.parameters(), strict=True)}
        for group in optimizer.param_groups:
            group["params"] = [shards.get(id(parameter), parameter) for parameter in group["params"]]


def zero_stage(arguments: Any) -> int | None:
    """The stage of DeepSpeed's ZeRO that a stage's `TrainingArguments` ask for; None without DeepSpeed."""
    plugin = arguments.deepspeed_plugin
    return None if plugin is None else _stage(plugin)


def _stage(plugin: Any) -> int:
    return plugin.deepspeed_config.get("zero_optimization", {}).get("stage", 0)  # plugin.zero_stage is not the file's


def check_deepspeed(accelerator: Any, handle: Handle, **rates: float | None) -> None:
    """Refuse what PRe cannot do under DeepSpeed's settings; nothing where it is not used.

    Args:
        rates: learning rates that parts of the model have for themselves, by the name of the setting.

    Raises:
        ValueError: under ZeRO-3, for an anchor made from averaged weights, which are whole where the model's are
            shards; for a learning rate that an optimizer of DeepSpeed's own settings would not heed.
    """
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is None:
        return
    if _stage(plugin) == 3 and handle.config.active and handle.predictors.teacher is not None:
        raise ValueError(
            f"the anchor {handle.config.anchor!r} keeps averages of whole weights, and ZeRO-3 has them in shards: "
            "train under ZeRO-2 or DDP, or with the anchor 'pre_llm'."
        )
    given = {name: rate for name, rate in rates.items() if rate is not None}
    if given and "optimizer" in plugin.deepspeed_config:
        name, rate = next(iter(given.items()))
        raise ValueError(
            f"{name} is {rate}, and DeepSpeed's settings name an optimizer of their own, which has one learning rate "
            f"for all: take 'optimizer' out of them (the trainer's is used then), or set {name} to null."
        )


def release(trainer: Any) -> None:
    """Take DeepSpeed's engine off a trained model, so that another trainer can have it; nothing where there is none.

    Its hooks would go on reducing gradients, and accelerate takes one engine's settings in a process's life. ZeRO-3's
    shards stay shards, see `whole_weights`.
    """
    if trainer.is_deepspeed_enabled:
        from accelerate.state import AcceleratorState

        trainer.model_wrapped.destroy()
        AcceleratorState._reset_state()
        load_whole()


def load_whole() -> None:
    """Let transformers load models as it does without DeepSpeed.

    Under ZeRO-3's settings it loads in a way of its own, after which `save_pretrained` (transformers 5.23) writes the
    names of some families wrong. A trainer puts the settings back.
    """
    unset_hf_deepspeed_config()


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 holds the model's parameters in shards."""
    return isinstance(model, FSDPModule)


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """The state dict of a model that FSDP2 or ZeRO-3 may hold in shards, whole and on the CPU, in the main process (of
    one that nothing holds in shards, its own); every process must call it."""
    if is_sharded(model):
        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    state = model.state_dict()
    shards = {name: p for name, p in model.named_parameters(remove_duplicate=False) if hasattr(p, "ds_id")}
    if shards:
        from deepspeed import zero

        gathered: dict[int, torch.Tensor] = {}  # one tensor for names that share a parameter
        for name, parameter in shards.items():
            if id(parameter) not in gathered:
                with zero.GatheredParameters([parameter]):
                    gathered[id(parameter)] = parameter.detach().cpu().clone()
            state[name] = gathered[id(parameter)]
    return state


def load_whole_weights(model: nn.Module, state: dict[str, Any]) -> list[str]:
    """Put whole tensors into a sharded model; returns names that it does not have."""
    options = StateDictOptions(full_state_dict=True, strict=False)
    return list(set_model_state_dict(model, state, options=options).unexpected_keys)
