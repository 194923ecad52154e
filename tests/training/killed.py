"""A training run that is killed: `python -m tests.training.killed POINT RECIPE [FLAGS …]`.

POINT says where: step:S:N (at the end of step N of stage S); S:N:WHAT while checkpoint N of stage S is written, WHAT
being weights or optimizer (half of it is on the disk), mark (all but the mark is), removal (while the older
checkpoint is removed) or whole (just after); export (half of the final model is written); or never.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from keepsight.commands import train as command
from keepsight.training import checkpoints, stages
from tests.training.worker import shard_on_cpu


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at(stage: str, step: int, trainer: Any) -> bool:
    return Path(trainer.args.output_dir).name == stage and trainer.state.global_step == step


def kill_at(point: str) -> None:
    trainer = stages.KeepsightTrainer
    if point == "export":
        from transformers import PreTrainedModel

        def half(self: Any, folder: Any, **_: Any) -> None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / "model.safetensors").write_bytes(b"\0" * 100)
            die()

        PreTrainedModel.save_pretrained = half
        return
    first, second, third = point.split(":")
    if first == "step":

        class Killer(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if Path(args.output_dir).name == second and state.global_step == int(third):
                    die()

        begin = trainer.__init__

        def with_killer(self: Any, *args: Any, **kwargs: Any) -> None:
            begin(self, *args, **kwargs)
            self.add_callback(Killer())

        trainer.__init__ = with_killer
        return
    stage, step = first, int(second)
    if third == "weights":
        save = trainer._save

        def half_weights(self: Any, output_dir: str, state_dict: Any = None) -> None:
            save(self, output_dir, state_dict)
            if at(stage, step, self):
                file = Path(output_dir) / checkpoints.WEIGHTS
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
                die()

        trainer._save = half_weights
    elif third == "optimizer":
        save_optimizer = trainer._save_optimizer_and_scheduler

        def half_optimizer(self: Any, output_dir: str) -> None:
            save_optimizer(self, output_dir)
            if at(stage, step, self):
                file = Path(output_dir) / "optimizer.pt"
                file.write_bytes(file.read_bytes()[:200])
                die()

        trainer._save_optimizer_and_scheduler = half_optimizer
    elif third in ("mark", "removal", "whole"):
        on_save = checkpoints.Checkpoints.on_save

        def marked(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if Path(args.output_dir).name == stage and state.global_step == step:
                if third == "mark":
                    checkpoints.write_file = die
                elif third == "removal":
                    remove = shutil.rmtree

                    def half_removed(folder: Any) -> None:
                        (Path(folder) / checkpoints.WEIGHTS).unlink()
                        die()
                        remove(folder)

                    shutil.rmtree = half_removed
            on_save(self, args, state, control, **kwargs)
            if third == "whole" and Path(args.output_dir).name == stage and state.global_step == step:
                die()

        checkpoints.Checkpoints.on_save = marked
    else:
        raise ValueError(point)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpu()
    if sys.argv[1] != "never":
        kill_at(sys.argv[1])
    command.main(sys.argv[2:])
