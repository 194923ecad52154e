"""Which groups of numbers a diagnosis takes, and all their rows from what the forward pass left behind."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from keepsight.diagnosis.collect.accumulate import Accumulator
from keepsight.diagnosis.collect.batches import Loader
from keepsight.diagnosis.collect.passes import on_device
from keepsight.diagnosis.memory import give_back
from keepsight.diagnosis.metrics.breakdown import object_rows
from keepsight.diagnosis.metrics.fidelity import Fidelity
from keepsight.diagnosis.metrics.lens import Lens, NoLensError, Readout, readout
from keepsight.diagnosis.metrics.similarity import Similarity
from keepsight.diagnosis.progress import tracked
from keepsight.diagnosis.summary import image_rows, missing_structure, spectrum_rows, target_rows
from keepsight.results import Measurement, PerImageBuilder
from keepsight.vlm import Vlm

METRICS = ("probes", "structure", "objects", "bleeding", "spectrum", "fidelity", "lens", "maps")
# What a diagnosis without asking takes: benchmarks/capture.py measures it against the plain forward.
DEFAULT_METRICS = tuple(name for name in METRICS if name not in ("bleeding", "objects"))
MASKED = ("structure", "objects", "bleeding")  # groups that masks are needed for
STRUCTURE = ("cohesion", "coupling", "gap", "contrast")


def wanted_metrics(metrics: str | Iterable[str]) -> tuple[str, ...]:
    """The groups asked for, in their order; "default" and "all" stand for those.

    Raises:
        ValueError: a group that does not exist.
    """
    given = [metrics] if isinstance(metrics, str) else list(metrics)
    if given in (["default"], ["all"]):
        return DEFAULT_METRICS if given == ["default"] else METRICS
    if unknown := [name for name in given if name not in METRICS]:
        raise ValueError(f"metrics holds {unknown[0]!r}; allowed: default, all, or any of {', '.join(METRICS)}")
    return tuple(name for name in METRICS if name in given)


def all_rows(
    vlm: Vlm,
    loader: Loader,
    accumulator: Accumulator,
    wanted: Collection[str],
    labels: Mapping[str, Sequence[str | None]],
    done: Sequence[int],
    middle: int,
    per_image: PerImageBuilder,
    *,
    seed: int,
    has_masks: bool,
    unlabelled: str = "",
    progress: bool = False,
) -> list[Measurement]:
    """Every row of the groups in `wanted`; the other arguments are as in `target_rows` and `missing_structure`."""
    rows: list[Measurement] = []
    if "probes" in wanted:
        rows += target_rows(
            accumulator, labels, done, middle, per_image, seed=seed, progress=progress, unlabelled=unlabelled
        )
    give_back()
    unwanted = () if "structure" in wanted else STRUCTURE
    rows += [row for row in image_rows(accumulator, per_image, seed=seed) if row.metric not in unwanted]
    if "objects" in wanted:
        rows += object_rows(accumulator, per_image, seed=seed)
    structured = "structure" if "structure" in wanted else "objects"
    for group, metric in ((structured, "gap"), ("bleeding", "bleeding")):
        if group in wanted:
            rows += missing_structure(accumulator, has_masks, loader.seen.mask_values, metric=metric, seed=seed)
    positions = range(len(accumulator.layers))
    if "spectrum" in wanted:
        for position in tracked(positions, "spectrum", progress):
            rows += spectrum_rows(accumulator, position, seed=seed)
    if "fidelity" in wanted:
        fidelity = Fidelity(accumulator, per_image, seed)
        similarity = Similarity(accumulator, per_image, seed)
        rows += fidelity.general_rows()
        for position in tracked(positions, "fidelity", progress):
            rows += fidelity.rows(position) + similarity.rows(position)
            give_back()
    if "lens" in wanted:
        lens = Lens(
            accumulator, open_lens(vlm, loader), lambda token: loader.tokenizer.decode([token]), seed, middle, per_image
        )
        for position in tracked(positions, "lens", progress):
            rows += lens.rows(position)
    return rows


def open_lens(vlm: Vlm, loader: Loader) -> Readout | str:
    """The lens, or the reason why there is none; one picture is looked at."""
    one = replace(loader, batch_size=1)
    decoded = next(one.batches(range(len(one.pictures)), masks=False))
    try:
        return readout(vlm, on_device(vlm, decoded))
    except NoLensError as error:
        return str(error)
