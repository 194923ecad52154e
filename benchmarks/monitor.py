"""What `FidelityCallback` costs a training at its default settings, as a share of the training's own time.

    python benchmarks/monitor.py

A 135 M model (random weights), 8 pictures of 64 visual tokens with a question and its answer each, full fine-tuning
with AdamW. One step in fifty is looked at: a step with a look is timed against one without, and what the look adds is
divided by fifty. Bound: 1.01 times. Beside it the memory that the callback keeps between looks.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from _timing import finish, paired, ratio_of, verdict
from train_overhead import Step

from keepsight import FidelityCallback
from keepsight.vlm.view import unwrap

PAIRS = 12


def main() -> None:
    step = Step("baseline")
    watch = FidelityCallback()
    watch.on_train_begin(None, None, None, model=unwrap(step.model))
    turns = 0

    def bare() -> None:
        nonlocal turns
        turns = turns // watch.every * watch.every + 1  # any step that is not looked at
        run()

    def looked_at() -> None:
        nonlocal turns
        turns = (turns // watch.every + 1) * watch.every
        run()

    def run() -> None:
        watch.on_step_begin(None, SimpleNamespace(global_step=turns), None)
        step()

    slow, fast = paired(looked_at, bare, PAIRS, warmup=2)
    if len(watch.history) != PAIRS + 2 or "sight_fidelity" not in watch.history[-1]:
        raise RuntimeError(
            f"{len(watch.history)} looks, expected {PAIRS + 2}, the last one scored: nothing was measured"
        )
    one = ratio_of(slow, fast)
    print(f"a step takes {sum(fast) / PAIRS:.2f} s; with a look {one}")
    share = 1 / watch.every
    every = type(one)(*(1 + (value - 1) * share for value in (one.value, one.low, one.high)), one.pairs)
    print(f"one step in {watch.every}: {every.value:.4f}x [{every.low:.4f}, {every.high:.4f}]")
    kept = [watch._projection, watch._ridge._sums]
    print(f"kept between looks: {sum(t.nbytes for t in kept if torch.is_tensor(t)) / 2**20:.1f} MiB")
    finish(verdict("FidelityCallback, amortised", every, at_most=1.01))


if __name__ == "__main__":
    main()
