"""From accumulated values to `Measurement` rows; images are the clusters of every interval."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from keepsight.diagnosis.collect.accumulate import COLUMNS, SCOPES, Accumulator
from keepsight.diagnosis.collect.mean_tokens import RowsWithoutSinks
from keepsight.diagnosis.collect.store import StoredRows
from keepsight.diagnosis.metrics.spectrum import spectrum
from keepsight.diagnosis.probes.probe import fit_probes, probe_rows
from keepsight.diagnosis.progress import tracked
from keepsight.results import Measurement, PerImageBuilder
from keepsight.results.intervals import Estimate, mean_interval, ratio_shares

NEAR_ZERO = 0.05  # a coupling below this makes the contrast ratio meaningless


def contrast_interval(cohesion: np.ndarray, coupling: np.ndarray) -> tuple[Estimate, np.ndarray]:
    """Ratio of the data-set means with a linearised 95 % interval, and what each image adds to it.

    None where the coupling is near zero; images then add NaN.
    """
    nothing = np.full(len(cohesion), np.nan)
    both = ~np.isnan(cohesion) & ~np.isnan(coupling)
    if not both.any():
        return Estimate(None, note="no image has a value"), nothing
    below = float(coupling[both].mean(dtype=np.float64))
    if below < NEAR_ZERO:
        why = f"coupling {below:.3f} is below {NEAR_ZERO}: a ratio to it says nothing; see the gap"
        return Estimate(None, note=why), nothing
    each = ratio_shares(cohesion, coupling)
    return mean_interval(each), each


def image_rows(accumulator: Accumulator, per_image: PerImageBuilder, *, seed: int) -> list[Measurement]:
    """Norms, sinks, homogeneity and patch structure of every layer; each picture's share goes to `per_image`."""
    rows: list[Measurement] = []
    skipped = accumulator.skipped_objects
    note = f"{accumulator.objects} objects" + (
        f", {skipped} skipped (fewer than two patches, or none outside)" if skipped else ""
    )
    for position, layer in enumerate(accumulator.layers):
        table = accumulator.values.read(position)
        columns = {name: table[:, i] for i, name in enumerate(COLUMNS)}
        base: dict[str, Any] = {"layer": layer, "seed": seed}
        channels = accumulator.calibration[layer].sink_channels
        sinks = columns["sink_tokens"]
        rows.append(Measurement("sink_tokens", **mean_interval(sinks).fields, **base, n=len(table)))
        per_image.add(rows[-1].key, sinks)
        rows.append(
            Measurement("sink_channels", channels, **base, n=accumulator.width, unit="channels", note="by calibration")
        )
        for scope in SCOPES:
            values = {
                name.partition("|")[2]: column for name, column in columns.items() if name.startswith(f"{scope}|")
            }
            present = {name: column for name, column in values.items() if not np.isnan(column).all()}
            for row, contributions in scope_rows(present, {**base, "tokens": scope}, note):
                rows.append(row)
                per_image.add(row.key, contributions)
    return rows


def scope_rows(values: dict[str, np.ndarray], base: dict, note: str) -> Iterable[tuple[Measurement, np.ndarray]]:
    """Rows of values {"metric/variant": [n]}, and what each picture adds to them; base: the rows' other fields."""

    def row(metric: str, variant: str, found: Estimate, column: np.ndarray, said: str = "") -> Measurement:
        n = int((~np.isnan(column)).sum())
        text = "; ".join(filter(None, [found.note, said]))
        return Measurement(metric, **found.fields, n=n, variant=variant, note=text, **base)

    for name, column in values.items():
        metric, _, variant = name.partition("/")
        said = note if metric in ("cohesion", "coupling", "bleeding") else ""
        yield row(metric, variant, mean_interval(column), column, said), column
    for variant in ("raw", "centred"):
        if f"cohesion/{variant}" in values:
            cohesion, coupling = values[f"cohesion/{variant}"], values[f"coupling/{variant}"]
            gap = cohesion.astype(np.float64) - coupling
            yield row("gap", variant, mean_interval(gap), gap, note), gap
            if variant == "raw":
                contrast, each = contrast_interval(cohesion, coupling)
                yield row("contrast", variant, contrast, gap, note), each


def spectrum_rows(accumulator: Accumulator, position: int, *, seed: int) -> list[Measurement]:
    """Effective dimensions and feature correlation of one layer, with sinks and without."""
    layer = accumulator.layers[position]
    known = accumulator.calibration[layer]
    sums, sinks = accumulator.covariance(position)
    channels = known.channels > 0
    whole = bool(channels.all())
    bare = None
    if sinks or not whole:
        bare = sums.n, spectrum(sums if whole else sums.select(channels.to(sums.count.device)))
    if sinks:
        accumulator.add_sinks(position, sums)
    everything = sums.n, spectrum(sums)
    found = {"all": everything, "without sinks": bare or everything}
    how = "all tokens" if accumulator.exact else "seeded sample of tokens"
    return [
        Measurement(
            metric,
            **estimate.fields,
            layer=layer,
            n=n,
            unit="tokens",
            variant=variant,
            tokens=tokens,
            seed=seed,
            note="; ".join(filter(None, [estimate.note, how])),
        )
        for tokens, (n, estimates) in found.items()
        for (metric, variant), estimate in estimates.items()
    ]


def target_rows(
    accumulator: Accumulator,
    labels: Mapping[str, Sequence[str | None]],
    done: Sequence[int],
    middle: int,
    per_image: PerImageBuilder,
    *,
    seed: int,
    progress: bool = False,
    unlabelled: str = "no labels were given",
) -> list[Measurement]:
    """Linear probes of every label set at every layer, with sinks and without, or one row that says why there are none.

    labels: {target: one label (or None) per picture}; done: the pictures that the accumulator holds, in its order;
    middle: the layer that `probe_drop` is about; unlabelled: why there are no label sets, where there are none. Classes
    that broken pictures leave with fewer than two are left out, in a row that names them.
    """
    if not labels:
        return [Measurement("probe_accuracy", None, seed=seed, note=unlabelled)]
    rows: list[Measurement] = []
    for target, values in tracked(labels.items(), "probes", progress):
        kept = {str(value) for value in values if value is not None}
        small = too_small(values, done)
        positions = np.array(
            [i for i, at in enumerate(done) if values[at] is not None and values[at] not in small], int
        )
        names = [str(values[done[i]]) for i in positions]
        if small:
            listed = ", ".join(repr(name) for name in small[:3]) + (", …" if len(small) > 3 else "")
            why = (
                f"{len(small)} of {len(kept)} classes left out ({listed}): broken pictures leave fewer than two of each"
            )
            rows.append(Measurement("probe_classes_left_out", None, target=target, seed=seed, note=why))
        if too_few(names):
            why = "broken pictures leave fewer than two classes of two pictures, one of them of three"
            rows.append(Measurement("probe_accuracy", None, target=target, seed=seed, note=why))
            continue

        def read(layer: int, positions: np.ndarray = positions) -> StoredRows:
            return accumulator.pooled.rows_of(accumulator.layers.index(layer), positions)

        def read_bare(layer: int, positions: np.ndarray = positions) -> RowsWithoutSinks:
            return accumulator.without_sinks(accumulator.layers.index(layer), positions)

        probe = fit_probes(read, accumulator.layers, names, seed=seed, device=accumulator.device)
        changed = [layer for position, layer in enumerate(accumulator.layers) if accumulator.bare.differ(position)]
        bare = probe
        if changed:
            bare = probe.with_layers(fit_probes(read_bare, changed, names, seed=seed, device=accumulator.device))
        said = {layer: accumulator.bare.note(position) for position, layer in enumerate(accumulator.layers)}
        for tokens, found, notes in (("all", probe, {}), ("without sinks", bare, said)):
            for row, contributions in probe_rows(
                found, target=target, middle=middle, seed=seed, tokens=tokens, said=notes
            ):
                rows.append(row)
                if contributions is not None:
                    per_image.add(row.key, contributions, positions[found.test])
    return rows


def too_small(values: Sequence[str | None], done: Sequence[int]) -> list[str]:
    """The classes of a label set of which the pictures in `done` hold fewer than two."""
    counts = Counter(values[index] for index in done)
    return sorted({str(value) for value in values if value is not None and counts[value] < 2})


def too_few(names: Sequence[str]) -> bool:
    """Whether classes of two pictures each, or more, are too few for a probe: see `stratified_split`."""
    return len(set(names)) < 2 or max(Counter(names).values()) < 3


def missing_structure(
    accumulator: Accumulator, has_masks: bool, mask_values: Collection[int] = (), *, metric: str, seed: int
) -> list[Measurement]:
    """A row that says why there is no patch structure, where there is none. `mask_values`: those that masks hold."""
    if has_masks and accumulator.objects:
        return []
    why = "no object has two patches inside and one outside" if has_masks else "no masks were given"
    if 255 in mask_values and not set(mask_values) - {0, 255}:
        why = "all non-zero pixels of the masks are 255, which means ignore; give objects other values, such as 1"
    return [Measurement(metric, None, variant="raw", seed=seed, note=why)]
