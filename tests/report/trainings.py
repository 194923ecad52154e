"""Made-up trainings in which answers get better, texture and fidelity fade, and colour gets easier to read.

`python -m tests.report.trainings OUT.html [NUMBER]` writes the report of an attribution of so many trainings.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from keepsight.report import build
from keepsight.results import LoadedRun, Measurement, Point
from keepsight.results.points import by_training
from keepsight.results.trend import correlations, over_seeds
from tests.report.sample import CHANCE, DEPTH, TARGETS, N, proportion

STEPS = (0, 100, 200, 400, 800, 1200, 1600, 2000)
# What a layer tells at the start, and how much of it the deepest layer loses (or gains) by the end.
FADES = {"texture": (0.95, -0.35), "lighting": (0.88, -0.2), "colour": (0.58, 0.25), "shape": (0.5, 0.2)}


def sample_points(training: str, seed: int, fades: dict[str, tuple[float, float]] = FADES) -> list[Point]:
    """One training of eight checkpoints."""
    rng = np.random.default_rng(seed)
    points = []
    for step in STEPS:
        done = 1 - np.exp(-step / 700)
        skill = round((0.31 + 0.48 * done + rng.normal(0, 0.012)) * 2400) / 2400
        low, high = proportion(skill, 2400)
        rows = [Measurement("answer_accuracy", skill, low=low, high=high, n=2400, unit="questions", seed=0)]
        rows.append(Measurement("answer_accuracy", skill / 2, n=600, unit="questions", target="where"))
        for target, (start, change) in fades.items():
            rows.append(Measurement("probe_chance", CHANCE[target], n=N, target=target, seed=0))
            for layer in range(DEPTH + 1):
                value = start + change * done * layer / DEPTH + rng.normal(0, 0.015)
                value = round(min(value, 1) * N) / N
                low, high = proportion(value, N)
                rows.append(Measurement("probe_accuracy", value, layer, low, high, N, target=target, seed=0))
        for layer in range(DEPTH + 1):
            value = 0.86 - 0.03 * layer - 0.045 * done * layer + rng.normal(0, 0.008)
            rows.append(Measurement("fidelity", value, layer, value - 0.02, value + 0.02, N, seed=0))
            rows.append(Measurement("fidelity", 0.1, layer, n=N, variant="position only", seed=0))
        points.append(Point("start" if step == 0 else f"full-{step}", rows, training))
    return points


def sample_attribution(names: Sequence[str] = ("seed-0", "seed-1", "seed-2"), label: str = "paid") -> LoadedRun:
    """As `keepsight attribute` leaves it, of one training or several."""
    points = [point for seed, name in enumerate(names) for point in sample_points(name, seed)]
    info = {
        "kind": "attribution",
        "command": f"keepsight attribute {' '.join(f'runs/{name}' for name in names)} --out runs/{label}",
        "created": "2026-01-02T03:04:05+00:00",
        "versions": {"python": "3.11.9", "keepsight": "0.1.0"},
        "model": {"name": "testbed", "fingerprint": ""},
        "depth": DEPTH,
        "pre_layer": None,
        "seed": 0,
        "seeds": list(range(len(names))),
        "counts": {"trainings": len(names), "checkpoints": len(points), "questions": 2400, "images": N},
        "targets": {target: TARGETS[target] for target in FADES},
    }
    rows = over_seeds([correlations(of) for of in by_training(points).values()])
    return LoadedRun(label, rows, info, "tasks: questions.jsonl\n", points=points)


if __name__ == "__main__":
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    build([sample_attribution([f"seed-{seed}" for seed in range(count)])], Path(sys.argv[1]))
