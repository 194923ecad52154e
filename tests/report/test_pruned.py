"""The figures by the share of visual tokens kept."""

import csv
import io
from urllib.parse import unquote

import pytest

from keepsight.report import build, figures
from keepsight.report.curves import open_runs
from keepsight.report.pruned import KEPT, draw_sections
from keepsight.report.tables import summary
from keepsight.results import LoadedRun, Measurement
from keepsight.vlm.pruning import Pruning

PLAIN = {1: 0.9, 2: 0.8}


def run(label, left):
    """`left`: {pruning: {layer: accuracy}}"""
    common = {"n": 50, "target": "texture"}
    rows = [Measurement("probe_chance", 0.25, **common)]
    for layer, value in PLAIN.items():
        rows.append(Measurement("probe_accuracy", value, layer, value - 0.1, value + 0.1, **common))
        rows.append(Measurement("probe_accuracy", 0.24, layer, 0.2, 0.3, variant="shuffled labels", **common))
    for pruning, values in left.items():
        for layer, value in values.items():
            name = "probe_accuracy_pruned"
            rows.append(Measurement(name, value, layer, value - 0.1, value + 0.1, variant=str(pruning), **common))
            rows.append(Measurement(name, 0.26, layer, 0.2, 0.3, variant=f"{pruning}, shuffled labels", **common))
    return LoadedRun(label, rows, {"depth": 2, "pre_layer": 1})


@pytest.fixture
def runs():
    half, less = Pruning(1, 0.5), Pruning(1, 0.125)
    return [
        run("base", {less: {2: 0.4}, half: {2: 0.7}, Pruning(1, 0.5, "random"): {2: 0.65}}),
        run("with PRe", {half: {2: 0.75}}),
    ]


def test_points_rise_to_the_probe_without_pruning(runs):
    probes, pruned = draw_sections(open_runs(runs))
    assert (probes.section.id, pruned.section.id) == ("probes", "pruned")
    (panel,) = pruned.panels
    assert (panel.axis, panel.title, panel.percent) == (KEPT, "texture", True)
    first, second = panel.views
    assert first["variant"] == "attention after layer 1, read at the last"
    assert second["variant"] == "random after layer 1, read at the last"
    assert [choice.variants for choice in pruned.choices] == [[first["variant"], second["variant"]]]
    lines = {(line["run"], line["role"]): line for line in first["lines"]}
    assert (lines[0, "run"]["x"], lines[0, "run"]["y"]) == ([12.5, 50.0, 100.0], [0.4, 0.7, 0.8])
    assert (lines[1, "run"]["x"], lines[1, "run"]["y"]) == ([50.0, 100.0], [0.75, 0.8])
    assert lines[1, "run"]["low"] == [pytest.approx(0.65), pytest.approx(0.7)]
    assert (lines[0, "control"]["x"], lines[0, "control"]["y"]) == ([12.5, 50.0, 100.0], [0.26, 0.26, 0.24])
    assert lines[0, "control"]["name"] == "shuffled labels"
    assert lines[0, "chance"]["x"] == [0, 100]
    assert [line["place"] for line in panel.numbers] == ["12.5", "50", "100"]
    assert [cell[:6] for cell in panel.numbers[0]["cells"]] == ["40.0 %", "–"]
    table = list(csv.DictReader(io.StringIO(unquote(panel.csv.partition(",")[2]))))
    told = {(row["run"], row["metric"], row["variant"]): row["value"] for row in table if row["run"] == "with PRe"}
    assert told == {
        ("with PRe", "probe_accuracy_pruned", "attention, 50% after layer 1"): "0.75",
        ("with PRe", "probe_accuracy_pruned", "attention, 50% after layer 1, shuffled labels"): "0.26",
        ("with PRe", "probe_accuracy", ""): "0.8",
        ("with PRe", "probe_accuracy", "shuffled labels"): "0.24",
    }
    assert panel.sample == "n = 50 images"


def test_the_table_keeps_the_order_of_the_rows():
    shares = (0.5, 0.25, 0.1)
    lines = summary(open_runs([run("base", {Pruning(1, keep): {2: keep} for keep in shares})]))
    titles = [line.title for line in lines if "pruned" in line.title]
    assert titles == [f"Probe accuracy, tokens pruned, texture, {Pruning(1, keep)}" for keep in shares]


def test_without_pruning_there_is_no_such_section(runs):
    assert "pruned" not in [figures.section.id for figures in draw_sections(open_runs([run("base", {})]))]


def test_as_a_matplotlib_figure(runs):
    pytest.importorskip("matplotlib")
    (axes,) = figures(runs, metrics=["probe_accuracy_pruned"])["probe_accuracy_pruned, texture"].axes
    assert axes.get_xlabel() == KEPT
    assert [text.get_text() for text in axes.texts] == []  # PRe's layer is no place on this axis
    assert [line.get_xdata().tolist() for line in axes.lines if line.get_marker() != "None"] == [
        [12.5, 50, 100],
        [50, 100],
    ]
    (by_layer,) = figures(runs, metrics=["probe_accuracy"])["probe_accuracy, texture"].axes
    assert [text.get_text() for text in by_layer.texts] == ["PRe"]


def test_the_page_holds_it(runs, tmp_path):
    page = build(runs, tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'href="#pruned"' in page
    assert "texture by visual tokens kept (%)" in page
