"""The paper's benchmarks of a run beside the paper's figures, as `keepsight evaluate` left them in run.json."""

from collections.abc import Mapping, Sequence
from typing import Any

from keepsight.report.curves import Run


def paper_lines(facts: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """(benchmark, value here, its interval, the paper's value, note), all as text; "" for what is not there."""
    found = []
    for line in facts["lines"]:
        ends = (line["low"], line["high"])
        here = "" if line["here"] is None else f"{line['here']:.1f}"
        interval = "" if None in ends else f"[{ends[0]:.1f}, {ends[1]:.1f}]"
        found.append(
            (line["benchmark"], here, interval, "" if line["paper"] is None else f"{line['paper']:g}", line["note"])
        )
    return found


def paper_blocks(runs: Sequence[Run]) -> list[tuple[int, str, str, list[tuple[str, str, str, str, str]], list[str]]]:
    """(number, label, the paper's configuration or "", lines, what to know) of the runs that have any."""
    return [
        (number, run.label, facts["configuration"] or "", paper_lines(facts), facts["about"])
        for number, run in enumerate(runs)
        if (facts := run.loaded.info.get("paper")) and facts["lines"]
    ]
