"""The page: one file, no network, what it holds and in which order, and strings that try to be markup."""

import csv
import dataclasses
import html
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from keepsight.report import build, verdict
from keepsight.report.curves import open_runs
from keepsight.report.metrics import SECTIONS
from keepsight.report.panels import draw_section
from keepsight.results import Example, LoadedRun, Measurement, RunDirectory, StorageError
from tests.report.sample import sample_run, with_spectra

HOSTILE = "</script><script>alert('x')</script><img src=x onerror=alert(1)>\"'{{7*7}} %{y} &amp;"


class Page(HTMLParser):
    """Tags, attributes and text of a page; the text of scripts apart."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts.append((self.tags[-1][1], data))
        elif self.cdata_elem is None:
            self.text.append(data)

    @property
    def data(self) -> dict[str, Any]:
        texts = [text for attributes, text in self.scripts if attributes.get("id") == "data"]
        return json.loads("".join(texts))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build([sample_run(0), sample_run(1)], tmp_path_factory.mktemp("report") / "deep" / "report.html")


@pytest.fixture(scope="module")
def page(built: Path) -> Page:
    return Page(built.read_text(encoding="utf-8"))


def hostile_run() -> LoadedRun:
    rows = [
        Measurement("probe_accuracy", 0.5, layer=layer, low=0.4, high=0.6, n=3, unit=HOSTILE, target=HOSTILE)
        for layer in range(3)
    ]
    rows += [
        Measurement("gap", None, layer=1, variant=HOSTILE, tokens=HOSTILE, note=HOSTILE),
        Measurement("answer_accuracy", 0.5, target=HOSTILE),
        Measurement("answer_accuracy", 0.5),
        Measurement(HOSTILE, 0.5, layer=1, note=HOSTILE),
    ]
    texts = dict.fromkeys(("command", "created", "prompt"), HOSTILE)
    info = {**texts, "model": {"name": HOSTILE}, "counts": {HOSTILE: 1}, "targets": {HOSTILE: HOSTILE}}
    mask = np.eye(4, dtype=np.uint8)
    return LoadedRun(HOSTILE, rows, info, HOSTILE, [Example(Image.new("RGB", (4, 4)), mask, HOSTILE, HOSTILE)])


def test_nothing_is_fetched(page: Page) -> None:
    """No element that loads anything, and a policy that forbids it to the scripts too."""
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe", "object", "embed", "base", "form")]
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action", "poster", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), value
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "http" not in policy


def test_the_order_is_verdict_curves_explorer_table_answers_origin(page: Page) -> None:
    sections = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    assert sections == [
        "verdict", "probes", "fidelity", "structure", "spectrum", "lens", "sinks", "explorer", "table", "answers",
        "origin",
    ]  # fmt: skip
    text = " ".join(page.text)
    assert verdict([sample_run(0), sample_run(1)]) in text
    assert text.index("Never asked about") < text.index("Asked about")
    assert "keepsight demo --seed 0" in text
    assert "torch 2.13.0" in text
    assert "n = 600 images, seed 0" in text


def test_curves_carry_the_rows(page: Page, base: LoadedRun) -> None:
    data = page.data
    assert data["runs"] == [
        {"label": "baseline", "preLayer": None, "depth": 8},
        {"label": "with PRe", "preLayer": 4, "depth": 8},
    ]
    panel = data["panels"]["probes-probe_accuracy-0"]
    assert [view["tokens"] for view in panel["views"]] == ["all", "without sinks"]
    for view in panel["views"]:
        assert [(line["run"], line["role"]) for line in view["lines"]] == [
            (0, "run"), (1, "run"), (0, "control"), (1, "control"), (0, "chance"),
        ]  # fmt: skip
        wanted = ("probe_accuracy", "texture", "", view["tokens"])
        rows = [r for r in base.rows if (r.metric, r.target, r.variant, r.tokens) == wanted]
        line = view["lines"][0]
        assert line["x"] == list(range(9))
        assert line["y"] == [row.value for row in rows]
        assert line["low"] == [row.low for row in rows]
        assert line["high"] == [row.high for row in rows]
        assert line["text"][4].endswith("]")
        assert line["sample"] == ["n = 600 images, seed 0"] * 9
        assert view["lines"][4]["y"] == [1 / 8, 1 / 8]


def test_selectors_offer_what_the_rows_hold(page: Page) -> None:
    radios = [attributes for tag, attributes in page.tags if attributes.get("data-select")]
    offered = {}
    for radio in radios:
        offered.setdefault(radio["name"], []).append((radio["value"], "checked" in radio))
    assert offered["variant-structure"] == [("centred", True), ("raw", False)]
    assert offered["tokens-structure"] == [("all", True), ("without sinks", False)]
    assert offered["tokens-probes"] == [("all", True), ("without sinks", False)]
    assert "variant-probes" not in offered
    views = page.data["panels"]["structure-gap-0"]["views"]
    assert {(view["variant"], view["tokens"]) for view in views} == {
        (variant, tokens) for variant in ("centred", "raw") for tokens in ("all", "without sinks")
    }


def test_variants_that_no_figure_shares_have_selectors_of_their_own(base: LoadedRun, tmp_path: Path) -> None:
    """Covariance or correlation of the spectrum, raw or centred homogeneity: neither is a choice for the other."""
    page = Page(build([with_spectra(base)], tmp_path / "report.html").read_text(encoding="utf-8"))
    offered: dict[str, list[tuple[str, bool]]] = {}
    for _, radio in page.tags:
        if radio.get("data-select") == "variant" and "spectrum" in radio["name"]:
            offered.setdefault(radio["name"], []).append((radio["value"], "checked" in radio))
    assert sorted(offered.values()) == [
        [("centred", True), ("raw", False)],
        [("covariance", True), ("correlation", False)],
    ]


def test_a_null_of_several_variants_is_named_once(base: LoadedRun) -> None:
    rows = [
        Measurement("gap", 0.5, layer=0, variant=variant)
        for null in ("", ", random weights")
        for variant in (f"raw{null}", f"centred{null}")
    ]
    (section,) = (one for one in SECTIONS if one.id == "structure")
    drawn = draw_section(open_runs([dataclasses.replace(base, rows=rows)]), section)
    assert drawn is not None
    assert drawn.controls == ["random weights (dashes)"]


def test_dots_and_table_as_csv(page: Page) -> None:
    files = {attributes["download"]: attributes["href"] for _, attributes in page.tags if "download" in attributes}
    tables = {
        name: list(csv.DictReader(io.StringIO(unquote(uri.partition(",")[2]))))
        for name, uri in files.items()
        if name in ("Patch gap, difference in cosine.csv", "Answers.csv", "table.csv")
    }
    (gap,) = tables["Patch gap, difference in cosine.csv"]
    assert (gap["of"], gap["run"], gap["value"], gap["interval"]) == (
        "centred gap", "with PRe", "+0.117", "[0.094, 0.140]",
    )  # fmt: skip
    answers = [line for line in tables["Answers.csv"] if line["of"] == "all questions"]
    assert [(line["run"], line["kind"]) for line in answers] == [
        ("baseline", "prior"), ("baseline", "run"), ("with PRe", "run"),
    ]  # fmt: skip
    lines = [line for line in tables["table.csv"] if (line["measure"], line["layer"]) == ("Gap, centred", "4 middle")]
    assert [(line["run"], line["difference"]) for line in lines] == [("baseline", ""), ("with PRe", "+0.117")]


def test_a_layer_without_a_value_is_a_gap_with_its_reason(page: Page) -> None:
    view = page.data["panels"]["structure-contrast-0"]["views"][0]
    assert view["lines"][0]["y"][7] is None
    assert "no value at layer 7: coupling is near zero" in " ".join(page.text)


def test_csv_holds_every_row_of_its_figure(page: Page) -> None:
    uri = next(a["href"] for tag, a in page.tags if a.get("download") == "structure-gap-0.csv")
    assert uri is not None
    lines = unquote(uri.partition(",")[2]).splitlines()
    assert lines[0].startswith("run,metric,value,layer,low,high,n,unit,target,variant,tokens,seed,note")
    assert len(lines) == 1 + 2 * 2 * 2 * 9  # runs × variants × tokens × layers


def test_markdown_has_the_same_table(built: Path, page: Page) -> None:
    text = built.with_suffix(".md").read_text(encoding="utf-8")
    assert "> At the middle layer (4 of 8), with PRe against baseline" in text
    header, rule, first, *rest = [line for line in text.splitlines() if line.startswith("|")]
    assert header == "| measure | layer | baseline | with PRe | difference | n, seed |"
    assert rule == "| --- | --- | --- | --- | --- | --- |"
    assert first.startswith("| Probe accuracy, texture (never asked) | 0 | 98.5 % ")
    summary = next(i for i, (tag, a) in enumerate(page.tags) if a.get("class") == "summary")
    html_rows = 0
    for tag, _ in page.tags[summary:]:
        if tag == "section":
            break
        html_rows += tag == "tr"
    answers = [line for line in rest if line.startswith(("| Answers", "| Text-only"))]
    assert len(answers) == 10
    assert len([first, *rest]) - len(answers) == html_rows - 1


def test_hostile_strings_show_as_text(tmp_path: Path) -> None:
    bare = dataclasses.replace(sample_run(0), examples=[])  # similarity maps are scripts too
    clean = Page(build([bare], tmp_path / "clean.html").read_text(encoding="utf-8"))
    out = build([hostile_run(), dataclasses.replace(hostile_run(), label=HOSTILE + "2")], tmp_path / "r.html", HOSTILE)
    source = out.read_text(encoding="utf-8")
    found = Page(source)
    assert len(found.scripts) >= 4
    assert sum(tag == "script" for tag, _ in found.tags) == sum(tag == "script" for tag, _ in clean.tags) == 4
    assert not [tag for tag, attributes in found.tags if tag == "img" or "onerror" in attributes]
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]
    assert html.escape("<img src=x onerror=alert(1)>") in source
    assert "<img" not in source.partition("plotly.js v")[0]
    assert found.data["runs"][0]["label"] == HOSTILE  # unharmed inside the data
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', source, re.DOTALL)
    assert block is not None
    assert not set("<>&") & set(block.group(1))
    markdown = out.with_suffix(".md").read_text(encoding="utf-8")
    assert not re.search(r"(?<!\\)<", markdown)


def test_single_run_without_depth_or_extras(tmp_path: Path) -> None:
    rows = [Measurement("gap", 0.5 - 0.1 * layer, layer=layer, variant="raw") for layer in range(3)]
    found = Page(build([LoadedRun("bare", rows)], tmp_path / "r.html").read_text(encoding="utf-8"))
    sections = [attributes["id"] for tag, attributes in found.tags if tag == "section"]
    assert sections == ["verdict", "structure", "table", "origin"]
    assert found.data["runs"] == [{"label": "bare", "preLayer": None, "depth": 2}]


def test_built_from_a_run_directory(tmp_path: Path, base: LoadedRun) -> None:
    run = RunDirectory.create(tmp_path / "run", label="baseline", depth=8, targets=base.info["targets"])
    run.write_rows(base.rows)
    run.write_examples(base.examples)
    found = Page(build([run], run.path / "report.html").read_text(encoding="utf-8"))
    assert sum(tag == "svg" for tag, _ in found.tags) == 6
    assert verdict([run]) in " ".join(found.text)


def test_what_cannot_be_written_is_named(tmp_path: Path, base: LoadedRun) -> None:
    with pytest.raises(ValueError, match=r"a report is one .html file; got '.*report.pdf'"):
        build([base], tmp_path / "report.pdf")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="a part of the path is a file"):
        build([base], tmp_path / "file" / "report.html")


def test_a_note_of_the_runs_stands_once_under_the_verdict_as_text(tmp_path: Path) -> None:
    runs = [dataclasses.replace(run, info={**run.info, "note": HOSTILE}) for run in (sample_run(0), sample_run(1))]
    source = build(runs, tmp_path / "report.html").read_text(encoding="utf-8")
    assert source.count(html.escape(HOSTILE, quote=True).replace("&#x27;", "&#39;").replace("&quot;", "&#34;")) == 1
    assert HOSTILE in "".join(Page(source).text)


def test_tokens_that_tell_nothing_else_are_no_choice() -> None:
    """Without sinks, where there are none, every curve is that of all tokens."""
    section = next(section for section in SECTIONS if section.id == "structure")
    rows = [
        Measurement("gap", 0.1 * layer, low=0.0, high=1.0, n=9, layer=layer, variant="raw", tokens=tokens)
        for tokens in ("all", "without sinks")
        for layer in range(3)
    ]
    told = draw_section(open_runs([LoadedRun("a", rows)]), section)
    rows[-1] = dataclasses.replace(rows[-1], value=0.3)
    other = draw_section(open_runs([LoadedRun("a", rows)]), section)
    assert told is not None
    assert other is not None
    assert (told.tokens, other.tokens) == (["all"], ["all", "without sinks"])
