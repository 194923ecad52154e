"""What PRe needs under engines that shard the model: FSDP2 through accelerate."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard

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


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 holds the model's parameters in shards."""
    return isinstance(model, FSDPModule)


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """The state dict of a sharded model, whole and on the CPU, in the main process; every process must call it."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_whole_weights(model: nn.Module, state: dict[str, Any]) -> list[str]:
    """Put whole tensors into a sharded model; returns names that it does not have."""
    options = StateDictOptions(full_state_dict=True, strict=False)
    return list(set_model_state_dict(model, state, options=options).unexpected_keys)
