"""Indexed runs → the finished page, and the same table as Markdown."""

import re
from collections.abc import Sequence
from importlib import resources
from itertools import groupby

import jinja2
import plotly.offline
from markupsafe import Markup

from keepsight.report.attribution import attribution
from keepsight.report.benchmarks import paper_blocks
from keepsight.report.changed import changed
from keepsight.report.curves import Run, apart
from keepsight.report.evidence import answer_block, evidence
from keepsight.report.explorer import gather
from keepsight.report.metrics import write_interval, write_number, write_sample
from keepsight.report.pruned import draw_sections
from keepsight.report.tables import Line, answers, csv_of_lines, others, said, summary

COLOURS = 6  # in report.css; further runs start again from the first


def render(opened: Sequence[Run], title: str, verdict: str) -> str:
    """The page as one string of HTML that needs nothing else."""
    runs, attributions = apart(opened)
    paid = attribution(attributions, len(runs))
    everyone = [*runs, *attributions]
    sections = draw_sections(runs)
    shown, words = gather(runs)
    data = {
        "runs": [{"label": run.label, "preLayer": run.pre_layer, "depth": run.depth} for run in everyone],
        "panels": {panel.id: panel.data for section in sections for panel in section.panels}
        | (paid.panels if paid else {}),
        "attribution": paid.data if paid else None,
        "pictures": [
            {"objects": item.picture.objects, "maps": {run: each.info for run, each in item.maps.items()}}
            for item in shown
        ],
        "words": words,
    }
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, loader=jinja2.FunctionLoader(_asset)
    )
    environment.filters["number"] = lambda row: write_number(row.metric, row.value)
    environment.filters["interval"] = lambda row: write_interval(row.metric, row.low, row.high)
    environment.filters["sample"] = write_sample
    environment.tests["search"] = lambda text, part: part in text
    template = environment.get_template("report.html.j2")
    return template.render(
        title=title,
        verdict=verdict,
        paired=all(run.loaded.per_image is not None for run in runs),
        runs=runs,
        everyone=everyone,
        paid=paid,
        colours=COLOURS,
        evidence=evidence(runs) if runs else [],
        notes=list(dict.fromkeys(note for run in everyone if (note := run.loaded.info.get("note")))),
        sections=sections,
        summary=[(title, list(lines)) for title, lines in groupby(summary(runs), key=lambda line: line.title)],
        table_csv=csv_of_lines(runs),
        answers=answer_block(runs),
        changed=changed(runs),
        prior=any(run.select("answer_prior") for run in runs),
        benchmarks=paper_blocks(runs),
        said=said(runs),
        shown=shown,
        explored=any(item.maps for item in shown),
        outlined=any(item.picture.outline for item in shown),
        unmapped=sum(not item.maps for item in shown) if any(item.maps for item in shown) else 0,
        others=others(runs),
        facts=[_facts(run) for run in everyone],
        data=data,
        # The page's own files and Plotly's, never anything that came with a run.
        style=Markup(_asset("report.css")),
        theme=Markup(_asset("theme.js")),
        script=Markup(_asset("report.js")),
        scatter=Markup(_asset("attribution.js")),
        explorer=Markup(_asset("explorer.js")),
        plotly=Markup(plotly.offline.get_plotlyjs()),
    )


def _asset(name: str) -> str:
    return (resources.files("keepsight.report") / "assets" / name).read_text(encoding="utf-8")


def _facts(run: Run) -> list[tuple[str, str]]:
    """What is known of a run, in the order of run.json, as (name, text)."""
    info = run.loaded.info
    model = info.get("model") or {}
    versions = info.get("versions") or {}
    known = {
        "model": model.get("name"),
        "weights": model.get("fingerprint"),
        "layers × width": " × ".join(str(info[key]) for key in ("depth", "width") if info.get(key) is not None),
        "PRe at layer": info.get("pre_layer"),
        "visual tokens kept": info.get("pruning"),
        "seed": ", ".join(str(seed) for seed in run.loaded.seeds),
        "prompt": info.get("prompt"),
        "prompt SHA-256": (info.get("prompt_sha256") or "")[:16],
        "created": info.get("created"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        **(info.get("counts") or {}),
    }
    return [(name, str(value)) for name, value in known.items() if value not in (None, "")]


def render_markdown(opened: Sequence[Run], title: str, verdict: str) -> str:
    """The verdict and the summary table as Markdown, that of attributions apart."""
    tables = "\n\n".join(_markdown_table(runs) for runs in apart(opened) if runs)
    return f"# {_plain(title)}\n\n> {_plain(verdict)}\n\n{tables}\n"


def _markdown_table(runs: Sequence[Run]) -> str:
    names = [_plain(run.label) for run in runs]
    several = len(runs) > 2
    differences = [f"{name} − {names[0]}" if several else "difference" for name in names[1:]]
    header = ["measure", "layer", *names, *differences, "n, seed"]
    rows = [_markdown_row(line) for line in [*summary(runs), *answers(runs)]]
    lines = [" | ".join(header), " | ".join(["---"] * len(header)), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def _markdown_row(line: Line) -> list[str]:
    title = f"{line.title} ({line.group})" if line.group else line.title
    cells = [f"{cell.value} {cell.interval}".strip() for cell in line.values]
    for cell in line.differences:
        text = f"{cell.value} {cell.interval}".strip()
        cells.append(f"**{_plain(text)}**" if cell.told else _plain(text))
    values = [_plain(text) for text in cells[: len(line.values)]]
    return [_plain(title), line.place, *values, *cells[len(line.values) :], _plain(line.sample)]


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(text.split()))
