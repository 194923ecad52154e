"""`keepsight compare` on runs whose numbers are known."""

import numpy as np
import pytest

from keepsight import cli
from keepsight.report.compare import differences
from keepsight.results import Key, Measurement, PerImageBuilder, RunDirectory, read_rows
from keepsight.results.intervals import mean_interval

NAMES = [f"{i}.png" for i in range(60)]
SHARED = np.random.default_rng(0).normal(size=60)


def write_run(folder, label: str, gap: float, drop: tuple[float, float, float], seed: int = 0):
    """A run of depth 4 whose gap at the middle is `gap` on average, and differs between runs by little noise."""
    noise = np.random.default_rng([seed, len(label)]).normal(size=60)
    values = SHARED + 0.1 * (noise - noise.mean()) + gap - SHARED.mean()
    run = RunDirectory.create(
        folder, label=label, depth=4, fingerprint=str(folder), kind="diagnosis", training_seed=seed
    )
    builder, rows = PerImageBuilder(NAMES), []
    for layer, level in ((0, SHARED + 1), (2, values)):
        found = mean_interval(level)
        rows.append(Measurement("gap", found.value, layer, found.low, found.high, 60, variant="centred"))
        builder.add(Key("gap", variant="centred", layer=layer), level)
    value, low, high = drop
    rows.append(Measurement("probe_drop", value, layer=2, low=low, high=high, n=60, target="texture"))
    rows.append(Measurement("probe_drop", 0.0, layer=2, low=-0.1, high=0.05, n=60, target="shape"))
    bare = {"n": 60, "target": "shape", "tokens": "without sinks"}  # no condition is about these
    rows.append(Measurement("probe_drop", 0.9, layer=2, low=0.85, high=0.95, **bare))
    run.write_rows(rows)
    run.write_per_image(builder.finish())
    return folder


@pytest.fixture
def pair(tmp_path):
    return [
        str(write_run(tmp_path / "base", "base", 0.5, (0.3, 0.2, 0.4))),
        str(write_run(tmp_path / "pre", "with PRe", 0.6, (0.15, 0.05, 0.25))),
    ]


def test_side_by_side(pair, tmp_path, capsys):
    files = ["--out", str(tmp_path / "both.html"), "--rows", str(tmp_path / "both.jsonl")]
    assert cli.main(["compare", *pair, *files]) == 0
    text = capsys.readouterr().out
    assert (
        "the centred gap between patches is wider" in text
    )  # told in pairs; independent intervals are ten times wider
    (row,) = [row for row in read_rows(tmp_path / "both.jsonl") if row.metric == "difference of gap" and row.layer == 2]
    assert row.value == pytest.approx(0.1)
    assert row.high - row.low == pytest.approx(2 * 2 * 0.1 * np.sqrt(2 / 60), rel=0.25)
    assert row.note == "with PRe − base, interval over images"
    drops = [row for row in read_rows(tmp_path / "both.jsonl") if row.metric == "difference of probe_drop"]
    assert [(row.target, row.tokens, row.value) for row in drops] == [
        ("texture", "all", pytest.approx(-0.15)), ("shape", "all", 0.0), ("shape", "without sinks", 0.0)
    ]  # fmt: skip
    assert "with PRe" in (tmp_path / "both.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("condition", "status", "said"),
    [
        (
            "probe_drop > 0.1",
            0,
            "probe_drop > 0.1: open\n  with PRe, probe_drop[texture] at layer 2: open, 15.0 % [5.0, 25.0]",
        ),
        ("probe_drop[texture] > 0.04", 1, "probe_drop[texture] > 0.04: met\n"),
        ("probe_drop[shape] > 0.06", 0, "not met"),
        ("gap@0 > 2", 0, "not met"),
        ("delta gap < 0", 0, "not met"),
        ("delta gap > 0.05", 1, "with PRe, gap (centred) at layer 2: met, +0.1"),
    ],
)
def test_conditions_give_the_exit_status(pair, capsys, condition, status, said):
    assert cli.main(["compare", *pair, "--fail-if", condition]) == status
    assert said in capsys.readouterr().out


def test_every_pruning_is_judged_and_named(pair, capsys):
    """The fewer tokens are kept, the less is read; the condition is about the fewest, which comes last."""
    rows = [
        Measurement("probe_accuracy_pruned", value, 2, value - 0.1, value + 0.1, 60, target="texture", variant=kept)
        for value, kept in ((0.8, "attention, 50% after layer 1"), (0.5, "random, 25% after layer 1"))
    ]
    RunDirectory.open(pair[0]).write_rows([*RunDirectory.open(pair[0]).read_rows(), *rows])
    assert cli.main(["compare", pair[0], "--fail-if", "probe_accuracy_pruned < 0.65"]) == 1
    said = capsys.readouterr().out
    name = "base, probe_accuracy_pruned[texture]"
    assert f"{name} (attention, 50% after layer 1) at layer 2: not met, 80.0 % [70.0, 90.0]" in said
    assert f"{name} (random, 25% after layer 1) at layer 2: met, 50.0 % [40.0, 60.0]" in said


def test_one_run_alone_can_be_judged(pair, capsys):
    assert cli.main(["compare", pair[0], "--fail-if", "probe_drop > 0.1"]) == 1
    assert "base, probe_drop[texture] at layer 2: met, 30.0 % [20.0, 40.0]" in capsys.readouterr().out


def test_several_seeds(tmp_path, capsys):
    runs = [
        write_run(
            tmp_path / f"{label}{seed}", label, 0.5 + gain * (1 + (seed - 1) / 10) + 0.2 * seed, (0.1, 0.05, 0.15), seed
        )
        for label, gain in (("base", 0.0), ("pre", 0.1))
        for seed in range(3)
    ]
    assert cli.main(["compare", *map(str, runs), "--rows", str(tmp_path / "rows.jsonl")]) == 0
    found = {
        row.unit: row
        for row in read_rows(tmp_path / "rows.jsonl")
        if (row.metric, row.layer) == ("difference of gap", 2)
    }
    assert set(found) == {"images", "seeds"}
    assert found["seeds"].n == 3
    for row in found.values():
        assert row.value == pytest.approx(0.1)
    # Gains 0.09, 0.10, 0.11: t(0.975, 2) · 0.01 / √3. In pairs, the seeds' own spread (0.2 apart) is taken out.
    assert found["seeds"].high - found["seeds"].low == pytest.approx(2 * 4.3027 * 0.01 / np.sqrt(3), rel=1e-3)
    assert 0.01 < found["images"].high - found["images"].low < 0.06
    assert "base" in capsys.readouterr().out


def test_an_arm_of_unknown_training_seeds_is_not_one_seed_and_names_all_its_runs(tmp_path, capsys):
    """As models that were not trained here: what is known is the seed of the diagnosis, the same in all."""
    runs = []
    for label in ("base", "pre"):
        for number in range(3):
            run = write_run(tmp_path / f"{label}{number}", label, 0.5 + 0.1 * number, (0.1, 0.05, 0.15), number)
            RunDirectory.open(run).update(training_seed=None, seed=0, command=f"keepsight diagnose {label}{number}")
            runs.append(str(run))
    assert cli.main(["compare", *runs, "--out", str(tmp_path / "page.html")]) == 0
    assert "one seed" not in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"{tmp_path / 'base0'}, {tmp_path / 'base1'}, {tmp_path / 'base2'}" in page
    assert "keepsight diagnose pre0\nkeepsight diagnose pre1\nkeepsight diagnose pre2" in page
    assert "<small>seed " not in page


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--fail-if", "gap ! 3"], "the condition 'gap ! 3' cannot be read"),
        (["--fail-if", "fidelity < 1"], "no run has 'fidelity'; the metrics are gap, probe_drop"),
        (["--fail-if", "gap@3 < 1"], "no run has 'gap' at layer 3; it was measured at 0, 2: name one, as in 'gap@2'"),
        (["--fail-if", "gap@last < 1"], "no run has 'gap' at layer 4; it was measured at 0, 2"),
        (["--fail-if", "probe_drop[size] > 0"], "no run has 'probe_drop' of 'size'; there is probe_drop of 'texture'"),
        (["--out", "nowhere/report.html"], "whose folder does not exist"),
    ],
)
def test_bad_input_is_named(pair, capsys, arguments, said):
    assert cli.main(["compare", *pair, *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_folder_that_is_no_run(tmp_path, pair, capsys):
    assert cli.main(["compare", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert cli.main(["compare", pair[0], "--fail-if", "delta gap < 0"]) == 2
    assert "give two runs or more" in capsys.readouterr().err
    empty = RunDirectory.create(tmp_path / "empty", label="empty")
    assert cli.main(["compare", pair[0], str(empty.path)]) == 2
    assert "the run 'empty' holds no rows" in capsys.readouterr().err


def test_a_difference_is_between_the_middle_layers_of_models_of_other_depths(pair, tmp_path, capsys):
    """Probe drop 30 % at layer 2 of 4 and 50 % at layer 3 of 6: +20 points."""
    deep = RunDirectory.create(tmp_path / "deep", label="deep", depth=6, kind="diagnosis")
    deep.write_rows(
        [
            Measurement("probe_drop", 0.5, layer=3, low=0.45, high=0.55, target="texture"),
            Measurement("cka", 0.5, layer=3),
        ]
    )
    assert cli.main(["compare", pair[0], str(deep.path), "--fail-if", "delta probe_drop > 0.05"]) == 1
    assert "deep, probe_drop[texture] at layer 3: met, +20.0 points [8.8, 31.2]" in capsys.readouterr().out
    assert cli.main(["compare", pair[0], str(deep.path), "--fail-if", "delta cka > 0.05"]) == 2
    assert "the first run, 'base', has no 'cka' there, so there is no difference from it" in capsys.readouterr().err


def test_runs_that_share_a_label_are_said_to_be_averaged(tmp_path, capsys):
    runs = [
        str(write_run(tmp_path / name, "checkpoint-9", 0.5, (0.3, 0.2, 0.4), seed)) for seed, name in enumerate("ab")
    ]
    assert cli.main(["compare", *runs]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "checkpoint-9: 2 runs of this label are averaged as seeds of one arm; to compare them" in said
    assert cli.main(["compare", *runs, "--fail-if", "delta gap < 0"]) == 2
    assert "give two runs or more, with labels of their own" in capsys.readouterr().err
    RunDirectory.open(runs[1]).update(pre_layer=2)
    assert cli.main(["compare", *runs]) == 2
    assert (
        "runs labelled 'checkpoint-9' have None and 2 as PRe's layer, so they are no seeds" in capsys.readouterr().err
    )


def test_nothing_in_common_gives_no_differences(pair):
    runs = [RunDirectory.open(folder).load() for folder in pair]
    other = RunDirectory.create(runs[0].info["model"]["fingerprint"] + "-x", label="x")
    other.write_rows([Measurement("coupling", 0.1, layer=1)])
    assert differences([[runs[0]], [other.load()]]) == []
