"""The Matplotlib figures and the DataFrame, against the rows that they are made of."""

import builtins
import dataclasses
import tomllib
from pathlib import Path

import numpy as np
import pytest

from keepsight.diagnosis import Diagnosis
from keepsight.report import figures
from keepsight.results import LoadedRun, Measurement, frame
from tests.report.sample import PROBES

pytest.importorskip("matplotlib")


def values(run: LoadedRun, metric: str, **fields: str) -> list[float]:
    wanted = {"target": "", "variant": "", "tokens": "all", **fields}
    rows = [r for r in run.rows if r.metric == metric and all(getattr(r, k) == v for k, v in wanted.items())]
    return [np.nan if row.value is None else row.value for row in sorted(rows, key=lambda row: row.layer)]


def test_curves_bands_controls_and_marks(base: LoadedRun, pre: LoadedRun, tmp_path: Path) -> None:
    drawn = figures([base, pre], metrics=["gap", "probe_accuracy"])
    assert sorted(drawn) == ["gap", *(f"probe_accuracy, {target}" for target in sorted(PROBES))]
    (axes,) = drawn["probe_accuracy, texture"].axes
    curves = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    assert list(curves) == ["baseline", "with PRe"]
    assert curves["with PRe"].get_xdata().tolist() == list(range(9))
    expected = [100 * value for value in values(pre, "probe_accuracy", target="texture")]
    np.testing.assert_allclose(curves["with PRe"].get_ydata(), expected)
    low = [100 * row.low for row in base.rows if (row.target, row.variant) == ("texture", "") and row.layer == 0][:1]
    band = axes.collections[0].get_paths()[0].vertices
    assert band[band[:, 0] == 0][:, 1].min() == pytest.approx(low[0])
    dotted = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert sorted(line.get_xdata()[0] for line in dotted) == [0, 0, 4]  # two controls, one mark of PRe at layer 4
    np.testing.assert_allclose(
        [line.get_ydata() for line in axes.lines if line.get_linestyle() == "--"], [[12.5, 12.5]]
    )
    assert axes.get_ylabel() == "texture (%)"
    drawn["gap"].savefig(tmp_path / "gap.pdf")
    assert (tmp_path / "gap.pdf").read_bytes().startswith(b"%PDF")


def test_variants_tokens_and_gaps(base: LoadedRun) -> None:
    for chosen, variant in ((None, "centred"), ("raw", "raw"), ("none such", "centred")):
        (axes,) = figures([base], metrics=["gap"], variant=chosen)["gap"].axes
        np.testing.assert_allclose(axes.lines[0].get_ydata(), values(base, "gap", variant=variant))
        assert axes.get_ylabel() == f"Gap, {variant}"
    (axes,) = figures([base], metrics=["contrast"], tokens="without sinks")["contrast"].axes
    found = axes.lines[0].get_ydata()
    np.testing.assert_allclose(found, values(base, "contrast", variant="raw", tokens="without sinks"))
    assert np.isnan(found[7])
    (other,) = figures([base], metrics=["probe_accuracy"], tokens="without sinks")["probe_accuracy, texture"].axes
    expected = values(base, "probe_accuracy", target="texture", tokens="without sinks")
    np.testing.assert_allclose(other.lines[0].get_ydata(), np.multiply(100, expected))
    assert other.get_ylabel() == "texture, without sinks (%)"
    assert axes.get_legend() is None


def test_names_are_no_formulas(base: LoadedRun, tmp_path: Path) -> None:
    rows = [Measurement("probe_accuracy", 0.5, layer=layer, target="$\\frac{1") for layer in (0, 1)]
    runs = [LoadedRun(label, rows) for label in ("costs $5 or $\\x", "b")]
    drawn = figures(runs)["probe_accuracy, $\\frac{1"]
    drawn.savefig(tmp_path / "a.png")
    assert drawn.axes[0].get_legend().get_texts()[0].get_text() == "costs $5 or $\\x"


def test_a_diagnosis_gives_both(base: LoadedRun, tmp_path: Path) -> None:
    result = Diagnosis(list(base.rows), {**base.info, "label": "mine"})
    drawn = result.figures(metrics=["gap"], variant="raw")
    np.testing.assert_allclose(drawn["gap"].axes[0].lines[0].get_ydata(), values(base, "gap", variant="raw"))
    with pytest.raises(ValueError, match=r"no run has a curve of 'gab'; there are curves of probe_accuracy, fidelity"):
        result.figures(metrics=["gab"])
    table = result.frame()
    assert list(table.columns) == [field.name for field in dataclasses.fields(Measurement)]
    assert len(table) == len(base.rows)
    known = table[(table.metric == "fidelity") & (table.variant == "") & (table.tokens == "all")]
    np.testing.assert_allclose(known.sort_values("layer").value, values(base, "fidelity"))
    assert str(table.layer.dtype) == str(table.n.dtype) == "Int64"
    none = table[(table.metric == "contrast") & table.value.isna()]
    assert set(none.note) == {"coupling is near zero"}
    assert table.layer.isna().sum() == sum(row.layer is None for row in base.rows) > 0
    pytest.importorskip("pyarrow")
    pd = pytest.importorskip("pandas")
    table.to_parquet(tmp_path / "rows.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "rows.parquet"), table)


def test_an_empty_frame_has_its_columns() -> None:
    table = frame([])
    assert (len(table), str(table.seed.dtype), str(table.value.dtype)) == (0, "Int64", "float64")


@pytest.mark.parametrize(("module", "call"), [("matplotlib", "figures"), ("pandas", "frame")])
def test_what_is_missing_is_named(base: LoadedRun, monkeypatch: pytest.MonkeyPatch, module: str, call: str) -> None:
    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name.partition(".")[0] == module:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'it is not installed: pip install "keepsight\[figures\]"'):
        getattr(Diagnosis(list(base.rows), {**base.info, "label": "mine"}), call)()


def test_the_extra_holds_what_the_readme_calls() -> None:
    """`result.frame().to_parquet` needs an engine that pandas itself does not bring."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {requirement.partition(">=")[0] for requirement in project["optional-dependencies"]["figures"]}
    assert named == {"matplotlib", "pandas", "pyarrow"}
