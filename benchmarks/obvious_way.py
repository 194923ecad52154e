"""Everything after the forward, against the obvious way: all hidden states kept, moved to NumPy, scikit-learn by layer.

    python benchmarks/obvious_way.py

The 135 M model at all its layers, 500 pictures of ten classes with four objects each. Both sides give the accuracy of a
linear probe (same split, same grid of L2 strengths, and the shuffled-label control), cohesion, coupling and
homogeneity (raw, and centred by the same mean) and the spectra of covariance and correlation over *all* visual tokens;
keepsight gives intervals besides. Each side is a process of its own, with the pictures decoded beforehand. Time: CPU
seconds of one thread for everything but the forward that both need: the forwards are timed where they are called, what
keepsight does inside them (the hooks of `capture` and all they call) is counted, and so is its second forward of the
calibration's pictures. scikit-learn's tolerance is that of benchmarks/probe.py; its default is timed on every fourth
layer, without bound.

Memory: peak above the loaded model, the forward's own included, in further processes (scikit-learn at its default
there) in which the C library gives every large buffer back at once. Left to itself it keeps the holes between them,
from a few MiB to a hundred by the order in which the pictures were decoded; that figure is told too, without bound.

Bounds: 10 times in time, 50 times in memory. Same answers: structure to 1e-5, spectra to 1e-4 relative, accuracies to
0.01 in the mean, and to 0.03 at every layer where both chose the same strength (the choice may hang on one validation
picture; how many layers are left is told). The last of transformers' hidden states is after the final norm, so that
layer is not compared. `--shape tiny --pictures 100` shows in a minute that it runs (the memory bound asks for 135M).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _models import build
from _timing import finish, memory_of_process, now, reset_peak, seconds
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from keepsight.diagnosis.collect.batches import Decoded, Loader
from keepsight.diagnosis.collect.passes import measure
from keepsight.diagnosis.collect.record import Seen
from keepsight.diagnosis.data.pictures import find_pictures
from keepsight.diagnosis.probes.probe import L2_GRID, fit_probes, stratified_split
from keepsight.diagnosis.summary import image_rows, spectrum_rows
from keepsight.results import PerImageBuilder
from keepsight.vlm import Vlm
from keepsight.vlm.capture import Capture
from keepsight.vlm.chat import render_prompt
from keepsight.vlm.inference import inference

CLASSES, OBJECTS, BATCH, SEED, TIMED = 10, 4, 8, 0, 4
TOLERANCE, DEFAULT_TOLERANCE = 3e-6, 1e-4
NO_HOLES = {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
MEANS = tuple(
    f"{name}/{variant}" for name in ("cohesion", "coupling", "token_homogeneity") for variant in ("raw", "centred")
)
SPECTRUM = ("participation_ratio", "entropy_rank", "components_90", "components_95", "components_99")
SPECTRA = (
    *(f"{name}/{variant}" for name in SPECTRUM for variant in ("covariance", "correlation")),
    "feature_correlation/",
)
PROBES = ("accuracy", "shuffled")
Answers = dict[str, list[float]]


def picture(index: int, side: int) -> tuple[Image.Image, np.ndarray]:
    """Noise on four quarters, each an object; the colour of the first tells the class, not always clearly."""
    generator = np.random.default_rng(index)
    mask = np.kron(np.array([[1, 2], [3, 4]], dtype=np.uint8), np.ones((side // 2, side // 2), dtype=np.uint8))
    colours = generator.integers(0, 255, (OBJECTS + 1, 3)).astype(float)
    colours[1] = np.random.default_rng([7, index % CLASSES]).integers(0, 255, 3) + generator.normal(0, 40, 3)
    pixels = colours[mask] + generator.normal(0, 20, (side, side, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), mask


class Pictures(Loader):
    """Decoded beforehand."""

    def decode(self) -> None:
        self.starts = list(range(0, len(self.pictures), self.batch_size))
        self.rate = 1.0
        self.ready = {start: super(Pictures, self).load(self._from(start), masks=True)[0] for start in self.starts}

    def _from(self, start: int) -> list[int]:
        return list(range(start, min(start + self.batch_size, len(self.pictures))))

    def load(self, indices: Any, masks: bool) -> tuple[Decoded | None, Seen]:
        if list(indices) != self._from(indices[0]):
            return super().load(indices, masks)  # the calibration's
        return self.ready[indices[0]], Seen()


class Forward:
    """Seconds of the forwards of whole batches, without what hooks of `capture` do inside them."""

    def __init__(self, loader: Pictures, batches: int) -> None:
        self.vlm, self.batches = loader.vlm, batches
        self.seconds = self._hooks = 0.0
        self._run = loader.vlm.forward_core
        self._take = Capture._take

    def __enter__(self) -> Forward:
        run, take = self._run, self._take

        def timed_run(**inputs: Any) -> Any:
            self._hooks, start = 0.0, now()
            output = run(**inputs)
            self.times.append(now() - start - self._hooks)
            return output

        def timed_take(capture: Capture, layer: int, hidden: torch.Tensor) -> None:
            start = now()
            take(capture, layer, hidden)
            self._hooks += now() - start

        self.times: list[float] = []
        self.vlm.forward_core = timed_run
        Capture._take = timed_take
        return self

    def __exit__(self, *_: Any) -> None:
        del self.vlm.forward_core
        Capture._take = self._take
        self.seconds = sum(self.times[-self.batches :])  # those before are the calibration's


def load(shape: str, n: int) -> tuple[Pictures, list[str]]:
    torch.manual_seed(SEED)
    model, processor = build(shape)
    side = processor.image_processor.crop_size["height"]
    drawn = [picture(i, side) for i in range(n)]
    found = find_pictures([image for image, _ in drawn], masks=[mask for _, mask in drawn])
    rendered = render_prompt(processor, "Describe the picture.")
    loader = Pictures(Vlm(model.eval()), processor, found.items, rendered, BATCH, SEED)
    loader.decode()
    return loader, [f"class {i % CLASSES}" for i in range(n)]


def keepsight_way(loader: Pictures, labels: list[str]) -> tuple[Answers, dict[str, float]]:
    layers = range(loader.vlm.depth + 1)
    found: Answers = {name: [] for name in (*MEANS, *SPECTRA)}

    def work() -> None:
        with tempfile.TemporaryDirectory() as folder:
            accumulator, _ = measure(loader.vlm, loader, layers, Path(folder), exact=True)
            probe = fit_probes(lambda at: torch.from_numpy(accumulator.pooled.read(at)), layers, labels, seed=SEED)
            rows = image_rows(accumulator, PerImageBuilder([str(i) for i in range(len(labels))]), seed=SEED)
            for at in layers:
                rows += spectrum_rows(accumulator, at, seed=SEED)
        found["accuracy"], found["accuracy's L2"] = probe.correct.mean(axis=1).tolist(), probe.l2.tolist()
        found["shuffled"], found["shuffled's L2"] = probe.shuffled.mean(axis=1).tolist(), probe.shuffled_l2.tolist()
        for row in rows:
            if row.tokens == "all" and f"{row.metric}/{row.variant}" in found:
                assert row.value is not None
                found[f"{row.metric}/{row.variant}"].append(row.value)

    with Forward(loader, len(loader.starts)) as forward:
        took = seconds(work)
    return found, {"seconds": took - forward.seconds, "forward": forward.seconds}


def obvious_way(loader: Pictures, labels: list[str], timing: bool) -> tuple[Answers, dict[str, float]]:
    n = len(labels)
    states: list[list[np.ndarray]] = []
    visual: list[np.ndarray] = []
    found: Answers = {name: [] for name in (*MEANS, *SPECTRA, *PROBES, *(f"{name}'s L2" for name in PROBES))}
    members = loader.ready[0].batch.objects[:OBJECTS, : len(loader.ready[0].batch.image) // BATCH].numpy()
    split, names = stratified_split(labels, SEED), np.array(labels)
    known = np.concatenate([split.train, split.validation])
    shuffled = names.copy()
    shuffled[known] = names[np.random.default_rng([SEED, 1]).permutation(known)]
    size = min(n, min(32, max(8, n // 64)))
    calibration = np.sort(np.random.default_rng([SEED, 5]).permutation(n)[:size])  # the pictures of keepsight's mean

    def run() -> None:
        for start in loader.starts:
            decoded, _ = loader.load(loader._from(start), masks=True)
            assert decoded is not None
            output = loader.vlm.forward_core(**decoded.inputs, output_hidden_states=True)
            states.append([hidden.numpy() for hidden in output.hidden_states])
            visual.append(loader.vlm.visual_mask(decoded.inputs["input_ids"]).numpy())

    def tokens(layer: int) -> np.ndarray:
        """[n, N, d]"""
        picked = [
            batch[layer][mask].reshape(len(mask), -1, batch[layer].shape[2])
            for batch, mask in zip(states, visual, strict=True)
        ]
        return np.concatenate(picked)

    def probes(x: np.ndarray, target: np.ndarray, tolerance: float) -> tuple[float, float]:
        z = StandardScaler().fit(x[split.train]).transform(x)
        best = None
        for l2 in L2_GRID:
            model = LogisticRegression(C=1 / (len(split.train) * l2), tol=tolerance, max_iter=5000)
            model.fit(z[split.train], target[split.train])
            score = model.score(z[split.validation], target[split.validation])
            if best is None or score >= best[0]:
                best = score, model, l2
        assert best is not None
        return float(best[1].score(z[split.test], names[split.test])), best[2]

    def answers() -> None:
        for layer in range(len(states[0])):
            x = tokens(layer)
            pooled = x.mean(axis=1).astype(np.float64)
            for name, target in zip(PROBES, (names, shuffled), strict=True):
                accuracy, strength = probes(pooled, target, TOLERANCE if timing else DEFAULT_TOLERANCE)
                found[name].append(accuracy)
                found[f"{name}'s L2"].append(strength)
            for variant, centre in (("raw", 0.0), ("centred", x[calibration].mean(axis=(0, 1)))):
                each = np.array([pairwise(one - centre, members) for one in x])
                for name, value in zip(("token_homogeneity", "cohesion", "coupling"), each.mean(axis=0), strict=True):
                    found[f"{name}/{variant}"].append(float(value))
            flat = x.reshape(-1, x.shape[2]).astype(np.float64)
            matrices = {"covariance": np.cov(flat.T), "correlation": np.corrcoef(flat.T)}
            for variant, matrix in matrices.items():
                for name, value in zip(SPECTRUM, spectrum(matrix), strict=True):
                    found[f"{name}/{variant}"].append(value)
            off = matrices["correlation"][np.triu_indices(x.shape[2], 1)]
            found["feature_correlation/"].append(float(np.abs(off).mean()))

    with Forward(loader, len(loader.starts)) as forward:
        running = seconds(run) - forward.seconds
    costs = {"seconds": running + seconds(answers), "forward": forward.seconds}
    if not timing:
        return found, costs
    some = [tokens(layer).mean(axis=1).astype(np.float64) for layer in range(0, len(states[0]), TIMED)]
    strict, loose = (
        seconds(lambda tol=tol: [probes(x, names, tol) for x in some]) for tol in (TOLERANCE, DEFAULT_TOLERANCE)
    )
    return found, costs | {"scikit-learn at its default / here": loose / strict}


def pairwise(x: np.ndarray, members: np.ndarray) -> tuple[float, float, float]:
    """Homogeneity, cohesion and coupling of one picture [N, d], from all its cosines."""
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine = unit @ unit.T
    own = np.eye(len(cosine), dtype=bool)
    cohesion = [cosine[np.outer(inside, inside) & ~own].mean() for inside in members]
    coupling = [cosine[np.outer(inside, ~inside)].mean() for inside in members]
    return float(cosine[~own].mean()), float(np.mean(cohesion)), float(np.mean(coupling))


def spectrum(matrix: np.ndarray) -> list[float]:
    values = np.linalg.eigvalsh(matrix)[::-1].clip(min=0)
    share = values / values.sum()
    positive = share[share > 0]
    whole = [float(np.searchsorted(share.cumsum(), wanted - 1e-9) + 1) for wanted in (0.90, 0.95, 0.99)]
    return [float(1 / (share**2).sum()), float(np.exp(-(positive * np.log(positive)).sum())), *whole]


def side(way: str, shape: str, n: int, timing: bool) -> None:
    """One side, in a process of its own: its answers, seconds and memory, as JSON."""
    loader, labels = load(shape, n)
    reset_peak()
    before = memory_of_process("VmRSS")
    with inference(loader.vlm.model):
        loader.vlm.forward_core(**loader.ready[0].inputs)
        forward = memory_of_process("VmHWM") - before
        ways = {"keepsight": keepsight_way, "obvious": partial(obvious_way, timing=timing)}
        answers, costs = ways[way](loader, labels)
    costs |= {"memory": memory_of_process("VmHWM") - before, "memory of one forward": forward}
    print(json.dumps({"answers": answers, "costs": costs}))


def same(ours: Answers, theirs: Answers) -> bool:
    """Whether the answers are the same; says how far apart they are."""
    gaps = {name: np.abs(np.array(ours[name]) - np.array(theirs[name]))[:-1] for name in ours}
    relative = max(float((gaps[name] / np.abs(theirs[name][:-1])).max()) for name in SPECTRA)
    structure = max(float(gaps[name].max()) for name in MEANS)
    close, told = True, []
    for name in PROBES:
        chosen = [np.float32(found[f"{name}'s L2"])[:-1] for found in (ours, theirs)]
        alike = chosen[0] == chosen[1]
        most, mean = float(gaps[name][alike].max(initial=0.0)), float(gaps[name].mean())
        close &= most < 0.03 + 1e-9 and mean <= 0.01
        told.append(f"{name} {most:.3f} at most at {alike.sum()} of {len(alike)} layers, {mean:.4f} in the mean of all")
    print(f"apart: structure {structure:.1e}, spectra {relative:.1e} relative, {'; '.join(told)}")
    print(f"accuracy: keepsight {np.mean(ours['accuracy']):.3f}, the obvious way {np.mean(theirs['accuracy']):.3f}")
    held = structure <= 1e-5 and relative <= 1e-4 and close
    print(f"same answers: {'holds' if held else 'MISSED'}")
    return held


def asked(way: str, arguments: argparse.Namespace, environment: dict[str, str]) -> dict[str, Any]:
    """What one side says in a process with this environment."""
    command = [sys.executable, __file__, "--side", way, "--shape", arguments.shape]
    command += ["--pictures", str(arguments.pictures)]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment)
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="135M", choices=("135M", "tiny"))
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--side", choices=("keepsight", "obvious"), help="run one side and stop")
    arguments = parser.parse_args()
    if arguments.side:
        timing = not NO_HOLES.items() <= os.environ.items()
        side(arguments.side, arguments.shape, arguments.pictures, timing)
        return
    found, memory = {}, {}
    for way in ("keepsight", "obvious"):
        found[way], lean = (asked(way, arguments, environment) for environment in ({}, NO_HOLES))
        memory[way] = lean["costs"]["memory"]
        costs = ", ".join(f"{name} {value:.2f}" for name, value in found[way]["costs"].items())
        print(f"{way}: {costs}, without holes {memory[way]:.2f} (seconds, MiB)", flush=True)
    held = [same(found["keepsight"]["answers"], found["obvious"]["answers"])]
    took = {way: found[way]["costs"]["seconds"] for way in found}
    for name, cost, bound in (("seconds", took, 10), ("memory", memory, 50)):
        ratio = cost["obvious"] / cost["keepsight"]
        held.append(ratio >= bound)
        print(f"{name}: {ratio:.1f}x, at least {bound}x: {'holds' if held[-1] else 'MISSED'}", flush=True)
    finish(*held)


if __name__ == "__main__":
    main()
