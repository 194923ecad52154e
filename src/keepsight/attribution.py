"""Attribution: what a model pays for its skill, over its training.

The paper's claim ("visual sacrifice"): over training the answers get better while a linear probe of the middle layers
reads less. Here every point of a training is measured: its skill (share of questions answered right) and what its
layers still tell (probe accuracy of each label set, and fidelity). `keepsight.results.trend` sets the one against the
other, and `keepsight.report` draws it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from keepsight.diagnosis import diagnose
from keepsight.evaluation import Question, evaluate
from keepsight.results import RUN_FILE, Point, RunDirectory, merged
from keepsight.results.points import by_training
from keepsight.results.trend import correlations, over_seeds


def look(
    models: Iterable[tuple[str, str, Callable[[], tuple[Any, Any]]]],
    images: Any,
    questions: Sequence[Question],
    out: str | Path,
    *,
    training: str = "",
    settings: dict[str, Any] | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 32,
    config: Mapping[str, Any] | None = None,
    told: Callable[[str, bool], None] = lambda name, done: None,
) -> list[Point]:
    """Diagnose every model and ask it the questions; each in a folder of its own in `out`.

    What lies there finished, from the same settings, is not done again: a stopped attribution goes on.

    Args:
        models: (name, where the weights are from, what gives model and processor), in order; called only where there
            is something to do. A point that lies there under this name from other weights is refused.
        training: what the points are of; its name, for reports.
        images: as `diagnose` takes them; settings: its further arguments.
        config: what the points hang on, written with each; a point with another one is refused.
        told: called with each name, and whether it was done before.

    Raises:
        ValueError: a point that lies in `out` is from other settings or weights.
        StorageError: a point cannot be written; those before it are kept.
    """
    points = []
    for name, weights, load in models:
        folder = Path(out) / name
        hangs_on = {**(config or {}), "weights": weights}
        there = (folder / RUN_FILE).is_file()
        told(name, there)
        if there:
            run = RunDirectory.open(folder)
            if changes := run.changes(hangs_on):
                raise ValueError(f"'{folder}' was made with other settings ({changes}); choose another --out")
        else:
            model, processor = load()
            options: dict[str, Any] = {"metrics": ("probes", "fidelity"), "progress": False, **(settings or {})}
            seen = diagnose(model, processor, images, label_run=name, **options)
            said = evaluate(model, processor, questions, batch_size=batch_size, max_new_tokens=max_new_tokens)
            kept = [part for part in (seen.per_image, said.per_image) if part is not None]
            both = replace(seen, rows=[*seen.rows, *said.rows], per_image=merged(kept), examples=[])
            run = both.save(folder, config=hangs_on)
        points.append(Point(name, run.read_rows(), training))
    return points


def conclude(run: RunDirectory, points: Sequence[Point], **known: Any) -> RunDirectory:
    """Write what follows from the points to the attribution's own run: r by layer, the points, and run.json.

    Args:
        points: of all trainings, each measured into `run.path / point.training / point.name`.
        known: further values of run.json, such as seeds and pre_layer.

    Raises:
        StorageError: it cannot be written.
    """
    trainings = by_training(points)
    infos = [RunDirectory.open(run.path / point.training / point.name).info for point in points]
    names = {info["model"]["name"] for info in infos}
    asked = next((skill.n for point in points if (skill := point.skill) is not None), None)
    counts = {"trainings": len(trainings), "checkpoints": len(points), "questions": asked}
    counts |= {name: infos[0]["counts"].get(name) for name in ("images", "skipped images")}
    first = {name: infos[0].get(name) for name in ("depth", "width", "prompt", "seed", "targets")}
    run.write_rows(over_seeds([correlations(of) for of in trainings.values()]))
    run.write_points(points)
    run.update(
        model={"name": names.pop() if len(names) == 1 else "", "fingerprint": ""},
        counts={name: count for name, count in counts.items() if count is not None},
        **(first | known),
    )
    return run
