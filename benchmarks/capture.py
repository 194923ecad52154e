"""One diagnosis pass against the plain forward of the same decoded batches, without LM head and cache; and its memory.

    python benchmarks/capture.py

The pass takes probe features, patch structure and the sample of tokens at all layers; on top of the paired ratio come,
as shares of 1,000 pictures, the calibration pass and what is computed at the end. With the paper's metrics (features,
structure, spectrum) at most 1.25 times, on a tiny model and on one of 135 M; with all default metrics (also fidelity,
CKA and neighbours, lens) at most 1.15 on the latter, while the tiny one's ratio is told: its forward costs so little.
The ratio for 5,000 pictures, and probes of ten classes and similarity maps of six pictures, which are no part of a
diagnosis without labels and report, are told beside it. Memory: what a whole `diagnose` needs above the loaded model,
peak, for 100 and for 5,000 pictures.
"""

import argparse
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _models import build
from _timing import finish, memory_of_process, paired, ratio_of, seconds, verdict
from PIL import Image

PICTURES, MANY, BATCH = 1000, 5000, 8
GROWTH = 32  # MiB that memory may grow from 100 to 5,000 pictures
BOUND, DEFAULT = 1.25, {"135M": 1.15}
PAPER = ("calibration", "rows of images", "eigenvalues")  # what is taken beside the pass for the paper's metrics


def picture(index: int, side: int = 64) -> tuple[Image.Image, np.ndarray]:
    """Noise on four quarters, each an object."""
    generator = np.random.default_rng(index)
    half = side // 2
    mask = np.kron(np.array([[1, 2], [3, 4]], dtype=np.uint8), np.ones((half, half), dtype=np.uint8))
    colours = generator.integers(0, 255, (5, 3))
    pixels = colours[mask] + generator.normal(0, 20, (side, side, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), mask


def overhead(shape: str, pairs: int) -> bool:
    from keepsight.diagnosis.collect.batches import Loader
    from keepsight.diagnosis.collect.passes import SAMPLE, EncoderOutput, forward, measure, run_batch
    from keepsight.diagnosis.data.pictures import find_pictures
    from keepsight.diagnosis.maps import similarity_maps
    from keepsight.diagnosis.metrics.fidelity import Fidelity
    from keepsight.diagnosis.metrics.lens import Lens, readout
    from keepsight.diagnosis.metrics.similarity import Similarity
    from keepsight.diagnosis.probes.probe import fit_probes
    from keepsight.diagnosis.summary import image_rows, spectrum_rows
    from keepsight.results import PerImageBuilder
    from keepsight.vlm import Vlm
    from keepsight.vlm.chat import render_prompt

    torch.manual_seed(0)
    model, processor = build(shape)
    vlm = Vlm(model)
    layers = range(vlm.depth + 1)
    drawn = [picture(i) for i in range(8 * BATCH)]  # with all their tokens, SAMPLE tokens
    pictures = find_pictures([image for image, _ in drawn], masks=[mask for _, mask in drawn])
    loader = Loader(vlm, processor, pictures.items, render_prompt(processor, "Describe the picture."), BATCH, seed=0)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        accumulator, _ = measure(vlm, loader, layers, Path(folder), exact=True, encoder=vlm)
        accumulator.exact = False  # its tokens are those of a large run's sample
        loader.rate = min(1.0, max(SAMPLE, 2 * vlm.width) / (PICTURES * 64))  # as in a run of 1,000 pictures
        batches = list(loader.batches(range(len(drawn)), masks=True))
        turn = iter(range(10**9))
        source = EncoderOutput(vlm, vlm)

        def plain() -> None:
            vlm.forward_core(**batches[next(turn) % 8].inputs)

        def diagnosed() -> None:
            accumulator.append(run_batch(vlm, batches[next(turn) % 8], accumulator, source))

        slow, fast = paired(diagnosed, plain, pairs)
        ratio = ratio_of(slow, fast)
        whole = float(np.mean(fast)) * PICTURES / BATCH
        calibration = seconds(lambda: forward(vlm, batches[0], layers, lambda layer, tokens: tokens.double().sum()))
        position = vlm.depth // 2
        names = [str(number) for number in range(accumulator.values.rows)]
        rows = seconds(lambda: image_rows(accumulator, PerImageBuilder(names), seed=0))
        parts, builder = {}, PerImageBuilder([str(number) for number in range(PICTURES)])

        def begin() -> None:
            parts["fidelity"] = Fidelity(accumulator, builder, 0)
            parts["lens"] = Lens(accumulator, readout(vlm, batches[0].inputs), str, 0, vlm.depth // 2, builder)

        def begin_similarity() -> None:
            parts["similarity"] = Similarity(accumulator, builder, 0)

        beginning = seconds(begin)
        for store in (accumulator.pooled, accumulator.encoder_pooled):
            layers_of = vlm.depth + 1 if store is accumulator.pooled else 1
            store.append(torch.randn(layers_of, PICTURES - store.rows, store.width))
        beginning += seconds(begin_similarity)
        fidelity, lens, similarity = parts["fidelity"], parts["lens"], parts["similarity"]
        taken = {
            "calibration": calibration * calibrated(PICTURES) / BATCH,
            "rows of images": rows,
            "targets": beginning,
            **{
                name: count * seconds(partial(part, position))
                for name, part, count in (
                    ("eigenvalues", lambda at: spectrum_rows(accumulator, at, seed=0), len(layers)),
                    ("fidelity", fidelity.rows, len(layers)),
                    ("CKA and neighbours", similarity.rows, len(layers)),
                    ("lens", lens.rows, len(lens.positions)),
                )
            },
        }
        labels = [f"class {i % 10}" for i in range(PICTURES)]
        some = [position, position + 1]
        pooled = [torch.from_numpy(accumulator.pooled.read(at)) for at in some]
        beside = {
            "probes of 10 classes": seconds(lambda: fit_probes(pooled.__getitem__, range(len(some)), labels))
            * len(layers)
            / len(some),
            "maps of 6 pictures": seconds(
                lambda: similarity_maps(vlm, loader, list(range(6)), list(layers), read=readout(vlm, batches[0].inputs))
            ),
        }
    print(f"{shape}: plain forward {1e3 * np.mean(fast):.0f} ms a batch of {BATCH}; the pass alone {ratio}")
    shares = ", ".join(f"{name} +{value / whole:.3f}" for name, value in taken.items())
    print(f"{shape}: of {PICTURES} pictures ({whole:.0f} s), {shares}")
    print(f"{shape}: beside it, {', '.join(f'{name} +{value / whole:.3f}' for name, value in beside.items())}")
    least, all_of_it = (ratio.plus(sum(taken[n] for n in names) / whole) for names in (PAPER, taken))
    held = verdict(f"capture, {shape}, the paper's metrics", least, at_most=BOUND)
    if shape in DEFAULT:
        held &= verdict(f"capture, {shape}, default metrics", all_of_it, at_most=DEFAULT[shape])
    else:
        print(f"capture, {shape}, default metrics: {all_of_it}")
    # What is computed at the end is from samples of one size, so that more pictures make it a smaller share.
    growing = {"calibration": calibrated(MANY) / calibrated(PICTURES), "rows of images": MANY / PICTURES}
    at_end = sum(value * growing.get(name, 1) for name, value in taken.items())
    print(f"{shape}: of {MANY:,} pictures {ratio.plus(at_end * PICTURES / MANY / whole)}")
    return held


def calibrated(pictures: int) -> int:
    """Pictures of the calibration."""
    return min(32, max(8, pictures // 64))


def peak_above_model(n: int) -> float:
    """MiB of a `diagnose` with probes and masks of n pictures; a process of its own."""
    from keepsight.diagnosis import diagnose

    model, processor = build("tiny")
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("images", "masks"):
            (Path(folder) / kind).mkdir()
        for i in range(n):
            image, mask = picture(i)
            image.save(Path(folder) / "images" / f"{i:05d}.png")
            Image.fromarray(mask).save(Path(folder) / "masks" / f"{i:05d}.png")
        before = memory_of_process("VmRSS")
        labels = [f"class {i % 5}" for i in range(n)]
        images, masks = Path(folder) / "images", Path(folder) / "masks"
        diagnose(model, processor, images, labels=labels, masks=masks, progress=False)
    return memory_of_process("VmHWM") - before


def memory() -> bool:
    peaks = {}
    for n in (100, MANY):
        command = [sys.executable, __file__, "--memory-of", str(n)]
        peaks[n] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    growth = peaks[MANY] - peaks[100]
    print(f"memory above the model: {peaks[100]:.0f} MiB for 100 pictures, {peaks[MANY]:.0f} MiB for 5,000")
    print(f"growth {growth:.0f} MiB, at most {GROWTH}: {'holds' if growth <= GROWTH else 'MISSED'}")
    return growth <= GROWTH


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory-of", type=int, metavar="N", help="print the memory for N pictures and stop")
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(peak_above_model(arguments.memory_of))
        return
    finish(overhead("tiny", pairs=40), overhead("135M", pairs=10), memory())


if __name__ == "__main__":
    main()
