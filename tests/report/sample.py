"""Two made-up runs with the shape of a real comparison, for the tests and for looking at the page.

`python tests/report/sample.py OUT.html` writes a report of them.
"""

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from keepsight.report import build
from keepsight.results import Example, LoadedRun, Measurement, SimilarityMap, prompt_hash
from keepsight.results.maps import compress

DEPTH = 8
N = 600
# accuracy at layers 0, 4 and 8 for the baseline, then with PRe
PROBES = {
    "texture": ((0.985, 0.861, 0.795), (0.983, 0.953, 0.921)),
    "lighting": ((0.912, 0.802, 0.741), (0.915, 0.861, 0.823)),
    "orientation": ((0.671, 0.598, 0.562), (0.665, 0.612, 0.583)),
    "shape": ((0.489, 0.670, 0.679), (0.491, 0.725, 0.733)),
    "colour": ((0.604, 0.811, 0.834), (0.598, 0.806, 0.829)),
}
CHANCE = {"texture": 1 / 8, "lighting": 1 / 4, "orientation": 1 / 4, "shape": 1 / 6, "colour": 1 / 6}
TARGETS = {
    "texture": "never asked",
    "lighting": "never asked",
    "orientation": "never asked",
    "shape": "asked",
    "colour": "asked",
}


def proportion(value: float, n: int) -> tuple[float, float]:
    """95 % Wilson interval."""
    z = 1.96
    centre = (value + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(value * (1 - value) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return centre - half, centre + half


def _bend(ends: tuple[float, float, float], layer: int) -> float:
    return float(np.interp(layer, [0, DEPTH // 2, DEPTH], ends))


def sample_run(arm: int, *, label: str | None = None, seed: int = 0) -> LoadedRun:
    """Run 0 is the baseline, run 1 the one with PRe."""
    rng = np.random.default_rng([arm, seed])
    rows: list[Measurement] = []
    for target, arms in PROBES.items():
        first = _bend(arms[arm], 0)
        for layer in range(DEPTH + 1):
            value = round((_bend(arms[arm], layer) + rng.normal(0, 0.004)) * N) / N
            low, high = proportion(value, N)
            common = {"layer": layer, "n": N, "target": target, "seed": seed}
            rows.append(Measurement("probe_accuracy", value, low=low, high=high, **common))
            shuffled = CHANCE[target] + rng.normal(0, 0.01)
            rows.append(Measurement("probe_accuracy", shuffled, variant="shuffled labels", **common))
            bare = {**common, "tokens": "without sinks"}
            ends = {"low": low + 0.01, "high": high + 0.01} if layer else {"low": low, "high": high}
            rows.append(Measurement("probe_accuracy", value + 0.01 * (layer > 0), **ends, **bare))
            rows.append(Measurement("probe_accuracy", shuffled, variant="shuffled labels", **bare))
            if layer == DEPTH // 2:
                drop, half = (first - value) / (first - CHANCE[target]), 0.045
                rows.append(Measurement("probe_drop", drop, low=drop - half, high=drop + half, **common))
                less = drop - 0.01
                rows.append(Measurement("probe_drop", less, low=less - half, high=less + half, **bare))
        rows.append(Measurement("probe_chance", CHANCE[target], n=N, target=target, seed=seed))
    curves = {
        ("cohesion", "raw"): ((0.74, 0.88, 0.91), (0.74, 0.87, 0.90), 0.01),
        ("coupling", "raw"): ((0.36, 0.66, 0.74), (0.36, 0.58, 0.65), 0.015),
        ("gap", "raw"): ((0.38, 0.22, 0.17), (0.38, 0.29, 0.25), 0.012),
        ("cohesion", "centred"): ((0.81, 0.56, 0.49), (0.80, 0.66, 0.57), 0.012),
        ("coupling", "centred"): ((-0.06, 0.04, 0.05), (-0.05, 0.03, 0.05), 0.01),
        ("gap", "centred"): ((0.87, 0.52, 0.44), (0.85, 0.63, 0.52), 0.016),
        ("contrast", "raw"): ((2.06, 1.33, 1.23), (2.06, 1.50, 1.38), 0.03),
        ("participation_ratio", "covariance"): ((1.5, 7.2, 9.4), (1.4, 3.8, 5.7), 0.3),
        ("participation_ratio", "correlation"): ((4.5, 11.0, 13.1), (4.4, 8.0, 9.9), 0.4),
        ("entropy_rank", "covariance"): ((4.1, 18.0, 24.0), (4.0, 11.0, 16.0), 0.6),
        ("components_90", "covariance"): ((3, 19, 28), (3, 12, 19), 0),
        ("components_95", "covariance"): ((5, 31, 43), (5, 22, 31), 0),
        ("components_99", "covariance"): ((14, 66, 84), (14, 51, 66), 0),
        ("feature_correlation", ""): ((0.31, 0.14, 0.12), (0.32, 0.19, 0.16), 0.008),
        ("token_homogeneity", "raw"): ((0.62, 0.71, 0.78), (0.62, 0.66, 0.71), 0.01),
        ("token_norm", ""): ((4.1, 9.8, 21.0), (4.0, 8.9, 18.5), 0.3),
        ("sink_tokens", ""): ((0.0, 0.4, 0.9), (0.0, 0.1, 0.3), 0.1),
        ("sink_channels", ""): ((0.0, 1.0, 2.0), (0.0, 1.0, 1.0), 0),
        ("bleeding", "raw"): ((-0.62, -0.31, -0.22), (-0.62, -0.45, -0.38), 0.02),
        ("bleeding", "raw, random weights"): ((-0.62, -0.55, -0.5), (-0.62, -0.55, -0.5), 0.02),
        ("fidelity", ""): ((0.86, 0.52, 0.41), (0.86, 0.66, 0.58), 0.015),
        ("fidelity", "another image, same place"): ((0.11, 0.09, 0.08), (0.11, 0.1, 0.09), 0.01),
        ("fidelity", "position only"): ((0.08, 0.08, 0.08), (0.08, 0.08, 0.08), 0.01),
        ("fidelity_input", ""): ((0.99, 0.71, 0.55), (0.99, 0.8, 0.66), 0.01),
        ("fidelity_cosine", ""): ((0.93, 0.74, 0.66), (0.93, 0.82, 0.78), 0.01),
        ("cka", ""): ((0.91, 0.62, 0.48), (0.91, 0.7, 0.61), 0.03),
        ("neighbour_agreement", ""): ((0.71, 0.42, 0.31), (0.71, 0.5, 0.4), 0.03),
        ("silencing", ""): ((0.08, 0.22, 0.61), (0.09, 0.15, 0.38), 0.04),
        ("lens_entropy", ""): ((0.81, 0.66, 0.32), (0.82, 0.7, 0.45), 0.02),
    }
    for (metric, variant), (*arms, half) in curves.items():
        unit = "objects" if metric in ("cohesion", "coupling", "gap", "contrast") else "images"
        for tokens in ("all", "without sinks"):
            if metric.startswith("sink") and tokens != "all":
                continue
            for layer in range(DEPTH + 1):
                value = _bend(arms[arm], layer) * (1.0 if tokens == "all" else 0.97) + rng.normal(0, half / 3)
                ends = {"low": value - half, "high": value + half} if half else {}
                if metric == "contrast" and layer == 7 and arm == 0:
                    value, ends = None, {"note": "coupling is near zero"}
                if metric == "silencing":
                    ends["note"] = "256 tokens; 1 of 400 listed, most frequent: 'a' 31 %, ' the' 12 %"
                common = {"layer": layer, "n": N, "unit": unit, "variant": variant, "tokens": tokens, "seed": seed}
                rows.append(Measurement(metric, value, **common, **ends))
    for target, prior, share in (
        ("", 0.31, (0.765, 0.772)),
        ("colour", 0.24, (0.802, 0.811)),
        ("where", 0.27, (0.741, 0.738)),
        ("how many", 0.42, (0.698, 0.724)),
        ("same or different", 0.55, (0.760, 0.751)),
    ):
        n = 2400 if target == "" else 600
        for metric, value in (("answer_prior", prior), ("answer_accuracy", share[arm])):
            low, high = proportion(value, n)
            fields = {"low": low, "high": high, "n": n, "unit": "questions", "target": target, "seed": seed}
            rows.append(Measurement(metric, value, **fields))
    if arm:
        rows.append(Measurement("pre_cosine", 0.91, n=N, seed=seed))
        rows.append(Measurement("pre_margin", 0.34, n=N, seed=seed))
    info = {
        "command": f"keepsight demo --seed {seed}",
        "created": "2026-01-02T03:04:05+00:00",
        "versions": {"python": "3.11.9", "keepsight": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "model": {"name": "testbed", "fingerprint": f"{arm}c0ffee0c0ffee00"},
        "depth": DEPTH,
        "width": 192,
        "pre_layer": DEPTH // 2 if arm else None,
        "prompt": "Describe the picture.",
        "prompt_sha256": prompt_hash("Describe the picture."),
        "seed": seed,
        "counts": {"images": N, "skipped images": 0},
        "targets": TARGETS,
    }
    config = f"pre:\n  weight: {0.5 * arm}\n  layer: middle\nsteps: 600\nbatch_size: 32\n"
    return LoadedRun(label or ("with PRe" if arm else "baseline"), rows, info, config, sample_pictures(arm))


def with_spectra(run: LoadedRun) -> LoadedRun:
    """The run with numbers whose variants are others': each its layer and a tenth for every variant."""
    variants = {"participation_ratio": ("covariance", "correlation"), "token_homogeneity": ("centred", "raw")}
    rows = [row for row in run.rows if row.metric not in variants]
    for metric, names in variants.items():
        for number, variant in enumerate(names):
            rows += [Measurement(metric, at + number / 10, layer=at, variant=variant) for at in range(DEPTH + 1)]
    return replace(run, rows=rows)


def sample_map(arm: int, mask: np.ndarray, grid: int = 8) -> SimilarityMap:
    """Patches that share a direction with their object, less and less with depth, and each arm its own way."""
    rng = np.random.default_rng([arm, 3])
    side = len(mask) // grid
    owner = mask[side // 2 :: side, side // 2 :: side].ravel()
    directions, shared, own = rng.normal(size=(4, 32)), rng.normal(size=32), rng.normal(size=(grid * grid, 32))
    packed = []
    for layer in range(DEPTH + 1):
        blur = layer / DEPTH * (0.6 if arm else 1.2)
        packed.append(compress(directions[owner] * (1.4 - blur) + 0.5 * own + blur * shared))
    codes, error, worst = zip(*packed, strict=True)
    row, column = np.divmod(np.arange(grid * grid), grid)
    return SimilarityMap(
        layers=np.arange(DEPTH + 1, dtype=np.int16),
        codes=np.stack(codes),
        error=np.array(error, dtype=np.float32),
        worst=np.array(worst, dtype=np.float32),
        centres=((np.column_stack([column, row]) + 0.5) / grid).astype(np.float32),
        tile=np.zeros(grid * grid, np.int16),
        row=row.astype(np.int16),
        column=column.astype(np.int16),
        thumbnail=np.zeros(grid * grid, dtype=bool),
        top=np.stack([np.where(rng.random(grid * grid) < layer / DEPTH, 0, 1 + owner) for layer in range(DEPTH + 1)]),
        words=np.array([" the", " grey", "red", " square", " circle"]),
    )


def sample_pictures(arm: int, count: int = 6) -> list[Example]:
    """Small scenes of two or three objects with their masks and maps."""
    rng = np.random.default_rng(7)
    colours = {"red": (214, 64, 52), "blue": (52, 98, 196), "green": (62, 150, 84), "yellow": (232, 190, 60)}
    found = []
    for number in range(count):
        stripes = 150 + 30 * np.sin(np.arange(64) / (1.5 + number))[:, None, None] + rng.normal(0, 4, (64, 64, 3))
        image = Image.fromarray(stripes.clip(0, 255).astype(np.uint8))
        mask = Image.new("L", (64, 64), 0)
        names = []
        for index, (left, top) in enumerate([(6, 8), (38, 36), (36, 6)][: 2 + number % 2]):
            name = list(colours)[(number + index) % 4]
            size = int(rng.integers(16, 24))
            box = (left, top, left + size, top + size)
            for canvas, ink in ((image, colours[name]), (mask, index + 1)):
                draw = ImageDraw.Draw(canvas)
                draw.ellipse(box, fill=ink) if (number + index) % 2 else draw.rectangle(box, fill=ink)
            names.append(f"{name} {'circle' if (number + index) % 2 else 'square'}")
        objects = np.asarray(mask)
        caption = "a " + " and a ".join(names)
        found.append(Example(image, objects, f"{number:05d}.png", caption, sample_map(arm, objects)))
    return found


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/sample.html")
    chosen = [sample_run(int(arm)) for arm in (sys.argv[2] if len(sys.argv) > 2 else "01")]
    print(build(chosen, target))
