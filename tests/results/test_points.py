"""points.jsonl: what of a point is kept, and what an edited file says."""

import dataclasses

import pytest

from keepsight.results import Measurement, Point, RunDirectory
from keepsight.results.points import by_training

ROWS = [
    Measurement("answer_accuracy", 0.7, low=0.6, high=0.8, n=50, unit="questions"),
    Measurement("probe_accuracy", 0.9, layer=2, low=0.8, high=1.0, target="texture"),
    Measurement("probe_accuracy", None, layer=3, target="texture", note="too few"),
    Measurement("fidelity", 0.4, layer=2),
    Measurement("probe_chance", 0.125, target="texture"),
]
LEFT_OUT = [
    Measurement("answer_accuracy", 0.1, target="colour"),
    Measurement("probe_accuracy", 0.2, layer=2, target="texture", variant="shuffled labels"),
    Measurement("fidelity", 0.2, layer=2, tokens="without sinks"),
    Measurement("gap", 0.2, layer=2),
]


def test_round_trip_and_what_is_kept(tmp_path):
    run = RunDirectory.create(tmp_path / "run", label="a", kind="attribution")
    assert run.load().points == []
    names = [("a", "start"), ("a", "line\u2028break"), ("b </script>", "start")]
    run.write_points(Point(name, [*LEFT_OUT, *ROWS], training) for training, name in names)
    found = run.load().points
    assert [(point.training, point.name) for point in found] == names
    assert all(list(point.rows) == ROWS for point in found)
    assert {name: len(points) for name, points in by_training(found).items()} == {"a": 2, "b </script>": 1}
    (point, *_) = found
    assert point.skill.value == 0.7
    assert {place: row.value for place, row in point.told.items()} == {
        ("texture", 2): 0.9,
        ("texture", 3): None,
        ("fidelity", 2): 0.4,
    }
    assert (point.chance("texture"), point.chance("colour")) == (0.125, None)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"training": "a", "poi', "this line is no row of a point"),
        ("[1]", "this line is no row of a point"),
        ('{"training": "a", "metric": "fidelity", "value": 1}', "this line is no row of a point \\('point'\\)"),
        ('{"training": 1, "point": "x", "metric": "fidelity", "value": 1}', "both are strings"),
        ('{"training": "a", "point": "x", "metric": "fidelity", "value": "1"}', "field 'value' is \"1\""),
        ('{"training": "a", "point": "x", "value": 1}', r"the fields \['metric'\] are missing"),
    ],
)
def test_an_edited_file_is_named(tmp_path, line, why):
    run = RunDirectory.create(tmp_path / "run", label="a", kind="attribution")
    run.write_points([Point("start", ROWS[:1], "a")])
    file = run.path / "points.jsonl"
    file.write_text(file.read_text(encoding="utf-8") + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"points.jsonl:2: .*{why}"):
        run.load()


def test_a_run_s_own_points_go_when_it_is_replaced(tmp_path):
    run = RunDirectory.create(tmp_path / "run", label="a", kind="attribution")
    run.write_points([Point("start", [dataclasses.replace(ROWS[0], n=1)], "a")])
    with RunDirectory.staged(tmp_path / "run", label="b", kind="attribution", overwrite=True):
        pass
    assert RunDirectory.open(tmp_path / "run").load().points == []
