"""The pass over the pictures by two processes against one, each with one thread.

    python benchmarks/distributed.py

The 135 M model, 64 pictures with masks, all layers, the default metrics. Both processes are there all the time: in turn
the first works alone while the other waits, and both share the pictures, as under torchrun. Time is that of the clock,
so run it on a machine with two idle cores. Efficiency: time alone over twice the time together, 1 where two are twice
as fast. The calibration, which the first process runs alone, is part of both times; what is computed from the features
at the end (benchmarks/capture.py gives its share) stays with the first process, and is not. No bound: reported.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from _models import build
from _timing import ratio_of
from capture import BATCH, picture

from keepsight.diagnosis.collect.batches import Loader
from keepsight.diagnosis.collect.passes import measure
from keepsight.diagnosis.data.pictures import find_pictures
from keepsight.processes import Team, barrier, team
from keepsight.vlm import Vlm
from keepsight.vlm.chat import render_prompt
from keepsight.vlm.inference import inference

PICTURES = 64


def worker(shape: str, pairs: int) -> None:
    """Time both in turn; the first process prints."""
    torch.manual_seed(0)
    model, processor = build(shape)
    vlm, everyone = Vlm(model.eval()), team()
    drawn = [picture(i) for i in range(PICTURES)]
    found = find_pictures([image for image, _ in drawn], masks=[mask for _, mask in drawn])
    rendered = render_prompt(processor, "Describe the picture.")

    def run(members: Team) -> float:
        loader = Loader(vlm, processor, found.items, rendered, BATCH, seed=0)
        with tempfile.TemporaryDirectory() as folder, inference(model):
            barrier()
            start = time.perf_counter()
            if members.size > 1 or everyone.first:
                accumulator, _ = measure(vlm, loader, range(vlm.depth + 1), Path(folder), encoder=vlm, team=members)
                assert accumulator.pooled.rows == (PICTURES if members.first else 0)
            barrier()
            return time.perf_counter() - start

    alone, together = [], []
    for pair in range(pairs + 1):  # the first warms up
        for members in ((everyone, Team()), (Team(), everyone))[pair % 2]:
            (together if members.size > 1 else alone).append(run(members))
    if everyone.first:
        ratio = ratio_of(alone[1:], together[1:])
        print(f"{shape}: {PICTURES} pictures alone {min(alone):.1f} s, by two {min(together):.1f} s; faster {ratio}")
        print(f"efficiency {ratio.value / 2:.2f} [{ratio.low / 2:.2f}, {ratio.high / 2:.2f}]", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="135M", choices=("135M", "tiny"))
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--worker", action="store_true", help="be one of the processes")
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.shape, arguments.pairs)
        return
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    subprocess.run([*start, "--worker", "--shape", arguments.shape, "--pairs", str(arguments.pairs)], check=True)


if __name__ == "__main__":
    main()
