"""Linear probe: can a linear classifier still read the label from the mean visual token of a layer?

The paper's "global function"; the protocol is ours, see docs/metrics.md. The label is predicted from the mean over the
visual tokens of an image, standardised by training statistics, by multinomial logistic regression; the L2 strength is
chosen on a validation split, and the test split is scored once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from keepsight.diagnosis.probes.fit import (
    Features,
    Fit,
    Split,
    bytes_of_layer,
    fit,
    fit_streamed,
    layers_memory,
    streams,
)
from keepsight.results import Measurement

L2_GRID = tuple(10.0 ** (k / 2) for k in range(-8, 3))  # of the mean loss: 1e-4 … 10
VALIDATION, TEST = 0.2, 0.2
SHUFFLED = "shuffled labels"
RESAMPLES = 2000


def stratified_split(labels: Sequence[str], seed: int) -> Split:
    """Within each class, shuffled with the seed: 20 % test, 20 % validation, the rest training.

    Every class has a picture in training and in test; classes of two have none in validation.

    Raises:
        ValueError: a class with one picture, fewer than two classes, or no class of three or more.
    """
    counts = Counter(labels)
    if len(counts) < 2:
        raise ValueError(f"a probe needs at least two classes; got {sorted(counts)}. Add pictures of other classes")
    if alone := sorted(name for name, count in counts.items() if count < 2):
        raise ValueError(
            f"class {alone[0]!r} has one picture ({len(alone)} such classes); a probe needs at least two of each, one "
            "to train on and one to test on. Add pictures, or leave the class out"
        )
    if max(counts.values()) < 3:
        raise ValueError(
            "no class has three pictures, so none can be kept for validation; add pictures to at least one class"
        )
    generator = np.random.default_rng(seed)
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    array = np.asarray(labels, dtype=object)
    for name in sorted(counts):
        members = generator.permutation(np.flatnonzero(array == name))
        n_test = max(1, round(TEST * len(members)))
        n_validation = max(1, round(VALIDATION * len(members))) if len(members) > 2 else 0
        parts[2].extend(members[:n_test])
        parts[1].extend(members[n_test : n_test + n_validation])
        parts[0].extend(members[n_test + n_validation :])
    train, validation, test = (np.sort(np.asarray(part, dtype=np.int64)) for part in parts)
    return Split(train, validation, test)


PER_LAYER = ("validation", "l2", "correct", "shuffled", "shuffled_l2")  # fields of a `Probe`


@dataclass(frozen=True)
class Probe:
    """Outcome of one label set over P layers.

    layers: [P]; validation: [P] accuracy at the chosen strength; l2: [P]; correct: bool [P, n_test];
    shuffled: bool [P, n_test], the same protocol trained on shuffled labels; shuffled_l2: [P], its strengths;
    majority: bool [n_test], whether the most frequent training class is the right answer; test: [n_test], which of the
    images these are.
    """

    layers: list[int]
    test: np.ndarray
    validation: np.ndarray
    l2: np.ndarray
    correct: np.ndarray
    shuffled: np.ndarray
    shuffled_l2: np.ndarray
    majority: np.ndarray

    def with_layers(self, other: Probe) -> Probe:
        """The same with what `other`, of the same label set and split, found at its layers."""
        at = [self.layers.index(layer) for layer in other.layers]
        found = {name: getattr(self, name).copy() for name in PER_LAYER}
        for name, values in found.items():
            values[at] = getattr(other, name)
        return replace(self, **found)


def fit_probes(
    read: Callable[[int], Features],
    layers: Sequence[int],
    labels: Sequence[str],
    *,
    seed: int = 0,
    grid: Sequence[float] = L2_GRID,
    device: torch.device | str = "cpu",
) -> Probe:
    """Probe every layer, as many layers at a time as memory allows.

    A layer whose features alone take too much (`fit.FEATURES_MEMORY`) is read block by block, once for every
    step of the solver. The objective is the same, so the answers are those of features in memory, but for rounding.

    Args:
        read: layer → [n, d] features of the n labelled images.
        labels: [n] class names.
        seed: of the split and of the shuffled-label control.
        device: where the probes are fitted.

    Raises:
        ValueError: see `stratified_split`.
    """
    split = stratified_split(labels, seed)
    names = sorted(set(labels))
    y = torch.tensor([names.index(label) for label in labels])
    # The control: training and validation labels permuted, so that only the label's link to the picture is lost.
    known = np.concatenate([split.train, split.validation])
    shuffled = y.clone()
    shuffled[known] = y[np.random.default_rng([seed, 1]).permutation(known)]

    targets = torch.stack([y, shuffled]).to(device)
    l2 = torch.tensor(grid, dtype=torch.float32, device=device)
    fits: list[list[Fit]] = [[], []]
    together, start = None, 0
    while start < len(layers):
        first = read(layers[start])
        n, d = len(split.train), first.shape[1]
        if streams(n, d):
            start += 1
            found = fit_streamed(first, targets, split, l2, len(names))
        else:
            together = together or max(1, layers_memory(device) // bytes_of_layer(n, d, len(names)))
            chunk = layers[start + 1 : start + together]
            start += 1 + len(chunk)
            # Nothing here holds on to the features, which `fit` lets go of early.
            found = fit(_stacked([first, *map(read, chunk)], device), targets, split, l2, len(names))
        for kind, outcome in zip(fits, found, strict=True):
            kind.append(outcome)
    (validation, strength, correct), (_, control_strength, control) = (
        tuple(np.concatenate(part) for part in zip(*kind, strict=True)) for kind in fits
    )
    majority = torch.bincount(y[split.train], minlength=len(names)).argmax()
    return Probe(
        layers=list(layers),
        test=split.test,
        validation=validation,
        l2=strength,
        correct=correct,
        shuffled=control,
        shuffled_l2=control_strength,
        majority=(y[split.test] == majority).numpy(),
    )


def _stacked(layers: list[Features], device: torch.device | str) -> torch.Tensor:
    """[P, n, d]"""
    whole = torch.empty(len(layers), *layers[0].shape)
    for one, features in zip(whole, layers, strict=True):
        one.copy_(torch.as_tensor(features[:]))
    return whole.to(device)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a share."""
    z = 1.959963984540054
    share, z2n = successes / n, z * z / n
    centre = (share + z2n / 2) / (1 + z2n)
    half = z / (1 + z2n) * (share * (1 - share) / n + z2n / (4 * n)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def share_row(metric: str, right: np.ndarray, **fields: Any) -> Measurement:
    """The share of right answers, bool [n_test], with its Wilson interval; the row's other fields as given."""
    low, high = wilson(int(right.sum()), len(right))
    return Measurement(metric, float(right.mean()), low=low, high=high, n=len(right), **fields)


def drop_with_interval(
    first: np.ndarray, layer: np.ndarray, majority: np.ndarray, seed: int
) -> tuple[float, float, float]:
    """(acc_0 − acc_l) / (acc_0 − chance) and its 95 % interval: paired bootstrap over the test images.

    first, layer, majority: bool [n_test], whether each answer was right. Whole images are drawn, so that the three
    accuracies keep their dependence; a resample where acc_0 does not exceed chance counts as ±∞.
    """
    n = len(first)
    pattern = np.bincount(4 * first + 2 * layer + 1 * majority, minlength=8)
    draws = np.random.default_rng([seed, 2]).multinomial(n, pattern / n, size=RESAMPLES)  # [RESAMPLES, 8]
    bits = np.arange(8)
    acc_0, acc_l, chance = ((draws * ((bits >> shift) & 1)).sum(axis=1) / n for shift in (2, 1, 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        drops = (acc_0 - acc_l) / np.maximum(acc_0 - chance, 0.0)
    low, high = np.nanquantile(drops, [0.025, 0.975], method="inverted_cdf")
    return float((first.mean() - layer.mean()) / (first.mean() - majority.mean())), float(low), float(high)


def probe_rows(
    probe: Probe,
    *,
    target: str,
    middle: int | None,
    seed: int,
    tokens: str = "all",
    said: Mapping[int, str] | None = None,
) -> list[tuple[Measurement, np.ndarray | None]]:
    """The rows of one label set, each with what every test image adds to it (None: nothing can be said).

    middle: the layer of probe_drop, None if it was not captured; tokens: those of the features; said: layer → a note
    on its features. Chance, which no features change, has a row for all tokens only.
    """
    common: dict[str, Any] = {"target": target, "seed": seed, "tokens": tokens}
    rows: list[tuple[Measurement, np.ndarray | None]] = []

    def share(metric: str, answers: np.ndarray, **fields: Any) -> None:
        rows.append((share_row(metric, answers, **common, **fields), answers))

    if tokens == "all":
        share("probe_chance", probe.majority, note="most frequent training class")
    for i, layer in enumerate(probe.layers):
        note = "; ".join(filter(None, [f"L2 {probe.l2[i]:.2g}", (said or {}).get(layer)]))
        share("probe_accuracy", probe.correct[i], layer=layer, note=note)
        note = f"L2 {probe.shuffled_l2[i]:.2g}"
        share("probe_accuracy", probe.shuffled[i], layer=layer, variant=SHUFFLED, note=note)
    later = [i for i, layer in enumerate(probe.layers) if layer > 0]
    wanted = {"probe_drop": probe.layers.index(middle)} if middle in probe.layers else {}
    if later:
        # Ties go to the earlier layer; the choice never sees the test split.
        wanted["probe_worst_layer"] = later[int(np.argmin(probe.validation[later]))]
    for metric, i in wanted.items():
        rows.append(_drop_row(probe, metric, i, {"n": probe.correct.shape[1], **common}))
    return rows


def _drop_row(probe: Probe, metric: str, i: int, common: dict) -> tuple[Measurement, np.ndarray | None]:
    layer = probe.layers[i]
    if 0 not in probe.layers:
        return Measurement(metric, None, layer=layer, note="layer 0 was not captured", **common), None
    first, n = probe.correct[probe.layers.index(0)], probe.correct.shape[1]
    low, _ = wilson(int(first.sum()), n)
    chance = float(probe.majority.mean())
    if low <= chance:
        note = (
            f"accuracy at layer 0 ({first.mean():.3f}, interval from {low:.3f}) is not above chance ({chance:.3f}), so "
            "there is nothing to lose"
        )
        return Measurement(metric, None, layer=layer, note=note, **common), None
    value, low, high = drop_with_interval(first, probe.correct[i], probe.majority, common["seed"])
    notes = ["layer chosen on validation, scored on test"] if metric == "probe_worst_layer" else []
    if not np.isfinite([low, high]).all():
        low = high = float("nan")
        notes.append("no interval: in resamples of the test images layer 0 is not above chance; give more images")
    row = Measurement(metric, value, layer=layer, low=low, high=high, note="; ".join(notes), **common)
    # The ratio's linearisation, image by image.
    above = first.mean() - chance
    share = (first - first.mean()) - (probe.correct[i] - probe.correct[i].mean())
    share = share - value * ((first - first.mean()) - (probe.majority - chance))
    return row, value + share / above
