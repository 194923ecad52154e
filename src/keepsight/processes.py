"""Several processes, as torchrun or accelerate start them: who am I, wait for the others, share out work."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar, cast

import torch.distributed as dist

Result = TypeVar("Result")
WAIT = timedelta(days=2)  # for a process that is still at work; one that has ended is noticed at once


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes there are; 1 where nothing started several."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@cache
def _group() -> Any:
    """What the processes meet in, made when it is first needed: objects in memory, which needs no GPU."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=WAIT)
    return dist.new_group(backend="gloo", timeout=WAIT)


def barrier() -> None:
    """Return when every process is here."""
    if world_size() > 1:
        dist.barrier(_group())


def part() -> None:
    """End what the processes met in, when all are here. Without it, a process that ends well may still abort at exit,
    where its group's threads are torn down, and torchrun would call the whole run failed."""
    if dist.is_available() and dist.is_initialized():
        barrier()
        dist.destroy_process_group()
        _group.cache_clear()


@dataclass(frozen=True)
class Team:
    """The processes that share a job; alone unless `team` made it. Every method must be called by all of them."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that holds and writes what was found."""
        return self.rank == 0

    def everyone(self, value: Any) -> list[Any]:
        """The values of all processes, in their order."""
        found = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value, group=_group())
        return found

    def to_first(self, value: Any) -> list[Any]:
        """The values of all processes in the first one, [] in the others."""
        if self.size == 1:
            return [value]
        found = [None] * self.size if self.first else None
        dist.gather_object(value, found, dst=0, group=_group())
        return found or []

    def from_first(self, value: Result) -> Result:
        """The first process's value."""
        if self.size == 1:
            return value
        found = [value]
        dist.broadcast_object_list(found, src=0, group=_group())
        return found[0]

    def together(self, work: Callable[[], Result]) -> Result:
        """What `work` returns; where it fails in one process it fails in all, so that none waits for another.

        Raises:
            RuntimeError: it failed in another process; the text names that one's error.
        """
        if self.size == 1:
            return work()
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
        said = self.everyone(failure and f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for number, text in enumerate(said):
            if text:
                raise RuntimeError(f"process {number} of {self.size} stopped: {text}")
        return cast(Result, result)


def team(several: bool = True) -> Team:
    """All processes if `several`, else this one alone."""
    return Team(rank(), world_size()) if several else Team()
