"""Probes of all layers and L2 strengths together against scikit-learn's LogisticRegression one by one.

    python benchmarks/probe.py

Same standardised data, same objective, same grid. Features as wide as those of a 135 M model (d = 576), 1,200 training
pictures (those of 2,000) of 10 classes, six layers a pair, other data in every pair. scikit-learn's tolerance is set so
that its objective, too, is good to 1e-3 at every strength; its default stops up to 15 % above the optimum at weak
regularisation (its time on the first pair is printed as well). As many layers are solved together as a diagnosis takes
(`layers_memory`): more than the caches hold would take longer. Bounds: 10 times; objectives equal to 1e-3 relative.
"""

import numpy as np
import torch
from _timing import finish, ratio_of, seconds, verdict
from sklearn.linear_model import LogisticRegression

from keepsight.diagnosis.probes.fit import bytes_of_layer, layers_memory, standardise
from keepsight.diagnosis.probes.logistic import Solution, objective, solve
from keepsight.diagnosis.probes.probe import L2_GRID

LAYERS, PICTURES, WIDTH, CLASSES, PAIRS = 6, 1200, 576, 10, 5
TOGETHER = max(1, layers_memory("cpu") // bytes_of_layer(PICTURES, WIDTH, CLASSES, targets=1))


def features(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[P, n, d] badly conditioned features, the classes further apart from layer to layer; [n] labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(PICTURES) % CLASSES
    spread = torch.logspace(-1.5, -0.5, LAYERS)[:, None, None]
    centres = spread * torch.randn(LAYERS, CLASSES, WIDTH, generator=generator)
    mixing = torch.randn(LAYERS, WIDTH, WIDTH, generator=generator) * torch.logspace(0, -2, WIDTH)[:, None]
    x = (torch.randn(LAYERS, PICTURES, WIDTH, generator=generator) + centres[:, labels]) @ mixing
    return standardise(x, np.arange(PICTURES)), labels


def one_by_one(x: np.ndarray, y: np.ndarray, tolerance: float) -> list[list[LogisticRegression]]:
    return [
        [LogisticRegression(C=1 / (PICTURES * l2), tol=tolerance, max_iter=5000).fit(layer, y) for l2 in L2_GRID]
        for layer in x
    ]


def main() -> None:
    ours_times, theirs_times, worst = [], [], 0.0
    grid = torch.tensor(L2_GRID)
    for pair in range(PAIRS):
        x, y = features(pair)
        data, target = x.double().numpy(), y.numpy()
        found: list[list[Solution]] = []
        fits: dict[str, list[list[LogisticRegression]]] = {}

        def ours(x: torch.Tensor = x, y: torch.Tensor = y, found: list = found) -> None:
            found += [list(solve(part, y[None], grid, CLASSES)) for part in x.split(TOGETHER)]

        def theirs(data: np.ndarray = data, target: np.ndarray = target, fits: dict = fits) -> None:
            fits["theirs"] = one_by_one(data, target, 3e-6)

        for work, times in ((ours, ours_times), (theirs, theirs_times))[:: 1 if pair % 2 else -1]:
            times.append(seconds(work))
        mine = [
            torch.cat(
                [
                    objective(part, y[None], one.strength, one.weights, one.intercept)[:, 0]
                    for part, one in zip(x.split(TOGETHER), together, strict=True)
                ]
            )
            for together in reversed(list(zip(*found, strict=True)))
        ]
        weights = torch.tensor(np.array([[fit.coef_ for fit in row] for row in fits["theirs"]]))
        intercept = torch.tensor(np.array([[fit.intercept_ for fit in row] for row in fits["theirs"]]))
        other = [
            objective(x, y[None], l2, weights[:, r, None], intercept[:, r, None])[:, 0] for r, l2 in enumerate(L2_GRID)
        ]
        worst = max(worst, *(float((a / b - 1).abs().max()) for a, b in zip(mine, other, strict=True)))
        print(f"pair {pair}: ours {ours_times[-1]:.2f} s, scikit-learn {theirs_times[-1]:.2f} s", flush=True)
        if pair == 0:
            default = seconds(lambda data=data, target=target: one_by_one(data, target, 1e-4))
            print(f"  scikit-learn at its default tolerance {default:.2f} s, no bound", flush=True)
    print("objective of the last layer at each strength, ours / scikit-learn:")
    print("  " + "  ".join(f"{a[-1]:.5f}/{b[-1]:.5f}" for a, b in zip(mine, other, strict=True)))
    print(f"largest relative difference of the objective: {worst:.1e}, at most 1e-3")
    finish(worst <= 1e-3, verdict("probe", ratio_of(theirs_times, ours_times), at_least=10))


if __name__ == "__main__":
    main()
