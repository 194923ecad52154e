"""The page's curves as Matplotlib figures, for papers. Needs Matplotlib (`pip install "keepsight[figures]"`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from keepsight.report.curves import Run, apart, open_runs
from keepsight.report.metrics import ATTRIBUTION
from keepsight.report.panels import LAYER, Panel, draw_section
from keepsight.report.pruned import draw_sections
from keepsight.results import LoadedRun, RunDirectory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = 3.4, 2.5  # inches: a column of a two-column paper
INKS = ("#5a6b80", "#c4501b", "#1f7a63", "#7a4aa0", "#94700c", "#b03468")  # as in report.css, on white
FAINT = "#8b867c"
LINES = {"dot": ":", "dashdot": "-.", "longdash": (0, (6, 3))}
MARKERS = ("o", "D", "s")


def figures(
    runs: Sequence[RunDirectory | LoadedRun],
    *,
    metrics: Sequence[str] | None = None,
    variant: str | None = None,
    tokens: str = "all",
) -> dict[str, Figure]:
    """Every curve that a report of `runs` shows: metric, or "metric, target", → a Matplotlib figure.

    By layer or, under pruning, by the share of visual tokens kept. Runs are overlaid (attributions, as r by layer,
    among themselves), with their 95 % intervals, their controls thin, chance dashed, and the layer of PRe marked.
    The figures are no part of pyplot and need no closing: `figures(runs)["gap"].savefig("gap.pdf")`.

    Args:
        metrics: only these, such as ["gap", "fidelity"].
        variant, tokens: such as "raw" and "without sinks"; where a metric has no such variant, its own first one.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: there are no runs, one holds two rows for the same number, or a metric of `metrics` has no curve.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as cause:
        raise ImportError('figures need Matplotlib; it is not installed: pip install "keepsight[figures]"') from cause
    opened = open_runs(runs)
    models, attributions = apart(opened)
    paid = draw_section(attributions, ATTRIBUTION)
    panels = [(panel, models) for section in draw_sections(models) for panel in section.panels]
    panels += [(panel, attributions) for panel in (paid.panels if paid else [])]
    known = list(dict.fromkeys(panel.metric for panel, _ in panels))
    if unknown := [name for name in metrics or () if name not in known]:
        raise ValueError(f"no run has a curve of {unknown[0]!r}; there are curves of {', '.join(known) or 'nothing'}")
    found = {}
    for panel, shown in panels:
        if metrics is None or panel.metric in metrics:
            figure = Figure(figsize=SIZE, layout="constrained")
            _draw(figure.add_subplot(), shown, panel, _view(panel, variant, tokens))
            found[f"{panel.metric}, {panel.target}" if panel.target else panel.metric] = figure
    return found


def _view(panel: Panel, variant: str | None, tokens: str) -> dict[str, Any]:
    """As the page's selectors choose it: tokens weigh more than the variant."""
    return max(panel.views, key=lambda view: 2 * (view["tokens"] == tokens) + (view["variant"] == variant))


def _draw(axes: Any, runs: Sequence[Run], panel: Panel, view: dict[str, Any]) -> None:
    scale = 100 if panel.percent else 1

    def scaled(values: Sequence[float | None]) -> list[float]:
        return [float("nan") if value is None else scale * value for value in values]

    for line in view["lines"]:
        number = line["run"]
        ink, marker = INKS[number % len(INKS)], MARKERS[number % len(MARKERS)]
        if line["role"] == "chance":
            axes.plot(line["x"], scaled(line["y"]), color=FAINT, lw=0.8, ls="--")
        elif line["role"] == "control":
            axes.plot(line["x"], scaled(line["y"]), color=ink, lw=0.8, ls=LINES[line["dash"]], alpha=0.7)
        else:
            axes.fill_between(line["x"], scaled(line["low"]), scaled(line["high"]), color=ink, alpha=0.15, lw=0)
            axes.plot(line["x"], scaled(line["y"]), color=ink, lw=1.4, marker=marker, ms=3, label=runs[number].label)
    marked = runs if panel.axis == LAYER else []
    for layer in dict.fromkeys(run.pre_layer for run in marked if run.pre_layer is not None):
        number = next(number for number, run in enumerate(runs) if run.pre_layer == layer)
        axes.axvline(layer, color=INKS[number % len(INKS)], lw=0.8, ls=":")
        axes.annotate("PRe", (layer, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=7)
    details = [view["variant"], "" if view["tokens"] == "all" else view["tokens"]]
    label = ", ".join(filter(None, [panel.title, *details])) + (" (%)" if panel.percent else "")
    axes.set_ylabel(label, fontsize=8, parse_math=False)  # names from a run are no formulas
    axes.set_xlabel(panel.axis, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(runs) > 1:
        for text in axes.legend(fontsize=7, frameon=False).get_texts():
            text.set_parse_math(False)
