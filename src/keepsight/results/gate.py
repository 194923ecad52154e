"""`--fail-if "probe_drop > 0.1"`: conditions in a fixed grammar, judged on intervals.

    [delta] METRIC [TARGET] [@LAYER] OPERATOR NUMBER

`delta`: the difference from the first run instead of the run's own number. TARGET in square brackets: one label set or
question type, `probe_drop[texture]`; without it every one is judged, and one is enough. @LAYER: a number, `middle` or
`last`; without it the layer that the metric is reported at, or the middle. Nothing is ever evaluated as code.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from keepsight.results.intervals import Estimate

_GRAMMAR = re.compile(
    r"\s*(?P<delta>delta\s+)?(?P<metric>[A-Za-z_]\w*)\s*(?:\[(?P<target>[^\]]*)\])?\s*(?:@\s*(?P<layer>\w+))?"
    r"\s*(?P<sign><=|>=|<|>)\s*(?P<number>[-+−]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*"
)
_SIGNS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
MET, NOT_MET, OPEN = "met", "not met", "open"


@dataclass(frozen=True)
class Condition:
    """What must not be: see the module's grammar.

    layer: an index, "middle", "last", or None for the layer that the metric is reported at.
    """

    metric: str
    sign: str
    number: float
    target: str | None = None
    layer: int | str | None = None
    delta: bool = False

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Read a condition.

        Raises:
            ValueError: if the text does not follow the grammar.
        """
        match = _GRAMMAR.fullmatch(text)
        layer = match and match["layer"]
        if match is None or (layer and not layer.isdigit() and layer not in ("middle", "last")):
            raise ValueError(
                f"the condition {text!r} cannot be read; write METRIC OPERATOR NUMBER, such as 'probe_drop > 0.1', "
                "'probe_drop[texture] > 0.1', 'gap@16 < 0.05' or 'delta gap < -0.02'. Operators: <, <=, >, >=; layers: "
                "a number, middle or last; delta: the difference from the first run"
            )
        number = float(match["number"].replace("−", "-"))
        place = int(layer) if layer and layer.isdigit() else layer
        return cls(match["metric"], match["sign"], number, match["target"], place, bool(match["delta"]))

    def judge(self, found: Estimate) -> str:
        """MET where the whole interval fulfils the condition, NOT_MET where none of it does, OPEN between the two.

        A number without an interval is OPEN: its point alone decides nothing.
        """
        if found.value is None or found.low is None or found.high is None:
            return OPEN
        holds = [_SIGNS[self.sign](end, self.number) for end in (found.low, found.high)]
        return MET if all(holds) else OPEN if any(holds) else NOT_MET


def verdict(judgements: Sequence[str]) -> str:
    """Of a condition judged on several numbers: met where one of them meets it."""
    return MET if MET in judgements else OPEN if OPEN in judgements else NOT_MET
