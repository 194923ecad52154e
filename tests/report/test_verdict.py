"""The sentence: what it says when intervals leave zero out, when they do not, and when there is nothing."""

import dataclasses
from typing import Any

import pytest

from keepsight.report import verdict
from keepsight.results import LoadedRun, Measurement

TARGETS = {"texture": "never asked", "shape": "asked"}


def run(label: str, rows: list[Measurement], **info: Any) -> LoadedRun:
    return LoadedRun(label, rows, {"depth": 8, "targets": TARGETS, **info})


def probe(value: float, half: float, target: str = "texture", layer: int = 4, **fields: Any) -> Measurement:
    return Measurement(
        "probe_accuracy", value, layer=layer, low=value - half, high=value + half, target=target, **fields
    )


def gap(value: float, half: float, layer: int = 4, **fields: Any) -> Measurement:
    return Measurement("gap", value, layer=layer, low=value - half, high=value + half, variant="centred", **fields)


def test_two_runs_with_a_difference() -> None:
    base = run("baseline", [probe(0.80, 0.03), probe(0.50, 0.03, "shape"), gap(0.50, 0.03)])
    pre = run("PRe", [probe(0.90, 0.04), probe(0.51, 0.04, "shape"), gap(0.40, 0.04)])
    assert verdict([base, pre]) == (
        "At the middle layer (4 of 8), PRe against baseline: more can be read of what no question asks about "
        "(texture +10.0 points [5.0, 15.0]); the centred gap between patches is narrower, "
        "−0.100 [−0.150, −0.050]; no difference can be told for shape."
    )


def test_two_runs_without_a_difference() -> None:
    base = run("baseline", [probe(0.80, 0.03), gap(0.50, 0.03)])
    pre = run("PRe", [probe(0.82, 0.04), gap(0.52, 0.04)])
    assert verdict([base, pre]) == (
        "No difference can be told between PRe and baseline at the middle layer (4 of 8): every 95 % interval "
        "contains zero (texture +2.0 points [−3.0, 7.0], centred gap +0.020 [−0.030, 0.070])."
    )


def test_a_difference_without_intervals_is_not_told() -> None:
    bare = [dataclasses.replace(probe(value, 0), low=None, high=None) for value in (0.1, 0.9)]
    text = verdict([run("a", bare[:1]), run("b", bare[1:])])
    assert text.startswith("No difference can be told between b and a")


def test_runs_of_answers_alone() -> None:
    """No layer is named; with several tasks each has its part, its types have none."""

    def answers(*values: float) -> list[Measurement]:
        targets = ("pope", "pope, random", "gqa")
        return [
            Measurement("answer_accuracy", value, low=value - 0.03, high=value + 0.03, n=9, unit="questions", target=t)
            for t, value in zip(targets, values, strict=True)
        ]

    one, two = (LoadedRun(name, answers(*v)) for name, v in (("a", (0.7, 0.1, 0.5)), ("b", (0.6, 0.9, 0.5))))
    assert verdict([one]) == (
        "a answers right: 70.0 % [67.0, 73.0] of pope (n = 9 questions), 50.0 % [47.0, 53.0] of gqa (n = 9 questions)."
    )
    assert verdict([one, two]) == (
        "b against a: answers to pope are worse, −10.0 points [−14.2, −5.8]; no difference can be told for answers to "
        "gqa."
    )


def test_answers_are_part_of_the_verdict() -> None:
    def answers(value: float) -> Measurement:
        return Measurement("answer_accuracy", value, low=value - 0.03, high=value + 0.04, unit="questions")

    text = verdict([run("a", [answers(0.70)]), run("b", [answers(0.60)])])
    assert text == "At the middle layer (4 of 8), b against a: answers are worse, −10.0 points [−15.0, −5.0]."


def test_each_run_is_read_at_its_own_middle() -> None:
    base = run("deep", [probe(0.8, 0.01, layer=16), probe(0.1, 0.01, layer=4)], depth=32)
    other = run("flat", [probe(0.9, 0.01, layer=4), probe(0.1, 0.01, layer=16)], depth=8)
    assert "texture +10.0 points" in verdict([base, other])


def test_one_run_that_loses_and_gains() -> None:
    rows = [
        Measurement("probe_drop", 0.2, layer=4, low=0.1, high=0.3, target="texture"),
        Measurement("probe_drop", -0.5, layer=4, low=-0.6, high=-0.4, target="shape"),
        gap(0.9, 0.03, layer=0),
        gap(0.5, 0.04),
    ]
    assert verdict([run("baseline", rows)]) == (
        "By the middle layer (4 of 8) of baseline, linear probes read less than at the input of what no question "
        "asks about (texture −20.0 % [−30.0, −10.0]) and more of what questions ask about (shape +50.0 % "
        "[40.0, 60.0]); the centred gap between patches narrows from 0.900 to 0.500, −0.400 [−0.450, −0.350]."
    )


def test_one_run_where_nothing_can_be_told() -> None:
    rows = [Measurement("probe_drop", 0.02, layer=4, low=-0.03, high=0.07, target="texture")]
    assert verdict([run("baseline", rows)]) == (
        "No change can be told by the middle layer (4 of 8) of baseline: every 95 % interval contains zero "
        "(texture −2.0 % [−7.0, 3.0])."
    )


def test_a_drop_that_is_not_defined_says_why() -> None:
    rows = [Measurement("probe_drop", None, layer=4, target="texture", note="layer 0 is not above chance")]
    assert verdict([run("x", rows)]) == (
        "Nothing can be said by the middle layer (4 of 8) of x: layer 0 is not above chance."
    )
    several = [dataclasses.replace(rows[0], target=target) for target in ("texture", "shape", "colour")]
    assert verdict([run("x", several)]).endswith(" of x: texture: layer 0 is not above chance; nor of 2 more.")
    assert "hold no probe drop, patch gap or fidelity at layer 0 and there" in verdict([run("x", [])])
    assert "share no probe, gap, fidelity or answer rows" in verdict([run("x", []), run("y", [])])


def test_a_drop_without_an_interval_is_not_said_to_contain_zero() -> None:
    rows = [Measurement("probe_drop", 0.25, layer=4, target="texture", note="no interval: few images")]
    assert verdict([run("x", rows)]) == (
        "No change can be told by the middle layer (4 of 8) of x: no 95 % interval leaves zero out "
        "(texture −25.0 %, no interval: few images)."
    )


def test_pictures_without_labels_and_masks_are_judged_by_fidelity() -> None:
    def fidelity(value: float, layer: int = 4) -> Measurement:
        return Measurement("fidelity", value, layer=layer, low=value - 0.03, high=value + 0.04)

    nothing = Measurement("probe_accuracy", None, note="no labels: pictures in one flat folder have no classes")
    one = run("a", [nothing, fidelity(0.9, 0), fidelity(0.6)])
    assert verdict([one]) == (
        "By the middle layer (4 of 8) of a, fidelity to the encoder's output falls from 0.900 to 0.600, "
        "−0.300 [−0.350, −0.250]."
    )
    assert verdict([one, run("b", [nothing, fidelity(0.8)])]) == (
        "At the middle layer (4 of 8), b against a: fidelity to the encoder's output is higher, +0.200 [0.150, 0.250]."
    )
    drop = Measurement("probe_drop", None, layer=4, target="texture", note="layer 0 is not above chance")
    assert verdict([run("a", [*one.rows, drop])]).endswith("[−0.350, −0.250]; nothing can be said of texture.")
    assert "fidelity" not in verdict([run("a", [*one.rows, gap(0.9, 0.03, layer=0), gap(0.5, 0.04)])])
    assert "fidelity" not in verdict([run("a", [*one.rows, gap(0.5, 0.04)]), run("b", [fidelity(0.8), gap(0.6, 0.04)])])


def test_where_nothing_was_measured_the_rows_say_why() -> None:
    labels = Measurement("probe_accuracy", None, note="no labels: pictures in one flat folder have no classes")
    masks = Measurement("gap", None, variant="raw", note="no masks were given")
    few = Measurement("fidelity", None, note="3 images are too few to train, tune and score on")
    assert verdict([run("x", [few, masks, labels])]) == (
        "Nothing can be said by the middle layer (4 of 8) of x: no labels: pictures in one flat folder have no "
        "classes; no masks were given; 3 images are too few to train, tune and score on."
    )


def test_sinks_that_decide_otherwise_are_said() -> None:
    base = [gap(0.50, 0.03), gap(0.50, 0.03, tokens="without sinks")]
    pre = [gap(0.60, 0.04), gap(0.51, 0.04, tokens="without sinks")]
    text = verdict([run("a", base), run("b", pre)])
    assert "is wider, +0.100 [0.050, 0.150], without sinks +0.010 [−0.040, 0.060]" in text
    text = verdict([run("a", [*base[1:], gap(0.5, 0.03)]), run("b", [pre[0], gap(0.6, 0.04, tokens="without sinks")])])
    assert "without sinks" not in text  # both decide alike


def test_sinks_that_decide_otherwise_of_a_probe_are_said() -> None:
    bare = {"tokens": "without sinks"}
    base, pre = [probe(0.5, 0.01), probe(0.8, 0.01, **bare)], [probe(0.9, 0.01), probe(0.8, 0.01, **bare)]
    text = verdict([run("a", base), run("b", pre)])
    assert "(texture +40.0 points [38.6, 41.4], without sinks 0.0 points [−1.4, 1.4])" in text
    assert "without sinks" not in verdict([run("a", base), run("b", [pre[0], probe(0.9, 0.01, **bare)])])

    where = {"layer": 4, "target": "texture"}
    lost = Measurement("probe_drop", 0.2, low=0.1, high=0.3, **where)
    kept = Measurement("probe_drop", 0.01, low=-0.1, high=0.12, **where, **bare)
    hidden = Measurement("probe_drop", None, note="layer 0 is not above chance", **where)
    assert "(texture −20.0 % [−30.0, −10.0], without sinks −1.0 % [−12.0, 10.0])" in verdict([run("a", [lost, kept])])
    assert "without sinks" not in verdict([run("a", [lost, dataclasses.replace(lost, **bare)])])
    assert "not above chance; without sinks −20.0 %" in verdict([run("a", [hidden, dataclasses.replace(lost, **bare)])])
    assert "without sinks layer 0 is not above" in verdict([run("a", [lost, dataclasses.replace(hidden, **bare)])])


@pytest.mark.parametrize(
    ("info", "illustration", "ends"),
    [({"seed": 0}, False, True), ({"seeds": [0, 1, 2]}, False, False), ({}, False, False), ({}, True, True)],
)
def test_one_seed_is_called_an_illustration(info: dict[str, Any], illustration: bool, ends: bool) -> None:
    pair = [run("a", [gap(0.5, 0.01)], **info), run("b", [gap(0.7, 0.01)], **info)]
    text = verdict(pair, illustration=illustration)
    assert text.endswith("; one seed: an illustration") is ends
    assert text.endswith(".") is not ends


def test_the_seed_of_a_single_diagnosis_is_no_illustration() -> None:
    rows = [gap(0.9, 0.03, layer=0), gap(0.5, 0.04)]
    assert verdict([run("x", rows, seed=0)]).endswith("].")
    assert verdict([run("x", rows, seeds=[0])]).endswith("one seed: an illustration")


def test_several_runs_are_each_compared_with_the_first() -> None:
    runs = [run(label, [gap(value, 0.01)]) for label, value in (("a", 0.5), ("b", 0.6), ("c", 0.7))]
    text = verdict(runs)
    assert "b against a: the centred gap between patches is wider, +0.100" in text
    assert "c against a: the centred gap between patches is wider, +0.200" in text


def test_two_rows_for_one_number_are_refused() -> None:
    with pytest.raises(ValueError, match=r"run 'a' holds two rows for .*gap.* at layer 4, with seeds 1 and 2"):
        verdict([run("a", [gap(0.5, 0.1, seed=1), gap(0.6, 0.1, seed=2)])])
    with pytest.raises(ValueError, match="needs at least one run"):
        verdict([])


def test_a_number_that_rounds_to_zero_has_no_minus() -> None:
    base = run("a", [probe(0.80001, 0.03)])
    pre = run("b", [probe(0.80000, 0.04)])
    assert "texture 0.0 points" in verdict([base, pre])


def test_ends_that_round_to_zero_have_no_minus() -> None:
    base, pre = (run(label, [gap(value, 0.0002)]) for label, value in (("a", 0.5), ("b", 0.5)))
    assert "gap 0.000 [0.000, 0.000]" in verdict([base, pre])
