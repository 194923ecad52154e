"""33 layers × 4096 channels with probes of 1,000 classes: sizes on paper, and the same code an eighth as wide.

    python benchmarks/scale.py

Prints the sizes for 10,000, 50,000 and 1,281,167 pictures (docs/metrics.md holds them), then fits the probe of one
layer of 512 channels, 125 classes and 3,750 pictures, in memory and block by block: peak memory above the features
against the formula of `diagnosis/probes/fit.py`. Bounds: at most a quarter above the formula, and the same answers to 1
in 200.
"""

from __future__ import annotations

import numpy as np
import torch
from _timing import finish, memory_of_process, reset_peak, seconds

from keepsight.diagnosis.collect.passes import SAMPLE
from keepsight.diagnosis.metrics.spectrum import GROUPS
from keepsight.diagnosis.probes import fit
from keepsight.diagnosis.probes.probe import fit_probes

LAYERS, WIDTH, CLASSES = 33, 4096, 1000
SCALED = 8
MARGIN = 1.25  # for the allocator
OTHER = 0.005  # share of answers that may differ: rounding decides the odd one


def on_paper(pictures: int) -> None:
    sampled = max(SAMPLE, 2 * WIDTH)
    sizes = {
        "mean tokens, on disk": 4 * LAYERS * WIDTH * pictures,
        "sample of tokens, on disk": 4 * LAYERS * WIDTH * sampled,
        "covariance of a layer, in memory": round((4 * GROUPS + 8) * 5 / 8 * WIDTH**2),
        "probe of a layer, in memory": fit.bytes_of_layer(round(0.6 * pictures), WIDTH, CLASSES),
    }
    print(f"{LAYERS} layers × {WIDTH}, {CLASSES} classes, {pictures:,} pictures:")
    for name, size in sizes.items():
        print(f"  {name}: {size / 1e9:.1f} GB")
    work = 2 * 4 * 0.6 * pictures * WIDTH * CLASSES
    print(f"  a step of the probe of a layer and of its control: {work / 1e12:.1f} TFLOP")


def scaled_down() -> bool:
    n, width, classes = 30_000 // SCALED, WIDTH // SCALED, CLASSES // SCALED
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    centres = 0.3 * torch.randn(classes, width, generator=generator)
    x = torch.randn(n, width, generator=generator) + centres[labels]
    names = [f"class {i}" for i in labels.tolist()]
    found, held = [], []
    print(f"{width} channels, {classes} classes, {n} pictures, a layer with its control:")
    for how, most, block in (("block by block", 1, 16 << 20), ("in memory", fit.FEATURES_MEMORY, 0)):
        fit.FEATURES_MEMORY, fit.BLOCK = most, block
        formula = fit.bytes_of_layer(round(0.6 * n), width, classes) / 2**20
        reset_peak()
        before = memory_of_process("VmRSS")
        taken = seconds(lambda: found.append(fit_probes(lambda layer: x, [0], names)))
        peak = memory_of_process("VmHWM") - before
        held.append(peak <= MARGIN * formula)
        told = "holds" if held[-1] else "MISSED"
        print(f"  {how}: {taken:.0f} s, peak {peak:.0f} MiB, the formula {formula:.0f}: {told}")
    other = np.mean([found[0].correct != found[1].correct, found[0].shuffled != found[1].shuffled])
    print(f"  other answers: {other:.2%}: {'holds' if other <= OTHER else 'MISSED'}")
    return all(held) and bool(other <= OTHER)


def main() -> None:
    for pictures in (10_000, 50_000, 1_281_167):
        on_paper(pictures)
    finish(scaled_down())


if __name__ == "__main__":
    main()
