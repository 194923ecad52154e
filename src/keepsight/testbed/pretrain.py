"""Makes the testbed's weights from nothing: `python -m keepsight.testbed.pretrain`.

Stages, each resumable: the encoder (supervised), the Llama-style language model (text only), the Qwen2-style one
(from the first one's weights, text only, other scenes), and for each language model the projector (stage 1:
captions, everything else frozen). `--evaluate` measures the shipped weights on held-out scenes instead.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaForCausalLM, Qwen2ForCausalLM

from keepsight.testbed import models
from keepsight.testbed._alignment import ProjectorTask
from keepsight.testbed._deepen import FIRST_TAUGHT, deepened
from keepsight.testbed._evaluate import evaluate
from keepsight.testbed._loop import Schedule, train
from keepsight.testbed._text import SEED as LLAMA_SCENES
from keepsight.testbed._text import text_loss
from keepsight.testbed._vision import EncoderTask

logger = logging.getLogger(__name__)

SHORT_SCENES, QWEN2_SCENES = 15, 14
SHORT = Schedule(steps=1000, batch=32, lr=3e-3, horizon=1600, rundown=300, warmup=50, matrix_lr=0.02)
STAGES = {
    "encoder": Schedule(steps=2000, batch=64, lr=1.5e-3, horizon=2600, rundown=200),
    "llama": Schedule(steps=100, batch=32, lr=1e-3, horizon=100, rundown=50, warmup=20, matrix_lr=0.005),
    "qwen2": Schedule(steps=60, batch=32, lr=1e-3, horizon=60, rundown=30, warmup=20, matrix_lr=0.005),
    "projector-llama": Schedule(steps=400, batch=32, lr=3e-3, horizon=400, rundown=120, warmup=20, matrix_lr=0.02),
    "projector-qwen2": Schedule(steps=200, batch=32, lr=3e-3, horizon=200, rundown=80, warmup=20, matrix_lr=0.02),
}


def run_stage(stage: str, work: Path, out: Path) -> None:
    """Trains one stage (going on from `work` where it was stopped) and writes its weights to `out`.

    Raises:
        FileNotFoundError: an earlier stage's weights are not in `out`.
    """
    schedule, state = STAGES[stage], work / f"{stage}.pt"
    began = time.monotonic()
    shipped: nn.Module
    if stage == "encoder":
        task = EncoderTask(models.new_encoder(1), 2)
        train(task, lambda step: task.loss(step, schedule.batch), schedule, state)
        shipped = task.encoder
    elif stage.startswith("projector-"):
        language = cast(models.Language, stage.removeprefix("projector-"))
        model, _ = models.build_vlm(language, aligned=False, folder=out)
        alignment = ProjectorTask(model)
        train(alignment, lambda step: alignment.loss(step, schedule.batch), schedule, state)
        shipped = model.model.multi_modal_projector
    else:
        lm: LlamaForCausalLM | Qwen2ForCausalLM
        if stage == "llama":
            short = models.new_language_model("llama", 3, layers=len(FIRST_TAUGHT))
            train(short, lambda step: text_loss(short, step, SHORT.batch, seed=SHORT_SCENES), SHORT, work / "short.pt")
            lm, scenes = deepened(cast(LlamaForCausalLM, short), 4), LLAMA_SCENES
        else:  # the same shapes but for the attention's biases, which start at zero
            lm, scenes = models.new_language_model("qwen2", 3), QWEN2_SCENES
            lm.load_state_dict(models.load_language_model("llama", out).state_dict(), strict=False)
        train(lm, lambda step: text_loss(lm, step, schedule.batch, seed=scenes), schedule, state)
        shipped = lm
    out.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().half().contiguous() for key, value in shipped.state_dict().items()}
    save_file(tensors, out / f"{stage}.safetensors", metadata={"format": "pt"})
    logger.info("%s: weights written to %s after %.0f s", stage, out, time.monotonic() - began)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m keepsight.testbed.pretrain", description=__doc__)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; all if none is named")
    parser.add_argument("--work", type=Path, default=Path("build/testbed"), help="where training state is kept")
    parser.add_argument("--out", type=Path, default=models.WEIGHTS, help="where weights are written and read")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--evaluate", action="store_true", help="measure the weights on held-out scenes")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.stages) - set(STAGES)):
        parser.error(f"unknown stages {', '.join(unknown)}; allowed are {', '.join(STAGES)}")
    torch.set_num_threads(options.threads)
    if options.evaluate:
        for name, value in evaluate(options.out).items():
            print(f"{name:45s} {value:.3f}")
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    for stage in STAGES:
        if stage in (options.stages or STAGES):
            run_stage(stage, options.work, options.out)


if __name__ == "__main__":
    main()
