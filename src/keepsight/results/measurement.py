"""One number with everything that is needed to read it, and files of such numbers, one a line."""

import json
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from keepsight.results.storage import write_file


class Key(NamedTuple):
    """What a number is of; a run holds one number of each."""

    metric: str
    target: str = ""
    variant: str = ""
    tokens: str = "all"
    layer: int | None = None


@dataclass(frozen=True)
class Measurement:
    """One number of a diagnosis or an evaluation.

    A value that is not finite is not a measurement: it becomes None and the note says what it was. Array and
    tensor scalars are accepted and stored as plain numbers.

    Raises:
        ValueError: if `metric` is empty, or if `value` is None and no `note` says why.
    """

    metric: str
    value: float | None
    layer: int | None = None  # 0..L; None for a number of the whole model
    low: float | None = None  # 95 % interval
    high: float | None = None
    n: int | None = None  # sample size, in `unit`
    unit: str = "images"
    target: str = ""  # label set or question type; "" for all of them together
    variant: str = ""  # "raw", "centred", "covariance", "shuffled labels", ...
    tokens: str = "all"  # "all" or "without sinks"
    seed: int | None = None
    note: str = ""

    @property
    def key(self) -> Key:
        """What the number is of."""
        return Key(self.metric, self.target, self.variant, self.tokens, self.layer)

    def __post_init__(self) -> None:
        if not self.metric:
            raise ValueError("a Measurement needs a metric name, such as 'probe_accuracy'; got an empty one")
        given = self.value
        for name in ("value", "low", "high"):
            object.__setattr__(self, name, _finite(getattr(self, name)))
        for name in ("layer", "n", "seed"):
            number = getattr(self, name)
            object.__setattr__(self, name, None if number is None else int(number))
        if self.value is None and given is not None:
            reason = f"not a finite number: {float(given)}"
            object.__setattr__(self, "note", f"{self.note}; {reason}" if self.note else reason)
        if self.value is None and not self.note:
            raise ValueError(
                f"a Measurement of '{self.metric}' without a value needs a note that says why, for example "
                "note='no masks were given'"
            )


def _finite(number: Any) -> float | None:
    if number is None:
        return None
    number = float(number)
    return number if math.isfinite(number) else None


def _field_types() -> dict[str, tuple[type, ...]]:
    """JSON types that each field accepts; an int is a valid float."""
    accepted = {}
    for name, hint in typing.get_type_hints(Measurement).items():
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        accepted[name] = (*options, int) if float in options else options
    return accepted


_TYPES = _field_types()
_REQUIRED = ("metric", "value")


def write_rows(path: str | Path, rows: Iterable[Measurement]) -> Path:
    """Write `rows` to `path`, one JSON object a line, in one step: the file is whole or not there.

    Raises:
        StorageError: if the disk is full or the folder may not be written to; what was there before stays.
    """
    text = "".join(json.dumps(asdict(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    return write_file(path, text)


def read_rows(path: str | Path) -> list[Measurement]:
    """The rows of a file that `write_rows` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a line is cut off, has a field that is not known, or a value of the wrong type; the
            text names the file and the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no rows at '{path}': expected the rows.jsonl of a run; check the path")
    with path.open(encoding="utf-8") as file:
        return [_read_row(line, f"{path}:{number}") for number, line in enumerate(file, start=1) if line.strip()]


def _read_row(line: str, place: str) -> Measurement:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{place}: this line is not JSON ({error.msg}), the file was cut off or edited; write it again"
        ) from error
    return row_of(row, place)


def row_of(row: Any, place: str) -> Measurement:
    """The Measurement that a JSON value holds.

    Args:
        place: where it is from, for the error.

    Raises:
        ValueError: see `read_rows`.
    """
    if not isinstance(row, dict):
        raise ValueError(f'{place}: expected an object such as {{"metric": ...}}, got {json.dumps(row)[:60]}')
    known = [field.name for field in fields(Measurement)]
    if unknown := sorted(set(row) - set(known)):
        raise ValueError(
            f"{place}: unknown fields {unknown}; allowed are {known}. The rows may come from a newer "
            "keepsight: upgrade it, or write them again"
        )
    if missing := [name for name in _REQUIRED if name not in row]:
        raise ValueError(f"{place}: the fields {missing} are missing; every row has at least {list(_REQUIRED)}")
    for name, value in row.items():
        if isinstance(value, bool) or not isinstance(value, _TYPES[name]):
            wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in _TYPES[name])
            raise ValueError(f"{place}: field '{name}' is {json.dumps(value)}; allowed is {wanted}")
    try:
        return Measurement(**row)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
