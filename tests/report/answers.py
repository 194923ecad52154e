"""Two made-up runs that answered the same questions, for the tests and for looking at the page.

`python -m tests.report.answers FOLDER` writes both runs and `changed.html` there.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from keepsight.evaluation import Question, keep
from keepsight.evaluation.generate import Answer
from keepsight.evaluation.run import assemble
from keepsight.report import build
from keepsight.results import RunDirectory
from keepsight.testbed.drawing import render
from keepsight.testbed.folders import vqa_items
from keepsight.testbed.scenes import draw_scenes

PHOTO = (360, 240)  # pixels; large enough to be kept as JPEG


def sample_questions(scenes: int = 12) -> list[Question]:
    """The testbed's, a multiple choice and a long question about a photo, and one with two pictures."""
    found = vqa_items(draw_scenes(3, scenes), 4)
    pixels = render(draw_scenes(4, 2))[0]
    photo = Image.fromarray(pixels[0]).resize(PHOTO)
    found += [
        Question("What does the sign say? " + "Look closely. " * 60, "stop", photo, "text", picture="photo"),
        Question(
            "Which is it?",
            "B",
            photo,
            "choice",
            picture="photo",
            choices=("a red bus", "a blue bus", "a ferry", "a dog"),
        ),
        Question(
            "Is <image> the same as <image> ?", "no", [photo, Image.fromarray(pixels[1])], "left of", picture="photo"
        ),
    ]
    return found


def write_run(
    folder: Path, label: str, questions: list[Question], right: np.ndarray, wrong: str = "blue"
) -> RunDirectory:
    """A run that answers those questions right that are marked so, and the others with `wrong`."""
    said = {i: Answer(q.answers[0] if right[i] else wrong) for i, q in enumerate(questions)}
    found = assemble(questions, said, {})
    run = RunDirectory.create(
        folder, label=label, kind="evaluation", command="keepsight evaluate model", fingerprint=label
    )
    run.write_rows(found.rows)
    run.write_per_image(found.per_image)
    keep(run, {"sample": questions}, {"sample": found})
    return run


def sample_answers(folder: Path) -> list[RunDirectory]:
    """A baseline that gets half of the questions right, and a second run that gets more."""
    questions = sample_questions()
    draw = np.random.default_rng(1).random((2, len(questions)))
    draw[:, -3:] = ((1, 1, 0), (0.7, 0.7, 1))
    first, second = draw[0] < 0.5, np.where(draw[1] < 0.6, draw[0] < 0.5, draw[1] < 0.9)
    return [
        write_run(folder / "baseline", "baseline", questions, first),
        write_run(folder / "with-pre", "with PRe", questions, second, wrong="a"),
    ]


if __name__ == "__main__":
    target = Path(sys.argv[1])
    print(build(sample_answers(target), target / "changed.html"))
