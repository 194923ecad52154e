"""Real pretrained parts through the command line: one first stage, the second without and with PRe, both diagnosed.

`make test-real` runs it whole (about 45 minutes on two idle cores). KEEPSIGHT_REAL_STEPS=2 runs the same path for two
steps a stage and leaves out what only learning can show.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from keepsight.evaluation import Evaluation, Question, evaluate, text_only_prior
from keepsight.results import Measurement, RunDirectory
from keepsight.training.record import read_curves
from keepsight.vlm.load import load_model
from tests.real import fetch, pictures

pytestmark = [pytest.mark.real, pytest.mark.timeout(0)]

STEPS = int(os.environ.get("KEEPSIGHT_REAL_STEPS") or 0)  # 0: as the recipe says
SHORT = bool(STEPS)
PROJECTOR_STEPS, FULL_STEPS = STEPS or 240, STEPS or 60
ARMS = {"baseline": ("--pre.weight", "0"), "pre": ()}
DEPTH = 30
ASKED_PICTURES = 8 if SHORT else 80
LAYER_METRICS = {"probe_accuracy", "cohesion", "coupling", "gap", "contrast", "participation_ratio", "entropy_rank",
                 "feature_correlation", "token_homogeneity", "token_norm"}  # fmt: skip
SOME_LAYERS = {"silencing", "lens_entropy"}  # a large vocabulary costs as much as several layers
ONE_LAYER_METRICS = {"probe_drop": 15, "probe_worst_layer": None}  # the middle layer; one chosen from the data

learned = pytest.mark.skipif(SHORT, reason="KEEPSIGHT_REAL_STEPS is set: too few steps to learn anything")


def keepsight(*arguments: object) -> None:
    """The command, as a user types it; its output goes to the terminal (pytest -s)."""
    subprocess.run([sys.executable, "-m", "keepsight", *map(str, arguments)], check=True)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """$KEEPSIGHT_REAL_OUT keeps the runs; a test that was stopped goes on with what lies there."""
    kept = os.environ.get("KEEPSIGHT_REAL_OUT")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("real")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def picture_set(work) -> Path:
    folder = work / "pictures"
    if folder.is_dir():  # it appears only when it is whole
        return folder
    return pictures.write(folder, fetch.fetch(), train=64 if SHORT else 1200, test=80 if SHORT else 320)


def train(recipe: str, said: Path, out: Path, *options: object) -> Path:
    """The run in `out`; one that was stopped goes on."""
    data = ["--data.conversations", said, "--data.image_folder", said.parent / "images"]
    keepsight("train", Path(__file__).with_name(recipe), *data, *options, "--out", out, "--resume")
    return out


@pytest.fixture(scope="module")
def projector(work, picture_set) -> Path:
    """The run of the first stage, from which both arms start."""
    parts = fetch.fetch()
    options = ["--model.vision", parts.vision, "--model.language", parts.language]
    options += ["--projector.max_steps", PROJECTOR_STEPS]
    return train("projector.yaml", picture_set / "train" / "captions.json", work / "train-projector", *options)


@pytest.fixture(scope="module")
def trained(work, picture_set, projector) -> dict[str, Path]:
    """Arm → the run of its second stage."""
    options = ["--model.path", projector / "model", "--full.max_steps", FULL_STEPS]
    return {
        arm: train("full.yaml", picture_set / "train" / "questions.json", work / f"train-{arm}", *options, *own)
        for arm, own in ARMS.items()
    }


@pytest.fixture(scope="module")
def diagnosed(work, picture_set, trained) -> dict[str, RunDirectory]:
    """Arm → the run of its diagnosis on held-out pictures."""
    test = picture_set / "test"
    runs = {}
    for arm, run in trained.items():
        out = work / f"diagnose-{arm}"
        data = ["--images", test / "images", "--masks", test / "masks", "--labels", test / "labels.json"]
        if not (out / "rows.jsonl").is_file():  # of a test that was stopped
            keepsight("diagnose", run, *data, "--out", out, "--overwrite")
        runs[arm] = RunDirectory.open(out)
    return runs


@pytest.fixture(scope="module")
def items(picture_set) -> dict[str, list[Question]]:
    """Split → questions; those of the first held-out pictures only, because answering takes time."""
    found = {}
    for split in ("train", "test"):
        entries = json.loads((picture_set / split / "eval.json").read_text())
        found[split] = [
            Question(e["question"], e["answer"], picture_set / split / "images" / e["image"], e["kind"], e["image"])
            for e in entries
        ]
    chosen = list(dict.fromkeys(item.picture for item in found["test"]))[:ASKED_PICTURES]
    found["test"] = [item for item in found["test"] if item.picture in chosen]
    return found


@pytest.fixture(scope="module")
def answers(trained, items) -> dict[str, Evaluation]:
    return {arm: evaluate(*load_model(run), items["test"]) for arm, run in trained.items()}


def curve(run: Path, stage: str, name: str) -> list[float]:
    return [entry[name] for entry in read_curves(run) if entry["stage"] == stage and name in entry]


def by_metric(rows: list[Measurement]) -> dict[tuple[str, ...], list[Measurement]]:
    """Rows of the metrics that every layer has, by (metric, target, variant, tokens)."""
    found = defaultdict(list)
    for row in rows:
        if row.layer is not None and row.metric not in ONE_LAYER_METRICS:
            found[row.metric, row.target, row.variant, row.tokens].append(row)
    return found


@pytest.mark.parametrize("arm", ARMS)
def test_a_run_leaves_a_plain_checkpoint_and_its_curves(projector, trained, arm):
    for run, stage, steps in ((projector, "projector", PROJECTOR_STEPS), (trained[arm], "full", FULL_STEPS)):
        entries = read_curves(run)
        assert {entry["stage"] for entry in entries} == {stage}
        assert max(entry["step"] for entry in entries) == steps
    assert not curve(projector, "projector", "pre_cosine")
    assert bool(curve(trained[arm], "full", "pre_cosine")) == (arm == "pre")
    model, processor = load_model(trained[arm])
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert not any("keepsight" in name for name, _ in model.named_parameters())
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id
    info = RunDirectory.open(trained[arm]).info
    assert (info["depth"], info["pre_layer"]) == (DEPTH, 15 if arm == "pre" else None)


@learned
def test_the_loss_falls(projector, trained):
    runs = {"projector": (projector, "projector"), **{arm: (run, "full") for arm, run in trained.items()}}
    for name, (run, stage) in runs.items():
        loss = curve(run, stage, "lm_loss")
        first, last = loss[0], sum(loss[-10:]) / 10
        print(f"\n{name}: language-model loss {first:.3f} → {last:.3f}")
        assert last < 0.7 * first, name


@learned
def test_the_head_predicts_this_pictures_anchor_and_not_anothers(trained):
    cosine, margin = (sum(curve(trained["pre"], "full", name)[-10:]) / 10 for name in ("pre_cosine", "pre_margin"))
    print(f"\nPRe: cosine {cosine:.3f}, with the anchors of other pictures {cosine - margin:.3f}")
    assert cosine > 0.5
    # The anchors share a large direction (other pictures' are at 0.83 already), so it is the distance 1 − cosine that
    # tells them apart: to this picture's anchor less than a fifth of that to another's.
    assert 1 - cosine < 0.2 * (1 - (cosine - margin))


@learned
@pytest.mark.parametrize("arm", ARMS)
def test_held_out_questions_are_answered_better_than_blind(answers, items, arm):
    prior = text_only_prior(items["train"], items["test"]).rows
    seeing = answers[arm].rows
    for ours, blind in zip(seeing, prior, strict=True):
        shown = f"{ours.value:.3f} [{ours.low:.3f}, {ours.high:.3f}]"
        print(f"\n{arm}, {ours.target or 'all questions'}: {shown}, blind {blind.value:.3f}")
    assert seeing[0].target == prior[0].target == ""
    assert seeing[0].low > prior[0].value + 0.1
    assert seeing[0].low > prior[0].high


@pytest.mark.skipif(not SHORT, reason="the full test scores answers")
def test_answers_come_out(answers, items):
    assert [len(result.records) for result in answers.values()] == [len(items["test"])] * 2
    assert len(text_only_prior(items["train"], items["test"]).records) == len(items["test"])


@pytest.mark.parametrize("arm", ARMS)
def test_every_metric_has_a_row_at_every_layer(diagnosed, arm):
    found = by_metric(diagnosed[arm].read_rows())
    assert {metric for metric, *_ in found} >= LAYER_METRICS
    for key, rows in found.items():
        layers = sorted(row.layer for row in rows)
        if key[0] in SOME_LAYERS:
            assert {0, DEPTH // 2, DEPTH} <= set(layers), key
        else:
            assert layers == list(range(DEPTH + 1)), key
        assert all(row.value is not None or row.note for row in rows), key
    for metric, layer in ONE_LAYER_METRICS.items():
        rows = [row for row in diagnosed[arm].read_rows() if row.metric == metric]
        assert {row.target for row in rows} == {*pictures.ASKED, *pictures.UNASKED}
        assert layer is None or {row.layer for row in rows} == {layer}
    assert (diagnosed[arm].path / "report.html").stat().st_size > 100_000


@learned
@pytest.mark.parametrize("arm", ARMS)
def test_the_numbers_are_those_of_a_model_that_sees(diagnosed, arm):
    """Known from how the set was made: eight classes, objects that are alike inside."""
    found = by_metric(diagnosed[arm].read_rows())
    probe = found["probe_accuracy", "category", "", "all"]
    assert max(row.value for row in probe) > 0.5  # chance is an eighth
    assert all(row.value > 0 for row in found["gap", "", "raw", "all"])
