import io

import pytest
from rich.console import Console

from keepsight.results import RunDirectory
from keepsight.results.intervals import correlation
from keepsight.testbed import demo
from keepsight.testbed._inside import TARGETS


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    text = io.StringIO()
    path = demo.run(out, steps=2, console=Console(file=text, width=200, highlight=False))
    return out, path, text.getvalue()


@pytest.mark.slow
def test_both_arms_start_alike_and_end_apart(done):
    out, _, _ = done
    without, with_pre = (RunDirectory.open(out / name) for name in ("without-pre", "with-pre"))
    assert without.info["model"]["before"] == with_pre.info["model"]["before"]
    assert without.info["model"]["fingerprint"] != with_pre.info["model"]["fingerprint"]
    assert (without.info["pre_layer"], with_pre.info["pre_layer"]) == (None, 4)
    assert without.info["seeds"] == with_pre.info["seeds"] == [0]


@pytest.mark.slow
def test_rows_of_every_layer_target_and_question(done):
    out, _, _ = done
    for name in ("without-pre", "with-pre"):
        rows = RunDirectory.open(out / name).read_rows()
        probes = {(row.target, row.layer) for row in rows if row.metric == "probe_accuracy" and not row.variant}
        assert probes == {(target, layer) for target in TARGETS for layer in range(9)}
        for metric in ("gap", "participation_ratio", "token_norm"):
            assert {row.layer for row in rows if row.metric == metric} == set(range(9)), metric
        answers = {row.metric for row in rows if row.metric.startswith("answer_") and not row.target}
        assert answers == {"answer_accuracy", "answer_f1", "answer_yes", "answer_prior"}


@pytest.mark.slow
def test_the_prior_of_the_same_questions_is_compared_in_pairs(done):
    out, _, _ = done
    one, other = (RunDirectory.open(out / name).load() for name in ("without-pre", "with-pre"))
    row = next(row for row in one.rows if row.metric == "answer_prior" and not row.target)
    assert correlation(row, row, one.per_image, other.per_image) == pytest.approx(1)


@pytest.mark.slow
def test_terminal_ends_with_a_verdict_and_the_report(done):
    _, path, text = done
    assert path.stat().st_size > 1_000_000
    assert "one seed: an illustration" in text
    assert "above the text-only prior of" in text
    assert str(path) in text.replace("\n", "")


@pytest.mark.slow
def test_a_second_demo_does_not_overwrite_the_first_unasked(done):
    out, _, _ = done
    with pytest.raises(FileExistsError, match="holds a demo already"):
        demo.run(out, steps=2, console=Console(file=io.StringIO()))


def test_data_of_another_seed_are_not_used(tmp_path, monkeypatch):
    """Up to the first training."""
    seen = []

    def train(config, *, datasets, **_):
        seen.append([datasets["full"].source.name(i) for i in (0, 15)])
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train", train)
    for seed in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            demo.run(tmp_path, steps=1, seed=seed, console=Console(file=io.StringIO()))
        (tmp_path / "data" / ".labels.json.0123abcd.part").write_text("{")  # killed while it was written
    assert ["5000-000000" in seen[0][0], "5001-000000" in seen[1][0]] == [True, True]
    assert len(list((tmp_path / "data" / "images").iterdir())) == 16
    (tmp_path / "data" / "mine.txt").write_text("kept")
    with pytest.raises(FileExistsError, match=r"not the testbed's \(mine.txt\); nothing was removed"):
        demo.run(tmp_path, steps=1, console=Console(file=io.StringIO()))


def test_folders_of_others_are_left_alone(tmp_path):
    """Also where their names are those that a demo would use."""
    for name in ("data/images/my_precious.png", "report.html"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("kept")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="is not empty and holds no keepsight demo; nothing was touched"):
            demo.run(tmp_path, steps=1, overwrite=overwrite, console=Console(file=io.StringIO()))
    assert (tmp_path / "data" / "images" / "my_precious.png").read_text() == "kept"


def test_a_picture_put_beside_the_demos_own_is_not_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        demo.run(tmp_path, steps=1, console=Console(file=io.StringIO()))
    (tmp_path / "data" / "images" / "mine.png").write_text("kept")
    with pytest.raises(FileExistsError, match=r"mine\.png"):
        demo.run(tmp_path, steps=1, overwrite=True, console=Console(file=io.StringIO()))
    assert (tmp_path / "data" / "images" / "mine.png").read_text() == "kept"


@pytest.mark.slow
def test_overwrite_replaces_a_demo(done):
    out, path, _ = done
    before = path.stat().st_mtime_ns
    demo.run(out, steps=1, overwrite=True, console=Console(file=io.StringIO()))
    assert path.stat().st_mtime_ns > before
    assert "max_steps: 1\n" in (out / "with-pre" / "config.yaml").read_text()


def test_steps_out_of_range(tmp_path):
    with pytest.raises(ValueError, match="steps is 0"):
        demo.run(tmp_path / "x", steps=0, console=Console(file=io.StringIO()))
