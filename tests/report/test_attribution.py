"""The section of attributions: what it draws, what it says of one training and of several, and beside other runs."""

import csv
import dataclasses
import io
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from scipy import stats

from keepsight import cli
from keepsight.report import build, figures, verdict
from keepsight.results import LoadedRun, Measurement, RunDirectory
from tests.report.sample import DEPTH, sample_run
from tests.report.test_page import HOSTILE, Page
from tests.report.trainings import FADES, sample_attribution


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def series(run: LoadedRun, training: str, metric: str, target: str, layer: int) -> tuple[list[float], list[float]]:
    """(skill, what the layer tells) from the rows themselves."""
    skills, told = [], []
    for point in run.points:
        if point.training == training:
            rows = {(r.metric, r.target, r.layer, r.variant): r.value for r in point.rows}
            skills.append(rows["answer_accuracy", "", None, ""])
            told.append(rows[metric, target, layer, ""])
    return skills, told


@pytest.fixture(scope="module")
def three() -> LoadedRun:
    return sample_attribution()


@pytest.fixture(scope="module")
def page(three: LoadedRun, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return read(build([three], tmp_path_factory.mktemp("attribution") / "report.html"))


def test_points_are_the_rows_in_their_order(page: Page, three: LoadedRun) -> None:
    shared = page.data["attribution"]
    assert (shared["layers"], shared["layer"]) == (list(range(DEPTH + 1)), 4)
    assert [course["label"] for course in shared["courses"]] == ["seed-0", "seed-1", "seed-2"]
    assert shared["courses"][1]["points"] == ["start", *(f"full-{n}" for n in (100, 200, 400, 800, 1200, 1600, 2000))]
    for number, (target, metric) in enumerate([*((name, "probe_accuracy") for name in FADES), ("", "fidelity")]):
        panel = page.data["panels"][f"attribution-{number}-checkpoints"]
        for layer in (0, 7):
            skills, told = series(three, "seed-1", metric, target, layer)
            assert shared["courses"][1]["y"] == skills
            assert panel["x"][layer][1] == told
        assert panel["percent"] == (metric == "probe_accuracy")
    assert page.data["panels"]["attribution-0-checkpoints"]["chance"] == 1 / 8
    assert page.data["panels"]["attribution-4-checkpoints"]["chance"] is None


def test_r_is_the_trainings_own_and_their_interval(page: Page, three: LoadedRun) -> None:
    own = [stats.pearsonr(*series(three, f"seed-{n}", "probe_accuracy", "shape", 2)).statistic for n in range(3)]
    z = np.arctanh(own)
    low, high = np.tanh(stats.t.interval(0.95, 2, loc=z.mean(), scale=stats.sem(z)))
    (view,) = page.data["panels"]["attribution-3"]["views"]
    *thin, pooled = view["lines"]
    assert [line["y"][2] for line in thin] == pytest.approx(own)
    assert [(line["role"], line["name"]) for line in thin] == [("part", f"seed-{n}") for n in range(3)]
    assert [pooled[end][2] for end in ("y", "low", "high")] == pytest.approx([np.tanh(z.mean()), low, high])
    text = f"r = {np.tanh(z.mean()):.2f} [{low:.2f}, {high:.2f}], 3 seeds".replace("-", "−")
    assert page.data["panels"]["attribution-3-checkpoints"]["told"][2] == text


def test_one_training_claims_no_interval(tmp_path: Path) -> None:
    run = sample_attribution(["alone"])
    found = read(build([run], tmp_path / "r.html"))
    r = stats.pearsonr(*series(run, "alone", "fidelity", "", 4)).statistic
    text = " ".join(" ".join(found.text).split())
    assert "One training gives one r and no interval: a trend, not a sample." in text
    assert verdict([run]).endswith("; one training gives one r and no interval: a trend, not a sample.")
    assert f"fidelity (r = {r:.2f})".replace("-", "−") in verdict([run])
    assert "[" not in verdict([run])
    assert "Whiskers" not in text
    panel = found.data["panels"]["attribution-4-checkpoints"]
    assert panel["told"][4] == f"r = {r:.2f}, 8 checkpoints".replace("-", "−")
    (view,) = found.data["panels"]["attribution-4"]["views"]
    assert [line["role"] for line in view["lines"]] == ["run"]
    assert view["lines"][0]["low"] == view["lines"][0]["y"]  # no band


def test_the_verdict_tells_what_its_intervals_tell() -> None:
    def row(target: str, value: float | None, low: float | None, high: float | None) -> Measurement:
        return Measurement("attribution", value, 4, low, high, 2, "seeds", target, note="flat")

    rows = [row("a", -0.9, -0.99, -0.2), row("b", 0.5, -0.3, 0.9), row("c", 0.8, 0.1, 0.9), row("d", None, None, None)]
    two = sample_attribution(["x", "y"])
    assert verdict([dataclasses.replace(two, rows=rows)]) == (
        "paid: over 2 trainings, answers and what the middle layer (4 of 8) tells go against each other in a "
        "(r = −0.90 [−0.99, −0.20]) and go together in c (r = 0.80 [0.10, 0.90]); no trend can be told in b "
        "(r = 0.50 [−0.30, 0.90]); no r of d: flat."
    )
    assert "no trend can be told at the middle layer (4 of 8): every 95 % interval contains zero (b" in (
        verdict([dataclasses.replace(two, rows=rows[1:2])])
    )
    assert verdict([dataclasses.replace(two, rows=rows[3:])]).endswith("cannot be set against each other: flat.")


def test_csv_of_both_figures(page: Page, three: LoadedRun) -> None:
    files = {attributes["download"]: attributes["href"] for _, attributes in page.tags if "download" in attributes}
    tables = {
        name: list(csv.DictReader(io.StringIO(unquote(uri.partition(",")[2])))) for name, uri in files.items() if uri
    }
    assert len(tables) == 2 * 5 + 1  # and that of the dots under the verdict
    lines = tables["attribution-0-checkpoints.csv"]
    assert len(lines) == 3 * 8 * (DEPTH + 1)
    chosen = [line for line in lines if (line["training"], line["layer"]) == ("seed-2", "6")]
    skills, told = series(three, "seed-2", "probe_accuracy", "texture", 6)
    assert [float(line["skill_value"]) for line in chosen] == skills
    assert [float(line["value"]) for line in chosen] == told
    assert {line["run"] for line in lines} == {"paid"}
    curves = tables["attribution-0.csv"]
    assert [line["run"] for line in curves[:: DEPTH + 1]] == ["paid", "paid, seed-0", "paid, seed-1", "paid, seed-2"]
    assert len([line for line in curves if line["low"]]) == DEPTH + 1


def test_beside_other_runs(three: LoadedRun, tmp_path: Path) -> None:
    """An attribution takes no column in the tables of the others, wherever it stands among them."""
    runs = [three, sample_run(0), sample_run(1)]
    found = read(build(runs, tmp_path / "r.html"))
    sections = [attributes["id"] for tag, attributes in found.tags if tag == "section"]
    assert sections[5:10] == ["lens", "sinks", "attribution", "explorer", "table"]
    assert [run["label"] for run in found.data["runs"]] == ["baseline", "with PRe", "paid"]
    assert verdict(runs) == verdict(runs[1:])
    text = " ".join(found.text)
    assert verdict(runs[1:]) in text
    assert verdict([three]) in text
    assert [course["number"] for course in found.data["attribution"]["courses"]] == [3, 4, 5]
    *_, line = found.data["panels"]["attribution-0"]["views"][0]["lines"]
    assert line["run"] == 2
    markdown = (tmp_path / "r.md").read_text(encoding="utf-8")
    assert "| measure | layer | baseline | with PRe | difference | n, seed |" in markdown
    assert "| measure | layer | paid | n, seed |" in markdown


def test_two_attributions_are_told_apart_by_colour(tmp_path: Path) -> None:
    runs = [sample_attribution(["a", "b"], "baseline"), sample_attribution(["a"], "with PRe")]
    found = read(build(runs, tmp_path / "r.html"))
    paths = [(course["number"], course["label"]) for course in found.data["attribution"]["courses"]]
    assert paths == [(0, "baseline, a"), (0, "baseline, b"), (1, "with PRe")]
    roles = [(line["role"], line["run"]) for line in found.data["panels"]["attribution-0"]["views"][0]["lines"]]
    assert roles == [("part", 0), ("part", 0), ("run", 0), ("run", 1)]


def test_hostile_names_are_text(tmp_path: Path) -> None:
    run = sample_attribution([HOSTILE], HOSTILE)
    points = [dataclasses.replace(point, name=f"{point.name}{HOSTILE}") for point in run.points]
    found = read(build([dataclasses.replace(run, points=points)], tmp_path / "r.html"))
    assert not [tag for tag, attributes in found.tags if tag == "img" or "onerror" in attributes]
    assert sum(tag == "script" for tag, _ in found.tags) == 5
    assert found.data["attribution"]["courses"][0]["label"] == HOSTILE
    assert " ".join(found.text).count("<img src=x onerror=alert(1)>") > 10


def test_curves_in_matplotlib(three: LoadedRun) -> None:
    pytest.importorskip("matplotlib")
    drawn = figures([sample_run(0), three], metrics=["attribution"])
    assert sorted(drawn) == sorted(f"attribution, {target}" for target in (*FADES, "fidelity"))
    (axes,) = drawn["attribution, texture"].axes
    rows = sorted((r for r in three.rows if r.target == "texture"), key=lambda row: row.layer or 0)
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [row.value for row in rows])


def test_compare_opens_the_folder(three: LoadedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = []
    for loaded in (sample_run(0), three):
        known = {name: loaded.info[name] for name in ("depth", "targets", "kind") if name in loaded.info}
        run = RunDirectory.create(tmp_path / loaded.label, label=loaded.label, **known)
        run.write_rows(loaded.rows)
        run.write_points(loaded.points)
        folders.append(str(run.path))
    out = tmp_path / "both.html"
    conditions = ["--fail-if", "attribution[texture] < -0.5", "--fail-if", "gap < 0.1"]
    assert cli.main(["compare", *folders, "--out", str(out), *conditions]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "attribution[texture] < -0.5: met paid, attribution[texture] at layer 4: met, −0.99 [" in said
    assert "gap < 0.1: not met baseline, gap (centred) at layer 4: not met" in said
    assert "r with skill, texture" in said
    assert verdict([three]) in said
    found = read(out)
    assert [run["label"] for run in found.data["runs"]] == ["baseline", "paid"]
    assert cli.main(["compare", folders[1], "--fail-if", "gap < 0.1"]) == 2
    assert "no run has 'gap'; the metrics are attribution" in capsys.readouterr().err
