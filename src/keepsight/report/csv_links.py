"""CSV files inside the page, as data URIs, so that it needs no other file."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any
from urllib.parse import quote

from keepsight.report.curves import Run, Series
from keepsight.results import Measurement


def csv_of(runs: Sequence[Run], series: Sequence[Series]) -> str:
    """All rows of these series, all that is known of each."""
    return csv_of_rows((run, row) for run in runs for item in series for row in run.curves.get(item, {}).values())


def csv_of_rows(rows: Iterable[tuple[Run, Measurement]]) -> str:
    """The same of these rows."""
    columns = ["run", *Measurement.__dataclass_fields__]
    return csv_uri(columns, ({"run": run.label, **asdict(row)} for run, row in rows))


def csv_uri(columns: Sequence[str], lines: Iterable[Mapping[str, Any]]) -> str:
    """A file with these columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return "data:text/csv;charset=utf-8," + quote(text.getvalue())
