"""One process of a distributed run, started by torchrun: trains the tiny LLaVA and writes what it logged.

    torchrun --nproc_per_node 2 -m tests.training.worker MODE OUT

MODE: trainer (HF Trainer with the mixin; DDP, or FSDP2 or DeepSpeed where the environment asks for them as
`accelerate launch` does), injected (HF Trainer as it is, PRe with ``inject=True`` and its callback, no learning),
loop (a plain loop, DDP), fsdp (a plain loop, FSDP2), with "-images" behind it for data where only one process ever has
pictures, or "-all" where every sample has one, and further settings of PRe as name=value; so are
gradient_checkpointing, dtype, `learns` (parts), `accumulate`, max_grad_norm and bf16.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import training_args

import keepsight
from keepsight.processes import part
from keepsight.training.config import PARTS
from keepsight.training.freeze import train_only
from keepsight.training.sharding import is_sharded, zero_stage
from tests.tiny import llava_clip_llama
from tests.training.test_trainer import InOrder, PReTrainer, collate, make_trainer, samples, train

STEPS, BATCH = 3, 4


def data(pictures: str) -> list[dict[str, Any]]:
    """Twelve samples, one without a picture; "images": of every four, the first two (one process's share) have
    pictures, the others none; "all": each has."""
    rows = samples()
    rows = [*rows, *rows[2:6]]
    if pictures == "all":
        rows[1] = rows[6]
    if pictures == "images":
        with_picture, without = rows[2], rows[1]
        rows = [with_picture if index % BATCH < BATCH // 2 else without for index in range(len(rows))]
    return rows


def shard_on_cpu() -> None:
    """Let accelerate use FSDP2 between CPU processes.

    It sees to FSDP only where processes have accelerators (`AcceleratorState.__init__` lists their kinds) and trains
    under DDP otherwise, without a word. Named as one of those kinds, its whole FSDP2 path runs on gloo.
    """
    start = PartialState.__init__

    def renamed(self: PartialState, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        if self.distributed_type is DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_XPU

    PartialState.__init__ = renamed


def bf16_on_cpu() -> None:
    """Let `TrainingArguments` have bf16 on a CPU without use_cpu, with which accelerate would leave DeepSpeed out."""
    training_args.is_torch_bf16_gpu_available = lambda: True


def main(mode: str, out: str, *settings: str) -> None:
    torch.set_num_threads(1)
    values = {name: json.loads(value) for name, value in (setting.split("=", 1) for setting in settings)}
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpu()
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    kind, _, pictures = mode.partition("-")
    accumulate, clip = values.pop("accumulate", 1), values.pop("max_grad_norm", 1.0)
    bf16 = values.pop("bf16", False)
    checkpointing, dtype = values.pop("gradient_checkpointing", False), values.pop("dtype", "float32")
    model, _ = llava_clip_llama()
    model.to(getattr(torch, dtype))
    train_only(model, values.pop("learns", PARTS))
    handle = keepsight.attach(model, keepsight.PReConfig(**values), inject=kind == "injected")
    rows, zero = data(pictures), None
    head_types: list[torch.dtype] = []
    handle.head.register_forward_pre_hook(lambda head, _: head_types.append(head.up.weight.dtype))
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if kind == "trainer":
        path = Path(out).with_suffix(".trainer")
        options: Any = {
            "max_steps": STEPS,
            "max_grad_norm": clip,
            "bf16": bf16,
            "gradient_checkpointing": checkpointing,
        }
        options |= {"batch": BATCH // processes // accumulate, "accumulate": accumulate}
        if deepspeed:  # with use_cpu, accelerate would leave it out without a word
            options |= {"use_cpu": False, "ddp_backend": "gloo"}
            bf16_on_cpu()
        trainer, _ = train(model, path, rows, PReTrainer, **options)
        zero = zero_stage(trainer.args)
        log = [entry for entry in trainer.state.log_history if "lm_loss" in entry]
        rank = trainer.args.process_index
    elif kind == "injected":
        options = {"batch": BATCH // processes, "max_steps": STEPS, "learning_rate": 0.0, "callbacks": [handle]}
        trainer = make_trainer(model, Path(out).with_suffix(".trainer"), rows, InOrder, **options)
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        rank = trainer.args.process_index
    else:
        log, rank = plain_loop(kind, model, handle, rows, processes), int(os.environ.get("RANK", "0"))
    parameters = {  # gathered by all processes
        name: whole(p).detach().double().norm().item()
        for name, p in model.named_parameters()
        if kind != "fsdp" or processes == 1
    }
    part()
    if rank == 0:
        head = str(head_types[-1]) if head_types else None
        found = {
            "head": head,
            "log": log,
            "parameters": parameters,
            "sharded": is_sharded(model),
            "steps": handle.steps,
            "zero": zero,
        }
        Path(out).write_text(json.dumps(found))


def whole(parameter: torch.nn.Parameter) -> torch.Tensor:
    """A parameter that FSDP2 or ZeRO-3 may hold in shards; every process must call it."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return getattr(parameter, "full_tensor", lambda: parameter)()


def plain_loop(kind: str, model: Any, handle: Any, rows: list[Any], processes: int) -> list[dict[str, float]]:
    """SGD with ``handle.loss`` and ``images_in_step``; DDP or FSDP2 where there are several processes."""
    rank, wrapped = 0, model
    if processes > 1:
        dist.init_process_group("gloo")
        rank = dist.get_rank()
        if kind == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (processes,))
            for layer in handle.vlm.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(handle.predictors, mesh=mesh)
            fully_shard(model, mesh=mesh)
        else:
            wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    model.train()
    optimizer = torch.optim.SGD(keepsight.param_groups(model), lr=0.1)
    log = []
    for step in range(STEPS):
        whole = rows[step * BATCH : (step + 1) * BATCH]
        share = BATCH // processes
        batch = collate(whole[rank * share : (rank + 1) * share])
        handle.images_in_step = sum(0 if row["pixel_values"] is None else len(row["pixel_values"]) for row in whole)
        # A mean over the answers' tokens of the whole batch, as HF Trainer takes it.
        answers = sum(int((collate([row])["labels"][:, 1:] != -100).sum()) for row in whole)
        own = int((batch["labels"][:, 1:] != -100).sum())
        out = wrapped(**batch)
        lm = out.loss * own / answers
        # Both engines average gradients over processes.
        ((lm + handle.loss) * processes).backward()
        optimizer.step()
        optimizer.zero_grad()
        numbers = torch.stack([lm.detach(), handle.loss.detach()])
        if processes > 1:
            dist.all_reduce(numbers)
        log.append({"lm_loss": numbers[0].item(), "pre": numbers[1].item()})
    return log


if __name__ == "__main__":
    main(*sys.argv[1:])
