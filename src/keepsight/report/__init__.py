"""Rows → one HTML file that opens offline, the same table in Markdown, and the verdict. Never touches a model."""

from collections.abc import Sequence
from pathlib import Path

from keepsight.report.curves import apart, open_runs
from keepsight.report.figures import figures
from keepsight.report.metrics import ATTRIBUTION
from keepsight.report.page import render, render_markdown
from keepsight.report.tables import table
from keepsight.report.verdict import sentence, verdict
from keepsight.results import LoadedRun, RunDirectory, make_folder, write_file

__all__ = ["build", "figures", "table", "verdict"]


def build(
    runs: Sequence[RunDirectory | LoadedRun],
    out: str | Path,
    title: str | None = None,
    *,
    illustration: bool = False,
) -> Path:
    """Write the report of `runs` to `out` (.html), and its table beside it with the suffix .md.

    Args:
        runs: of diagnoses, evaluations and attributions; the first is what others of its kind are compared with.
        title: a heading; "What the model still sees" unless given, or of attributions alone what they are about.
        illustration: call the verdict an illustration even where run.json does not list one seed.

    Raises:
        ValueError: if there are no runs, a run holds two rows for the same number, or `out` is not .html.
        StorageError: if the files cannot be written; nothing half-written is left.
    """
    out = Path(out)
    if out.suffix != ".html":
        raise ValueError(f"a report is one .html file; got '{out}'. Give a name that ends in .html")
    opened = open_runs(runs)
    text = sentence(opened, illustration=illustration)
    title = title or ("What the model still sees" if apart(opened)[0] else ATTRIBUTION.title)
    page = render(opened, title, text)
    make_folder(out.parent)
    write_file(out, page)
    write_file(out.with_suffix(".md"), render_markdown(opened, title, text))
    return out
