"""Differences in pairs, arms of several seeds, what each picture adds, and conditions."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from keepsight.results import Key, LoadedRun, Measurement, PerImage, PerImageBuilder, RunDirectory, merged
from keepsight.results.arms import arms, pool
from keepsight.results.gate import MET, NOT_MET, OPEN, Condition, verdict
from keepsight.results.intervals import Estimate, correlation, difference, mean_interval

GAP = Key("gap", variant="raw", layer=4)
NAMES = [f"{i}.png" for i in range(40)]


def kept(values: np.ndarray, names: list[str] = NAMES, key: Key = GAP) -> PerImage:
    builder = PerImageBuilder(names)
    builder.add(key, values)
    return builder.finish()


def mean_row(values: np.ndarray, key: Key = GAP) -> Measurement:
    found = mean_interval(values)
    return Measurement(
        key.metric, found.value, low=found.low, high=found.high, n=len(values), variant=key.variant, layer=key.layer
    )


class TestDifference:
    def test_without_correlation_the_distances_add_in_square(self):
        """By hand: 0.8 − 0.5 = 0.3, below √(0.03² + 0.04²) = 0.05, above √(0.12² + 0.05²) = 0.13."""
        before = Measurement("gap", 0.5, low=0.45, high=0.54)
        found = difference(before, Measurement("gap", 0.8, low=0.77, high=0.92))
        assert (found.value, found.low, found.high) == pytest.approx((0.3, 0.25, 0.43))
        assert found.told

    def test_what_is_missing(self):
        whole = Measurement("gap", 0.5, low=0.4, high=0.6)
        missing = difference(whole, Measurement("gap", None, note="no masks"))
        assert (missing.value, missing.note) == (None, "no masks")
        assert difference(whole, Measurement("gap", 0.75)) == Estimate(0.25)

    def test_of_two_means_is_the_paired_t_interval(self):
        rng = np.random.default_rng(0)
        x = rng.normal(size=40)
        y = x + 0.1 + 0.2 * rng.normal(size=40)
        before, after = mean_row(x), mean_row(y)
        found = difference(before, after, correlation(before, after, kept(x), kept(y)))
        expected = stats.ttest_rel(y, x).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-6)
        alone = difference(before, after)
        assert alone.high - alone.low > 3 * (found.high - found.low)

    def test_pictures_are_paired_by_name(self):
        rng = np.random.default_rng(1)
        x, y = rng.normal(size=(2, 40))
        order = rng.permutation(40)
        before, after = mean_row(x), mean_row(y)
        same = correlation(before, after, kept(x), kept(y))
        assert correlation(before, after, kept(x), kept(y[order], [NAMES[i] for i in order])) == pytest.approx(same)
        assert same == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-6)

    def test_without_common_pictures_they_are_independent(self):
        x = np.arange(40.0)
        other = kept(x, [f"other {name}" for name in NAMES])
        assert correlation(mean_row(x), mean_row(x), kept(x), other) == 0
        assert correlation(mean_row(x), mean_row(x), kept(x), None) == 0

    def test_half_of_the_pictures_in_common_halve_the_correlation(self):
        """By hand: the covariance has half of the products, the variances all of them."""
        x = np.where(np.arange(40) % 2, 1.0, -1.0)
        other = kept(x, [*NAMES[:20], *(f"new {i}" for i in range(20))])
        assert correlation(mean_row(x), mean_row(x), kept(x), other) == pytest.approx(0.5)

    def test_the_same_model_twice_differs_by_nothing(self):
        x = np.arange(40.0)
        found = difference(mean_row(x), mean_row(x), correlation(mean_row(x), mean_row(x), kept(x), kept(x)))
        assert (found.value, found.low, found.high) == pytest.approx((0, 0, 0), abs=1e-6)
        assert not found.told

    def test_shares_without_spread_are_not_certain(self):
        """20 of 20 right twice: the Wilson intervals stay, there is no spread to correlate."""
        row = Measurement("gap", 1.0, low=0.84, high=1.0, variant="raw", layer=4)
        found = difference(row, row, correlation(row, row, kept(np.ones(40)), kept(np.ones(40))))
        assert (found.low, found.high) == pytest.approx((-0.16, 0.16))

    def test_intervals_of_pairs_cover(self):
        """400 pairs of runs that share their pictures: 95 % of the intervals hold the true difference."""
        rng = np.random.default_rng(2)
        covered = 0
        for _ in range(400):
            shared = rng.normal(size=40)
            x, y = shared + 0.5 * rng.normal(size=(2, 40)) + np.array([[0.0], [0.3]])
            before, after = mean_row(x), mean_row(y)
            found = difference(before, after, correlation(before, after, kept(x), kept(y)))
            covered += found.low <= 0.3 <= found.high
        assert 0.92 <= covered / 400 <= 0.98


class TestPerImage:
    def test_a_run_keeps_it(self, tmp_path):
        values = np.array([1.0, np.nan, 3.0])
        run = RunDirectory.create(tmp_path / "run", label="a")
        run.write_per_image(kept(values, ["x", "y", "z"]))
        found = RunDirectory.open(run.path).load().per_image
        assert list(found.images) == ["x", "y", "z"]
        np.testing.assert_array_equal(found.of(GAP), values)
        assert GAP in found
        assert Key("cohesion") not in found

    def test_only_some_pictures_have_a_value(self):
        builder = PerImageBuilder(["x", "y", "z"])
        builder.add(GAP, np.array([5.0, 6.0]), np.array([2, 0]))
        np.testing.assert_array_equal(builder.finish().of(GAP), [6.0, np.nan, 5.0])
        with pytest.raises(ValueError, match="has 2 values; there are 3 pictures"):
            builder.add(GAP, np.array([5.0, 6.0]))

    def test_numbers_of_different_pictures_together(self):
        other = Key("answer_accuracy")
        both = merged([kept(np.array([1.0, 2.0]), ["x", "y"]), kept(np.array([3.0, 4.0]), ["y", "z"], other)])
        assert list(both.images) == ["x", "y", "z"]
        np.testing.assert_array_equal(both.of(GAP), [1, 2, np.nan])
        np.testing.assert_array_equal(both.of(other), [np.nan, 3, 4])

    @pytest.mark.parametrize("damage", ["cut", "other size", "no keys"])
    def test_damaged_files_are_named(self, tmp_path, damage):
        run = RunDirectory.create(tmp_path / "run", label="a")
        run.write_per_image(kept(np.arange(3.0), ["x", "y", "z"]))
        numbers, index = run.path / "per_image.npy", run.path / "per_image.json"
        if damage == "cut":
            numbers.write_bytes(numbers.read_bytes()[:-4])
        elif damage == "other size":
            index.write_text(index.read_text().replace('"z"', '"z", "w"'))
        else:
            index.write_text('{"images": []}')
        with pytest.raises(ValueError, match=r"per_image.npy' and 'per_image.json' cannot be read .*diagnose again"):
            RunDirectory.open(run.path).load()

    def test_a_replaced_run_leaves_none_behind(self, tmp_path):
        RunDirectory.create(tmp_path / "run", label="a").write_per_image(kept(np.arange(40.0)))
        again = RunDirectory.create(tmp_path / "run", label="b", overwrite=True)
        assert again.load().per_image is None


def run_of(label: str, values: np.ndarray, seed: int | None, names: list[str] = NAMES) -> LoadedRun:
    info = {"model": {"fingerprint": f"{label} {seed} {values.sum()}"}, "training_seed": seed}
    return LoadedRun(label, [mean_row(values)], info, per_image=kept(values, names))


class TestArms:
    def test_runs_of_one_label_are_one_arm(self):
        runs = [run_of(label, np.arange(40.0) + i, i) for i, label in enumerate("aba")]
        assert [[run.info["training_seed"] for run in arm] for arm in arms(runs)] == [[0, 2], [1]]
        assert pool(runs[:1]) is runs[0]

    def test_over_seeds(self):
        """By hand: means 1, 2, 6 → mean 3, and the t-interval of three numbers."""
        pooled = pool([run_of("a", np.arange(40.0) - 19.5 + mean, mean) for mean in (1, 2, 6)])
        (row,) = pooled.rows
        low, high = stats.t.interval(0.95, 2, loc=3, scale=stats.sem([1, 2, 6]))
        assert (row.value, row.low, row.high) == pytest.approx((3, low, high), abs=1e-5)
        assert (row.n, row.unit) == (3, "seeds")
        assert row.note == "mean of 3 seeds, interval over seeds; 40 images each"
        assert pooled.info["seeds"] == [1, 2, 6]

    def test_seeds_are_paired(self):
        rng = np.random.default_rng(0)
        means = rng.normal(size=5)
        gains = 0.5 + 0.1 * rng.normal(size=5)
        noise = rng.normal(size=40)
        noise -= noise.mean()
        base = pool([run_of("a", noise + m, i) for i, m in enumerate(means)])
        other = pool([run_of("b", noise + m + g, i) for i, (m, g) in enumerate(zip(means, gains, strict=True))][::-1])
        before, after = base.rows[0], other.rows[0]
        found = difference(before, after, correlation(before, after, base.per_image, other.per_image))
        low, high = stats.t.interval(0.95, 4, loc=gains.mean(), scale=stats.sem(gains))
        assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)

    def test_seeds_that_are_not_known_are_not_paired(self):
        base, other = (pool([run_of(label, np.arange(40.0) * i, None) for i in (1, 2, 3)]) for label in "ab")
        assert correlation(base.rows[0], other.rows[0], base.per_image, other.per_image) == 0

    def test_over_images(self):
        x, y = np.random.default_rng(0).normal(size=(2, 40))
        order = np.arange(40)[::-1]
        pooled = pool([run_of("a", x, 0), run_of("a", y[order], 1, [NAMES[i] for i in order])], over="images")
        expected = mean_interval((x + y) / 2)
        found = pooled.rows[0]
        assert (found.value, found.low, found.high) == pytest.approx(
            (expected.value, expected.low, expected.high), abs=1e-6
        )

    def test_over_images_that_only_some_of_the_runs_have(self):
        """As the test pictures of probes of other seeds: the interval is about the mean of the runs, by hand."""
        x, y = np.random.default_rng(0).normal(size=(2, 40))
        x[30:], y[:20] = np.nan, np.nan  # 30 and 20 pictures, 10 of them in both
        y += 5
        means = np.nanmean(x), np.nanmean(y)
        runs = [run_of("a", x, 0), run_of("a", y, 1)]
        runs = [
            LoadedRun("a", [Measurement("gap", mean, variant="raw", layer=4, n=n)], run.info, per_image=run.per_image)
            for run, mean, n in zip(runs, means, (30, 20), strict=True)
        ]
        (row,) = pool(runs, over="images").rows
        influence = np.nan_to_num((x - means[0]) / 30) + np.nan_to_num((y - means[1]) / 20)
        half = stats.t.ppf(0.975, 39) * np.sqrt(40 / 39 * (influence**2).sum()) / 2
        assert row.value == pytest.approx(np.mean(means))
        assert (row.low, row.high) == pytest.approx((row.value - half, row.value + half), abs=1e-5)

    @pytest.mark.parametrize("over", ["seeds", "images"])
    def test_seeds_that_agree_are_not_certain(self, over):
        """5 of 6 right with either seed, and 6 of 6: an interval without width would tell the two apart for sure."""
        arms_of = [
            pool([run_of(label, np.full(40, share), seed) for seed in (0, 1)], over=over)
            for label, share in (("a", 5 / 6), ("b", 1.0))
        ]
        before, after = (arm.rows[0] for arm in arms_of)
        assert (before.value, before.low, before.high) == (pytest.approx(5 / 6), None, None)
        assert before.note.endswith(f"; no interval: all {over} agree")
        assert not difference(before, after).told

    def test_a_value_that_one_run_lacks(self):
        runs = [run_of("a", np.arange(40.0), i) for i in (0, 1)]
        lacking = LoadedRun(
            "a", [Measurement("gap", None, variant="raw", layer=4, note="no masks")], {"training_seed": 2}
        )
        (row,) = pool([run_of("a", np.ones(40), 0), lacking]).rows
        assert (row.value, row.low) == (None, None)
        assert row.note == "1 of 2 runs have no value"
        with pytest.raises(ValueError, match=r"two runs labelled 'a' are of the same weights .*give them labels"):
            pool([runs[0], runs[0]])


class TestJoined:
    """A model's diagnosis and its evaluation, which have the model's name for a label."""

    ANSWERS = Key("answer_accuracy")

    def pair(self, weights="w", other="w", label="a"):
        gap, answers = np.linspace(0.2, 0.4, 40), np.tile([1.0, 0.0], 10)
        names = [f"question picture {i}" for i in range(20)]
        diagnosis = LoadedRun(
            "a",
            [mean_row(gap)],
            {"depth": 8, "model": {"fingerprint": weights}, "command": "diagnose", "seed": 1},
            "x: 1\n",
            per_image=kept(gap),
        )
        evaluation = LoadedRun(
            label,
            [mean_row(answers, self.ANSWERS)],
            {"model": {"fingerprint": other}, "command": "evaluate", "seed": 2, "paper": {}},
            "y: 2\n",
            per_image=kept(answers, names, self.ANSWERS),
        )
        return diagnosis, evaluation

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    def test_one_column(self, order):
        given = self.pair()
        ((run,),) = arms([given[i] for i in order])
        assert [row.key for row in run.rows] == [GAP, self.ANSWERS]
        assert run.info == {
            "depth": 8,
            "model": {"fingerprint": "w"},
            "command": "diagnose\nevaluate",
            "seed": 1,
            "paper": {},
        }
        assert run.config == "x: 1\n---\ny: 2\n"
        assert np.nanmean(run.per_image.of(GAP)) == pytest.approx(0.3)
        assert np.nanmean(run.per_image.of(self.ANSWERS)) == pytest.approx(0.5)

    def test_others_stay_apart(self):
        assert [len(arm) for arm in arms(self.pair(label="b"))] == [1, 1]
        assert [len(arm) for arm in arms(self.pair(other="v"))] == [2]  # seeds of one arm, as far as can be told
        assert [len(arm) for arm in arms(self.pair(weights="", other=""))] == [2]
        diagnosis, evaluation = self.pair()
        assert [len(arm) for arm in arms([diagnosis, evaluation, diagnosis])] == [2]  # the same number twice

    def test_answers_with_visual_tokens_pruned_are_not_the_diagnosed_model(self):
        diagnosis, evaluation = self.pair()
        pruned = replace(evaluation, info={**evaluation.info, "pruning": "attention, 25% after layer 2"})
        ((one, two),) = arms([diagnosis, pruned])
        assert (one, two) == (diagnosis, pruned)
        with pytest.raises(ValueError, match="give them labels of their own"):
            pool([one, two])


class TestConditions:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("probe_drop > 0.1", Condition("probe_drop", ">", 0.1)),
            ("probe_drop[left of]>=.5", Condition("probe_drop", ">=", 0.5, target="left of")),
            (" gap@16 < -2e-2 ", Condition("gap", "<", -0.02, layer=16)),
            ("gap @ last <= −1", Condition("gap", "<=", -1.0, layer="last")),
            ("delta gap[]@middle < 0", Condition("gap", "<", 0.0, target="", layer="middle", delta=True)),
        ],
    )
    def test_grammar(self, text, expected):
        assert Condition.parse(text) == expected

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "probe_drop",
            "gap < x",
            "gap == 1",
            "gap@up < 1",
            "__import__('os') < 1",
            "gap < 1 or 1 < 2",
            "gap < nan",
        ],
    )
    def test_everything_else_is_refused(self, text):
        with pytest.raises(
            ValueError, match=r"cannot be read; write METRIC OPERATOR NUMBER, such as 'probe_drop > 0.1'"
        ):
            Condition.parse(text)

    @pytest.mark.parametrize(
        ("found", "outcome"),
        [
            (Estimate(0.2, 0.15, 0.25), MET),
            (Estimate(0.2, 0.05, 0.35), OPEN),
            (Estimate(0.0, -0.1, 0.1), NOT_MET),
            (Estimate(0.2), OPEN),
            (Estimate(None, note="none"), OPEN),
        ],
    )
    def test_the_interval_decides(self, found, outcome):
        assert Condition.parse("probe_drop > 0.1").judge(found) == outcome

    def test_one_number_is_enough(self):
        assert verdict([NOT_MET, OPEN, MET]) == MET
        assert verdict([NOT_MET, OPEN]) == OPEN
        assert verdict([NOT_MET]) == NOT_MET
