"""The paper's figures, whose configuration a training run is, and which figure stands beside which number."""

from pathlib import Path

import pytest
import yaml

from keepsight.evaluation.harness.paper import benchmarks, compare, configuration_of, configurations
from keepsight.results import Measurement

ROOT = Path(__file__).resolve().parents[3]
FIRST = {"vision": "openai/clip-vit-large-patch14-336", "language": "lmsys/vicuna-7b-v1.5"}
SECOND = {"vision": "google/siglip2-so400m-patch14-384", "language": "Qwen/Qwen2.5-7B-Instruct"}


def test_every_figure_is_of_a_benchmark_with_a_column():
    names = {one.name for one in benchmarks() if one.paper}
    assert len(benchmarks()) == 9
    assert len(names) == 8
    assert all(set(one.values) <= names for one in configurations())
    first = configurations()[0]
    assert first.values == {
        "GQA": 62.0, "MMMU": 35.7, "AI2D": 55.4, "MMStar": 30.3, "TextVQA": 45.5, "OCRBench": 318, "RealWorldQA": 54.8,
        "MMVP": 20.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("model", "pre", "name"),
    [
        (FIRST, {"weight": 0.0}, "CLIP* + Vicuna-7B"),
        (FIRST, {"layer": "middle", "weight": 0.5}, "CLIP* + Vicuna-7B, PRe"),
        (FIRST, {"layer": 16}, "CLIP* + Vicuna-7B, PRe"),
        (FIRST, {"layer": "last"}, "CLIP* + Vicuna-7B, PRe at the last layer"),
        (FIRST, {"anchor": "pre_projector"}, "CLIP* + Vicuna-7B, PRe, anchor before the projector"),
        (
            FIRST,
            {"anchor": "external", "anchor_model": "facebook/dinov2-large"},
            "CLIP* + Vicuna-7B, PRe, anchor DINOv2",
        ),
        (SECOND, {}, "SigLIP2 + Qwen2.5-7B, PRe"),
        (SECOND, {"weight": 0.0}, "SigLIP2 + Qwen2.5-7B"),
        (SECOND, {"layer": "last"}, None),
        (FIRST, {"layer": 8}, None),
        (FIRST, {"weight": 0.25}, None),
        (FIRST, {"control": "random"}, None),
        (FIRST, {"granularity": "global"}, None),
        ({"vision": FIRST["vision"], "language": SECOND["language"]}, {}, None),
        ({"path": "some/model"}, {}, None),
    ],
)
def test_which_configuration_a_training_run_is(tmp_path, model, pre, name):
    (tmp_path / "model").mkdir()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": model, "pre": pre}))
    for place in (tmp_path, tmp_path / "model"):
        found = configuration_of(place)
        assert (found and found.name) == name


def test_the_recipes_are_the_paper_s_configurations(tmp_path):
    first = yaml.safe_load((ROOT / "recipes" / "clip-vicuna-7b.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(first))
    assert configuration_of(tmp_path).name == "CLIP* + Vicuna-7B, PRe"


def test_no_run_and_no_yaml_are_no_configuration(tmp_path):
    assert configuration_of("llava-hf/llava-1.5-7b-hf") is None
    (tmp_path / "config.yaml").write_text("a: [")
    assert configuration_of(tmp_path) is None


def score(task, metric, value, note=""):
    return Measurement(
        "harness_score", value, low=value - 0.01, high=value + 0.01, target=task, variant=metric, note=note
    )


def test_numbers_stand_in_the_paper_s_units_and_corrected_labels_beside_none_of_it():
    rows = [
        score("gqa", "exact_match", 0.625),
        score("ocrbench", "ocrbench_accuracy", 0.32),
        score("mmvp_corrected", "mmvp_pair_accuracy", 0.24, "corrected labels"),
        score("mmvp_corrected", "mmvp_accuracy", 0.6),
        score("pope", "pope_accuracy", 0.86),
        Measurement("answer_accuracy", 0.1, target="gqa"),
    ]
    lines = {line.benchmark: line for line in compare(rows, configurations()[1])}
    assert (lines["GQA"].here, lines["GQA"].paper) == (62.5, 62.7)
    assert lines["GQA"].low == pytest.approx(61.5)
    assert (lines["OCRBench"].here, lines["OCRBench"].paper) == (320, 329)
    assert (lines["POPE"].here, lines["POPE"].paper) == (86, None)
    assert (lines["MMVP"].here, lines["MMVP"].paper) == (None, 22.0)
    marked = lines["MMVP (mmvp_corrected)"]
    assert (marked.here, marked.paper, marked.note) == (24, None, "corrected labels")
    assert (lines["MMMU"].here, lines["MMMU"].paper, lines["MMMU"].note) == (None, 36.1, "not run")
    alone = compare(rows, None)
    assert [line.benchmark for line in alone] == ["GQA", "OCRBench", "MMVP (mmvp_corrected)", "POPE"]
    assert all(line.paper is None for line in alone)


def test_part_of_a_benchmark_stands_beside_no_figure():
    rows = [score("gqa", "exact_match", 0.625, "the first 10 of 12578 questions")]
    [line] = [line for line in compare(rows, configurations()[0]) if line.benchmark == "GQA"]
    assert (line.here, line.paper) == (62.5, None)
