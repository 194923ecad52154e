"""One sentence that says what the numbers show, also when they show nothing."""

from collections.abc import Sequence

from keepsight.report.curves import Run, Series, apart, open_runs
from keepsight.report.findings import Finding, between, tasks_of, within
from keepsight.report.metrics import ASKED, NEVER_ASKED, write_interval, write_number, write_sample
from keepsight.report.trend import sentence as trend
from keepsight.results import LoadedRun, RunDirectory

ILLUSTRATION = "one seed: an illustration"

_GROUP_WORDS = {NEVER_ASKED: "what no question asks about", ASKED: "what questions ask about"}
# What is said of a metric whose two ends are told, and that it falls or rises.
_VERBS = {
    "gap": ("the {} between patches", "narrows", "widens"),
    "fidelity": ("fidelity to the encoder's output", "falls", "rises"),
}
_LISTED = 4  # numbers in one bracket; the rest are counted


def verdict(runs: Sequence[RunDirectory | LoadedRun], *, illustration: bool = False) -> str:
    """What the numbers show, in one sentence that can be quoted.

    For one run: what linear probes lost from layer 0 to the middle layer, and how the patch gap changed; without
    labels and masks, fidelity. For several: how each differs from the first at the middle layer. A difference counts
    as told when its 95 % interval leaves zero out; where none does, the sentence says so. Runs that are compared on one
    seed each are called an illustration, as is any run when `illustration` is set or its run.json lists one seed.
    Attributions are spoken of where there is nothing else: how their r at the middle layer stands to zero.

    Raises:
        ValueError: if `runs` is empty, or if one holds two rows for the same number.
    """
    return sentence(open_runs(runs), illustration=illustration)


def sentence(runs: Sequence[Run], *, illustration: bool = False) -> str:
    """`verdict` for runs that are already indexed."""
    runs, attributions = apart(runs)
    if not runs:
        return trend(attributions)
    text = _one(runs[0]) if len(runs) == 1 else "; ".join(_two(runs[0], other) for other in runs[1:])
    if illustration or _single_seed(runs):
        return f"{text}; {ILLUSTRATION}"
    return f"{text}."


def _single_seed(runs: Sequence[Run]) -> bool:
    if len(runs) == 1:  # the model itself is the subject there, and its seed is only that of the probes' split
        return len(runs[0].loaded.info.get("seeds") or ()) == 1
    return any(len(run.loaded.seeds) == 1 for run in runs)


def _one(run: Run) -> str:
    found = within(run)
    valued = [finding for finding in found if finding.value is not None]
    place = f"by the middle layer ({run.middle} of {run.depth}) of {run.label}"
    if not found and not run.depth and (texts := _answered(run)):
        return f"{run.label} answers right: {', '.join(texts)}"
    if not valued:
        reason = _nothing(found) if found else _lacking(run)
        return f"Nothing can be said {place}: {reason}"
    told = [finding for finding in valued if finding.told]
    if not told:
        return f"No change can be told {place}: {_no_interval(valued)} ({_listed(valued)})"
    probes = [finding for finding in told if finding.metric == "probe_drop"]
    parts = []
    lost = _grouped([finding for finding in probes if (finding.value or 0) < 0])
    gained = _grouped([finding for finding in probes if (finding.value or 0) > 0])
    changes = [f"less than at the input {lost}"] if lost else []
    changes += [f"more {gained}" if lost else f"more than at the input {gained}"] if gained else []
    if changes:
        parts.append("linear probes read " + " and ".join(changes))
    for finding in told:
        if finding.metric not in _VERBS:
            continue
        ends = [write_number(finding.metric, row.value) for row in (finding.before, finding.after) if row]
        what, *verbs = _VERBS[finding.metric]
        verb = verbs[(finding.value or 0) > 0]
        parts.append(f"{what.format(finding.label)} {verb} from {ends[0]} to {ends[1]}, {_number(finding)}")
    parts += _undecided(valued, "no change")
    if lacking := [finding.label for finding in found if finding.value is None]:
        more = [f"{len(lacking) - _LISTED} more"] if len(lacking) > _LISTED else []
        parts.append(f"nothing can be said of {', '.join(lacking[:_LISTED] + more)}")
    return f"B{place[1:]}, " + "; ".join(parts)


def _answered(run: Run) -> list[str]:
    """ "45.1 % [30.6, 59.6] of pope (n = 51 questions)" for each task of a run that holds nothing but answers."""
    found = [(target, run.at(Series("answer_accuracy", target), None)) for target in tasks_of(run)]
    return [
        f"{write_number(row.metric, row.value)} {write_interval(row.metric, row.low, row.high)}".rstrip()
        + (f" of {target}" if target else "")
        + f" ({write_sample(row)})"
        for target, row in found
        if row
    ]


def _two(base: Run, other: Run) -> str:
    found = between(base, other)
    # Runs that hold nothing but answers have no layers.
    layer = f" at the middle layer ({other.middle} of {other.depth})" if other.depth else ""
    if not found:
        shared = "they share no probe, gap, fidelity or answer rows"
        return f"Nothing can be said of {other.label} against {base.label}{layer}: {shared}"
    told = [finding for finding in found if finding.told]
    if not told:
        return (
            f"No difference can be told between {other.label} and {base.label}{layer}: {_no_interval(found)} "
            f"({_listed(found)})"
        )
    probes = [finding for finding in told if finding.metric == "probe_accuracy"]
    parts = []
    if more := _grouped([finding for finding in probes if (finding.value or 0) > 0]):
        parts.append(f"more can be read {more}")
    if less := _grouped([finding for finding in probes if (finding.value or 0) < 0]):
        parts.append(f"less can be read {less}")
    for finding in told:
        up = (finding.value or 0) > 0
        if finding.metric == "gap":
            parts.append(f"the {finding.label} between patches is {'wider' if up else 'narrower'}, {_number(finding)}")
        elif finding.metric == "fidelity":
            text = f"fidelity to the encoder's output is {'higher' if up else 'lower'}"
            parts.append(f"{text}, {_number(finding)}")
        elif finding.metric == "answer_accuracy":
            parts.append(f"{finding.label} are {'better' if up else 'worse'}, {_number(finding)}")
    parts += _undecided(found, "no difference")
    start = f"A{layer[2:]}, {other.label}" if layer else other.label
    return f"{start} against {base.label}: " + "; ".join(parts)


def _grouped(found: Sequence[Finding]) -> str:
    """ "of what no question asks about (texture ...) and of what questions ask about (shape ...)" """
    groups = list(dict.fromkeys(finding.group for finding in found))
    texts = []
    for group in groups:
        members = _listed([finding for finding in found if finding.group == group])
        words = _GROUP_WORDS.get(group)
        texts.append(f"of {words} ({members})" if words else f"({members})")
    return " and ".join(texts)


def _undecided(found: Sequence[Finding], nothing: str) -> list[str]:
    rest = [finding for finding in found if not finding.told and finding.value is not None]
    labels = [f"{finding.label} ({finding.caveat})" if finding.caveat else finding.label for finding in rest]
    names = " and ".join(filter(None, [", ".join(labels[:-1]), *labels[-1:]]))
    return [f"{nothing} can be told for {names}"] if rest else []


def _nothing(found: Sequence[Finding]) -> str:
    """Why no finding has a value: the first one's reason, with what it is of where there are several."""
    if len(found) == 1:
        return found[0].text
    return f"{found[0].label}: {found[0].text}; nor of {len(found) - 1} more"


def _lacking(run: Run) -> str:
    """Why there is nothing to find, as the rows that stand for whole metrics tell it."""
    rows = [run.at(series, None) for metric in ("probe_accuracy", "gap", "fidelity") for series in run.select(metric)]
    notes = dict.fromkeys(row.note for row in rows if row and row.value is None)
    return "; ".join(notes) or "its rows hold no probe drop, patch gap or fidelity at layer 0 and there"


def _no_interval(found: Sequence[Finding]) -> str:
    """Why none of these is told; a number without an interval has none that could contain zero."""
    every = all(finding.low is not None and finding.high is not None for finding in found)
    return "every 95 % interval contains zero" if every else "no 95 % interval leaves zero out"


def _listed(found: Sequence[Finding]) -> str:
    texts = [f"{finding.label} {_number(finding)}" for finding in found[:_LISTED]]
    if len(found) > _LISTED:
        texts.append(f"{len(found) - _LISTED} more")
    return ", ".join(texts)


def _number(finding: Finding) -> str:
    return f"{finding.text}, {finding.caveat}" if finding.caveat else finding.text
