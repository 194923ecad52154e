"""The page of an attribution: skill against what a layer still tells, and r by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Protocol

from plotly.subplots import make_subplots

from keepsight.results import Measurement, write_file


class Point(Protocol):
    """A model on the way."""

    @property
    def name(self) -> str: ...

    @property
    def rows(self) -> Sequence[Measurement]: ...

    @property
    def skill(self) -> float | None: ...


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A7A7A")  # Okabe and Ito 2008


def draw(trainings: Mapping[str, Sequence[Point]], rows: Sequence[Measurement], middle: int, out: Path) -> Path:
    """Write one HTML file that opens offline: on the left a scatter for each training and target, with a slider over
    layers; on the right r by layer, with its interval where there are several trainings.

    Raises:
        StorageError: if it cannot be written.
    """
    targets = list(dict.fromkeys(row.target for row in rows))
    layers = sorted({row.layer for row in rows if row.layer is not None})
    figure = make_subplots(
        cols=2,
        subplot_titles=("Skill against what the layer tells, over training", "r by layer"),
        column_widths=[0.55, 0.45],
    )
    for layer in layers:
        for number, target in enumerate(targets):
            for training, points in trainings.items():
                pairs = [(_value(point, target, layer), point.skill, point.name) for point in points]
                figure.add_scatter(
                    x=[x for x, _, _ in pairs],
                    y=[y for _, y, _ in pairs],
                    text=[f"{escape(training)}, {escape(name)}" for _, _, name in pairs],
                    mode="lines+markers",
                    marker={"size": [6 + 8 * i / max(1, len(pairs) - 1) for i in range(len(pairs))]},
                    line={"color": COLOURS[number % len(COLOURS)], "width": 1},
                    name=escape(target),
                    legendgroup=target,
                    showlegend=training == next(iter(trainings)),
                    visible=layer == middle,
                    hovertemplate="%{text}<br>%{x:.3f}, skill %{y:.3f}",
                    row=1,
                    col=1,
                )
    per_layer = len(targets) * len(trainings)
    scattered = per_layer * len(layers)
    for number, target in enumerate(targets):
        curve = sorted((r for r in rows if r.target == target and r.layer is not None), key=lambda r: r.layer or 0)
        known = [row for row in curve if row.value is not None]
        figure.add_scatter(
            x=[row.layer for row in known],
            y=[row.value for row in known],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [_distance(row, row.high) for row in known],
                "arrayminus": [_distance(row, row.low) for row in known],
                "thickness": 1,
            },
            text=[f"{row.n} {row.unit}" for row in known],
            name=escape(target),
            legendgroup=target,
            showlegend=False,
            line={"color": COLOURS[number % len(COLOURS)]},
            hovertemplate="layer %{x}: r %{y:.2f}, %{text}",
            row=1,
            col=2,
        )
    steps = [
        {
            "label": str(layer),
            "method": "update",
            "args": [{"visible": [i // per_layer == place for i in range(scattered)] + [True] * len(targets)}],
        }
        for place, layer in enumerate(layers)
    ]
    active = layers.index(middle) if middle in layers else 0
    slider = {"steps": steps, "active": active, "currentvalue": {"prefix": "layer "}, "len": 0.5, "pad": {"t": 60}}
    figure.update_layout(
        template="plotly_white",
        font={"family": "system-ui, sans-serif"},
        sliders=[slider],
        height=560,
        margin={"t": 60},
        title="What the model pays for its skill",
    )
    figure.update_xaxes(title_text="probe accuracy, fidelity", row=1, col=1)
    figure.update_yaxes(title_text="questions answered right", row=1, col=1)
    figure.update_xaxes(title_text="layer", row=1, col=2)
    figure.update_yaxes(title_text="Pearson's r", range=[-1.05, 1.05], row=1, col=2)
    figure.add_hline(y=0, line_width=1, line_color="#999999", row=1, col=2)
    page = figure.to_html(include_plotlyjs=True, full_html=True, config={"displaylogo": False, "responsive": True})
    return write_file(out, page)


def _distance(row: Measurement, end: float | None) -> float:
    return 0.0 if end is None or row.value is None else abs(end - row.value)


def _value(point: Point, target: str, layer: int) -> float | None:
    for row in point.rows:
        if row.layer == layer and not row.variant and row.tokens == "all":
            name = "fidelity" if row.metric == "fidelity" else row.target if row.metric == "probe_accuracy" else None
            if name == target:
                return row.value
    return None
