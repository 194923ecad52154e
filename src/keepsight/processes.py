"""Several processes, as torchrun or accelerate start them: who am I, and wait for the others."""

from __future__ import annotations

import os

import torch.distributed as dist


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes there are; 1 where nothing started several."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def barrier() -> None:
    """Return when every process is here. The process group is made when it is first needed."""
    if world_size() < 2:
        return
    if not dist.is_initialized():
        dist.init_process_group("gloo")  # nothing but a meeting point: it needs no GPU
    dist.barrier()
