"""What the demo measures of a trained model on held-out scenes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from rich.console import Console

from keepsight.diagnosis import diagnose
from keepsight.evaluation import Evaluation, Question, evaluate, keep
from keepsight.results import RunDirectory, merged
from keepsight.testbed.drawing import render
from keepsight.testbed.folders import vqa_items
from keepsight.testbed.language import questions
from keepsight.testbed.models import LAYERS_AT_WORK
from keepsight.testbed.scenes import ASKED, UNASKED, Scene
from keepsight.vlm.pruning import Pruning

TARGETS = {**dict.fromkeys(ASKED, "asked"), **dict.fromkeys(UNASKED, "never asked")}


def look_inside(
    arm: RunDirectory,
    model: Any,
    processor: Any,
    diagnosed: Sequence[Scene],
    asked: Sequence[Scene],
    *,
    turns: int,
    prior: Evaluation,
    seed: int,
) -> RunDirectory:
    """Diagnose one arm on `diagnosed`, let it answer `turns` questions of each of `asked`, add the rows to its run."""
    pictures, masks = render(diagnosed)
    truth = [scene.labels() for scene in diagnosed]
    result = diagnose(
        model,
        processor,
        [Image.fromarray(picture) for picture in pictures],
        labels={target: [row[target] for row in truth] for target in TARGETS},
        masks=list(masks),
        batch_size=32,
        seed=seed,
        targets=TARGETS,
        nulls="random_weights",
        prunings=[Pruning(2, keep) for keep in (0.5, 0.25, 0.1)],
        pre_layer=arm.info["pre_layer"],
        label_run=arm.label,
        progress=False,
    )
    items = vqa_items(asked, turns)
    answers = evaluate(model, processor, items, batch_size=64, max_new_tokens=4)
    arm.write_rows([*result.rows, *answers.rows, *prior.rows])
    parts = (result.per_image, answers.per_image, prior.per_image)
    arm.write_per_image(merged([part for part in parts if part is not None]))
    arm.write_examples(result.examples)
    keep(arm, {"testbed": items}, {"testbed": answers})
    kept = ("depth", "width", "prompt", "counts", "targets")
    arm.update(**{key: result.info[key] for key in kept}, seeds=[seed], note=LAYERS_AT_WORK)
    return arm


def bare_questions(scenes: Sequence[Scene], turns: int) -> list[Question]:
    """The questions of these scenes without the pictures, for what can be guessed."""
    return [
        Question(turn.question, turn.answer, kind=turn.kind, picture=(scene.seed, scene.index))
        for scene in scenes
        for turn in questions(scene, turns)
    ]


def print_answers(console: Console, runs: Sequence[RunDirectory]) -> None:
    """The accuracy of each arm against the text-only prior, a line each."""
    for run in runs:
        rows = {row.metric: row for row in run.read_rows() if row.metric.startswith("answer_") and not row.target}
        answers, prior = rows["answer_accuracy"], rows["answer_prior"]
        assert answers.value is not None
        assert prior.value is not None
        console.print(
            f"Held-out questions {run.label}: {answers.value:.1%} right [{answers.low:.1%}, {answers.high:.1%}], "
            f"{100 * (answers.value - prior.value):.0f} points above the text-only prior of {prior.value:.1%} "
            f"(n = {answers.n} questions)"
        )
