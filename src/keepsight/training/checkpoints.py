"""Checkpoints that a run goes on from bit for bit, also when it is killed while one is being written.

HF `Trainer` writes optimizer, schedule, random states and its own state. Three things are ours: weights, under the
names they have in memory (`save_pretrained` renames those of several families, and `Trainer` would read them back under
the wrong names, silently) and only of what learns (the rest comes from where it came from at first); what the run has
seen of its data; and a mark that is written last, without which a checkpoint does not count.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from keepsight.pre.handle import HEAD
from keepsight.processes import rank
from keepsight.results import make_folder, write_file
from keepsight.training.sharding import is_sharded, load_whole_weights

WEIGHTS = "weights.safetensors"
SEEN = "seen_{rank}.pt"  # of each process
KEPT = "weights"  # in the folder of a stage
MARK = "complete.json"


class CheckpointError(RuntimeError):
    """A checkpoint that does not belong to this run."""


def save_weights(
    model: torch.nn.Module, folder: Path, learned: Iterable[str], whole: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write the parameters that have learned so far in this run, and all buffers, under their names in memory.

    Args:
        whole: the state dict of a model that is in shards, gathered.
    """
    persistent = model.state_dict() if whole is None else whole
    buffers = {name for name, _ in model.named_buffers()}
    wanted = buffers | ({name for name, _ in model.named_parameters(remove_duplicate=True)} & set(learned))
    state = {name: tensor.detach() for name, tensor in persistent.items() if name in wanted}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.cpu().clone().contiguous() for name, tensor in state.items()}, folder / WEIGHTS)


def load_weights(model: torch.nn.Module, folder: Path, *, heads: bool = True) -> set[str]:
    """Read `save_weights`' file back; returns the names it holds.

    Args:
        heads: whether the model has PRe's heads; else theirs are left out.

    Raises:
        CheckpointError: if the model has no such parameter: the checkpoint is of another model or head.
    """
    state = {name: t for name, t in load_file(folder / WEIGHTS).items() if heads or HEAD not in name.split(".")}
    if is_sharded(model):
        unknown = load_whole_weights(model, state)
    else:
        unknown = sorted(model.load_state_dict(state, strict=False).unexpected_keys)
    if unknown:
        raise CheckpointError(
            f"checkpoint '{folder}' holds {unknown[:3]} ({len(unknown)} in all), which this model does not have: it "
            "was written by another recipe. Give the recipe of the run, or another --out."
        )
    return set(state)


class Checkpoints(TrainerCallback):
    """Completes and marks every checkpoint that `Trainer` saves, then removes the older ones.

    Args:
        seen: gives what to remember of the data, tensors and plain values; it is called in every process.
        keep_weights: keep the weights of every checkpoint in the folder that `kept_weights` reads.
    """

    def __init__(self, seen: Callable[[], dict[str, Any]] = dict, *, keep_weights: bool = False) -> None:
        self.seen = seen
        self.keep_weights = keep_weights

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        torch.save(self.seen(), folder / SEEN.format(rank=rank()))
        if dist.is_available() and dist.is_initialized():
            dist.barrier()  # every process has written what is its own
        if not state.is_world_process_zero:
            return
        sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
        if self.keep_weights:
            _keep(folder / WEIGHTS, folder.parent / KEPT / f"step-{state.global_step}")
        write_file(folder / MARK, json.dumps({"step": state.global_step, "files": sizes}, indent=1))
        for other in folder.parent.glob("checkpoint-*"):
            if other != folder:
                (other / MARK).unlink(missing_ok=True)  # first, so that half of it is never taken for the whole
                shutil.rmtree(other)


def _keep(weights: Path, folder: Path) -> None:
    """A second name for the file, which stays when the checkpoint goes; a copy where the disk knows no such names."""
    make_folder(folder)
    half = folder / f"{WEIGHTS}.part"
    half.unlink(missing_ok=True)
    try:
        os.link(weights, half)
    except OSError:
        shutil.copyfile(weights, half)
    os.replace(half, folder / WEIGHTS)


def kept_weights(stage: Path) -> list[tuple[int, Path]]:
    """(optimizer step, folder for `load_weights`) of the weights that a stage kept, in order."""
    folders = [folder for folder in (stage / KEPT).glob("step-*") if (folder / WEIGHTS).is_file()]
    return sorted((int(folder.name.partition("-")[2]), folder) for folder in folders)


def latest(stage: Path) -> Path | None:
    """The newest whole checkpoint of a stage's folder."""
    whole = [folder for folder in stage.glob("checkpoint-*") if _is_whole(folder)]
    return max(whole, key=lambda folder: int(folder.name.split("-")[1]), default=None)


def _is_whole(folder: Path) -> bool:
    try:
        files = json.loads((folder / MARK).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return False
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in files.items())


def remove_halves(stage: Path) -> None:
    """Delete what a killed process left of a checkpoint it was writing or removing."""
    for folder in stage.glob("checkpoint-*"):
        if not _is_whole(folder):
            shutil.rmtree(folder)


def read_state(folder: Path) -> dict[str, Any]:
    """`Trainer`'s own state in a checkpoint: global_step, log_history, …"""
    return json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))


def read_seen(folder: Path) -> dict[str, Any]:
    """What this process had seen of the data; on the CPU."""
    return torch.load(folder / SEEN.format(rank=rank()), weights_only=True, map_location="cpu")
