"""The page in a real browser: what it shows, what it does when touched, and that it asks nothing of the network."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keepsight.report import build
from keepsight.report.metrics import write_number
from keepsight.report.pruned import KEPT
from keepsight.results import LoadedRun, SimilarityMap
from keepsight.vlm.pruning import Pruning
from tests.report.answers import sample_answers
from tests.report.browser import Tab, screenshot
from tests.report.sample import sample_run, with_spectra
from tests.report.test_page import HOSTILE, hostile_run
from tests.report.test_pruned import run as pruned_run

pytestmark = pytest.mark.slow

GRID = 8


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build([sample_run(0), sample_run(1)], tmp_path_factory.mktemp("browser") / "report.html")


def map_of(run: LoadedRun, picture: int = 0) -> SimilarityMap:
    found = run.examples[picture].map
    assert found is not None
    return found


def expected(run: LoadedRun, layer: int, token: int, picture: int = 0) -> str:
    """The line under a view, from the map and the mask themselves."""
    found, mask = map_of(run, picture), run.examples[picture].mask
    assert mask is not None
    side = len(mask) // GRID
    blocks = mask.reshape(GRID, side, GRID, side).transpose(0, 2, 1, 3).reshape(GRID * GRID, -1)
    objects = [next((value for value in (1, 2, 3) if (row == value).mean() >= 0.5), 0) for row in blocks]
    values = found.similarity(layer, token)
    others = [i for i in range(GRID * GRID) if i != token]
    word = str(found.word(layer, token)).replace(" ", "␣", 1)

    def write(chosen: list[int]) -> str:
        return f"{np.mean([values[i] for i in chosen]):.2f}".replace("-", "−")

    if objects[token]:
        own = [i for i in others if objects[i] == objects[token]]
        start = f"within its object {write(own)}   elsewhere {write([i for i in others if i not in own])}   "
    else:
        start = f"mean of all others {write(others)}   "
    return f"{start}reads “{word}”"


def said(page: Any, run: int) -> str:
    line = page.locator(f"#said-{run}")
    return line.evaluate("element => [...element.childNodes].slice(0, -1).map((node) => node.textContent).join('')")


def click(page: Any, run: int, token: int) -> None:
    page.locator(f'.view[data-run="{run}"] rect[data-token="{token}"]').click()


def chosen(page: Any) -> list[str]:
    """Row and column that each view names."""
    texts = page.locator(".said small").all_text_contents()
    return [" ".join(text.split(";")[0].split(", ")[:2]) for text in texts]


def test_slider_click_and_keys_move_both_runs_in_step(opened: Callable[..., Tab], report: Path) -> None:
    page = opened(report).ready()
    base, pre = sample_run(0), sample_run(1)
    click(page, 0, 19)  # row 2, column 3
    assert [said(page, 0), said(page, 1)] == [expected(base, 4, 19), expected(pre, 4, 19)]
    assert expected(base, 4, 19).startswith("within its object")
    page.locator("#layer").focus()
    page.keyboard.press("End")
    assert page.locator("#layer-name").text_content() == "8 of 8"
    assert [said(page, 0), said(page, 1)] == [expected(base, 8, 19), expected(pre, 8, 19)]
    assert page.locator("#layer").get_attribute("aria-valuetext") == "layer 8"

    page.locator('.view[data-run="1"] svg').focus()
    for key in ("ArrowRight", "ArrowDown", "ArrowDown", "ArrowLeft", "ArrowUp"):
        page.keyboard.press(key)
    assert chosen(page) == ["row 4 column 4"] * 2
    page.keyboard.press("PageDown")
    assert [said(page, 0), said(page, 1)] == [expected(base, 7, 27), expected(pre, 7, 27)]
    for _ in range(12):
        page.keyboard.press("ArrowRight")  # stops at the rim
    assert chosen(page) == ["row 4 column 8"] * 2
    assert said(page, 0) == expected(base, 7, 31)
    assert expected(base, 7, 31).startswith("mean of all others")
    assert "Layer 7" in page.locator("#spoken").text_content()


def test_colours_rise_with_the_cosine(opened: Callable[..., Tab], report: Path) -> None:
    """Luminance of the drawn colours against the cosines: the order is the same, whatever the scale."""
    page = opened(report).ready()
    click(page, 0, 19)
    values = map_of(sample_run(0)).similarity(4, 19)
    for scale in ("fixed", "stretched"):
        page.locator(f"input[name=scale][value={scale}] + span").click()
        fills = page.locator('.view[data-run="0"] .heat rect').evaluate_all(
            "cells => cells.map((cell) => cell.getAttribute('fill').match(/\\d+/g).map(Number))"
        )
        light = np.array(fills) @ [0.2126, 0.7152, 0.0722]
        inside = (values > 0.02) & (values < 0.98)
        order = np.argsort(values[inside])
        assert (np.diff(light[inside][order]) > -1.5).all()  # of 255: colours are whole numbers
    assert page.locator(".bar .high").text_content() != "1.00"


def test_another_picture_and_its_outline(opened: Callable[..., Tab], report: Path) -> None:
    page = opened(report).ready()
    page.locator('.pick[data-picture="3"]').click()
    page.wait_for_selector('.pick[data-picture="3"][aria-pressed=true]')
    assert page.locator(".pick[aria-pressed=true]").count() == 1
    run = sample_run(0)
    assert page.locator(".chosen").text_content().startswith(run.examples[3].caption)
    click(page, 1, 10)
    assert said(page, 0) == expected(run, 4, 10, picture=3)
    drawn = page.locator('.view[data-run="0"] .outline:not(.all) path').first.get_attribute("d")
    assert drawn in page.evaluate("JSON.parse(document.getElementById('data').textContent).pictures[3].objects")
    click(page, 1, 0)  # background
    assert page.locator('.view[data-run="0"] .outline:not(.all) path').first.get_attribute("d") == ""


def test_theme_plots_and_screenshots(opened: Callable[..., Tab], report: Path) -> None:
    page = opened(report).ready()
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    screenshot(page, "light", full=True)
    page.locator("#theme").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.reload()
    page.wait_for_selector("#explorer[data-ready]")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    screenshot(page, "dark", full=True)
    open_plots = page.locator(".plot:visible")
    assert open_plots.count() >= 10
    assert page.locator(".plot:visible .main-svg").count() >= 2 * open_plots.count()
    before = page.locator(".plot:visible").count()
    page.locator("#structure details.more > summary").click()
    page.wait_for_selector('[data-panel="structure-coupling-0"] .main-svg')
    assert page.locator(".plot:visible").count() == before + 3
    box = page.locator('[data-panel="structure-gap-0"] .nsewdrag').bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector('[data-panel="structure-gap-0"] .hoverlayer text')
    hover = " ".join(page.locator('[data-panel="structure-gap-0"] .hoverlayer text').all_text_contents())
    assert "n = 600 objects" in hover
    assert "with PRe" in hover
    assert "[0.5" in hover


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("panel", ["probes-probe_accuracy-0", "fidelity-fidelity-0"])
def test_what_hovering_tells_fits_into_its_figure(
    opened: Callable[..., Tab], report: Path, width: int, panel: str
) -> None:
    page = opened(report, viewport={"width": width, "height": 800}).ready()
    plot = page.locator(f'[data-panel="{panel}"]')
    plot.scroll_into_view_if_needed()
    page.mouse.move(*centre(plot))
    label = plot.locator(".hoverlayer .legend")
    label.wait_for()
    text, box, figure = label.text_content(), label.bounding_box(), plot.bounding_box()
    assert "layer " in text
    assert "n = " in text
    assert "with PRe" in text
    assert box["x"] >= figure["x"]
    assert box["x"] + box["width"] <= figure["x"] + figure["width"]
    assert plot.evaluate("plot => getComputedStyle(plot).overflowY") == "visible"  # it may be higher
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    screenshot(page, f"hover-{panel}-{width}")


@pytest.mark.parametrize("width", [360, 1600])
def test_nothing_is_wider_than_the_window(opened: Callable[..., Tab], report: Path, width: int) -> None:
    page = opened(report, viewport={"width": width, "height": 800}).ready()
    page.evaluate("document.querySelectorAll('details').forEach((details) => (details.open = true))")
    screenshot(page, f"width-{width}", full=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_variant_is_chosen_for_the_figures_that_have_it(opened: Callable[..., Tab], tmp_path: Path) -> None:
    out = build([with_spectra(sample_run(0))], tmp_path / "report.html")
    page = opened(out, viewport={"width": 360, "height": 800}).ready()
    page.locator("#spectrum details.more > summary").click()
    page.wait_for_selector('[data-panel="spectrum-token_homogeneity-0"] .main-svg')

    def headings() -> list[str]:
        names = ("participation_ratio", "token_homogeneity")
        return [page.locator(f"#figure-spectrum-{name}-0 h4 small").text_content() for name in names]

    assert headings() == ["covariance", "centred"]
    page.locator("#spectrum input[value=correlation] + span").click()
    assert headings() == ["correlation", "centred"]
    page.locator("#spectrum input[value=raw] + span").click()
    assert headings() == ["correlation", "raw"]
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_pruning_is_drawn_by_the_share_of_tokens_kept(opened: Callable[..., Tab], tmp_path: Path) -> None:
    half, few = Pruning(1, 0.5), Pruning(1, 0.125)
    runs = [
        pruned_run("base", {few: {2: 0.4}, half: {2: 0.7}}),
        pruned_run("with PRe", {few: {2: 0.6}, half: {2: 0.75}}),
    ]
    page = opened(build(runs, tmp_path / "r.html")).page
    plot = page.locator("#figure-pruned-probe_accuracy_pruned-0 .plot")
    plot.scroll_into_view_if_needed()
    title = plot.locator(".xtitle")
    assert title.text_content() == KEPT
    assert plot.locator(".xtick text").all_text_contents()[-1] == "100"
    drawn = plot.evaluate("(plot) => plot.data.filter((line) => line.marker).map((line) => [line.x, line.y])")
    assert drawn == [[[12.5, 50, 100], [40, 70, 80]], [[12.5, 50, 100], [60, 75, 80]]]
    assert "PRe" not in plot.locator(".annotation-text").all_text_contents()
    page.mouse.move(*centre(plot))
    page.wait_for_selector(".hoverlayer .legend")
    assert "50 % kept" in plot.locator(".hoverlayer").text_content()
    screenshot(page, "pruned")


def test_the_numbers_follow_the_selectors(opened: Callable[..., Tab], report: Path) -> None:
    page = opened(report).ready()
    rows = page.locator("#figure-structure-gap-0 tbody tr")
    found = {}
    for variant in ("raw", "centred"):
        page.locator(f"#structure input[value={variant}] + span").click()
        found[variant] = [row.split("  ")[0] for row in rows.locator("td:nth-child(2)").all_text_contents()]
        gaps = [row for row in sample_run(0).rows if row.key[:4] == ("gap", "", variant, "all")]
        assert found[variant] == [write_number("gap", row.value) for row in gaps]
    assert found["raw"] != found["centred"]


def centre(locator: Any) -> tuple[float, float]:
    box = locator.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def test_numbers_of_a_figure_have_its_whole_width(opened: Callable[..., Tab], report: Path) -> None:
    page = opened(report).ready()
    figure = page.locator("#figure-probes-probe_accuracy-0")
    figure.locator("summary").click()
    plot, table = (figure.locator(part).bounding_box() for part in (".plot", ".scroll"))
    assert table["width"] > 0.95 * plot["width"]


def test_print_is_light_and_leaves_the_theme(opened: Callable[..., Tab], report: Path, tmp_path: Path) -> None:
    page = opened(report, color_scheme="dark").ready()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.evaluate("addEventListener('beforeprint', () => (window.printed = document.documentElement.dataset.theme))")
    page.pdf(path=tmp_path / "report.pdf", format="A4", print_background=True)
    assert (tmp_path / "report.pdf").stat().st_size > 50_000
    assert page.evaluate("window.printed") == "light"
    if folder := os.environ.get("KEEPSIGHT_SCREENSHOTS"):
        (Path(folder) / "report.pdf").write_bytes((tmp_path / "report.pdf").read_bytes())
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


@pytest.mark.parametrize("width", [360, 1200])
def test_what_changed_is_seen(opened: Callable[..., Tab], tmp_path: Path, width: int) -> None:
    """A page of answers alone: no figures, so no figures' code; nothing asked of the network, nothing too wide."""
    out = build(sample_answers(tmp_path), tmp_path / "r.html")
    assert out.stat().st_size < 400_000
    page = opened(out, viewport={"width": width, "height": 800}, color_scheme="dark").page
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.locator(".card:visible").count() == 12
    drawn = page.locator(".shots image").evaluate_all("all => all.map((one) => one.getBoundingClientRect().width)")
    assert len(drawn) == 13
    assert min(drawn) > 50
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator(".kind summary").first.click()
    assert page.locator(".card:visible").count() < 12
    screenshot(page, f"changed-{width}", full=True)


def test_hostile_strings_are_text(opened: Callable[..., Tab], tmp_path: Path) -> None:
    words = np.array([HOSTILE, "</script><img src=x onerror=alert(2)>"])
    runs = []
    for label in (HOSTILE, HOSTILE + "2"):
        run = hostile_run()
        (example,) = run.examples
        example = dataclasses.replace(sample_run(0).examples[0], name=HOSTILE, caption=HOSTILE)
        assert example.map is not None
        hostile = dataclasses.replace(example.map, words=words, top=example.map.top % 2)
        runs.append(dataclasses.replace(run, label=label, examples=[dataclasses.replace(example, map=hostile)]))
    page = opened(build(runs, tmp_path / "r.html", HOSTILE)).ready()
    page.locator("#layer").focus()
    page.keyboard.press("End")
    click(page, 0, 19)
    page.locator('.view[data-run="0"] rect[data-token="30"]').hover()
    assert page.locator("img, [onerror]").count() == 0
    shown = page.locator("#said-0").text_content()
    assert any(str(word) in shown for word in words)
    assert page.locator(".chosen").text_content().startswith(HOSTILE)
    assert page.title() == HOSTILE
    assert page.locator("body").text_content().count("{{7*7}}") > 5


def test_runs_whose_pictures_or_layers_differ(opened: Callable[..., Tab], tmp_path: Path) -> None:
    """A run without the layer, and one without the map, say so; tiles and the whole picture are told apart."""
    base, pre = sample_run(0), sample_run(1)
    few = [dataclasses.replace(e, map=thinned(e.map)) for e in pre.examples[:5] if e.map is not None]
    few.append(dataclasses.replace(pre.examples[5], map=None))
    whole = np.arange(GRID * GRID) % 2 == 0
    tiled = [dataclasses.replace(e, map=dataclasses.replace(e.map, thumbnail=whole)) for e in base.examples if e.map]
    runs = [dataclasses.replace(base, examples=tiled), dataclasses.replace(pre, examples=few)]
    page = opened(build(runs, tmp_path / "r.html")).ready()
    assert page.locator("#layer-name").text_content() == "4 of 8"
    assert page.locator('.view[data-run="1"] svg:not(.blank)').count() == 1
    page.locator("#layer").focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#said-1").text_content() == "no layer 3 in this run"
    assert page.locator('.view[data-run="0"] .heat rect').count() == 32
    page.locator("input[name=level][value='1'] + span").click()
    assert page.locator('.view[data-run="0"] rect[data-token="2"]').count() == 1
    page.locator('.pick[data-picture="5"]').click()
    page.wait_for_selector('.pick[data-picture="5"][aria-pressed=true]')
    assert page.locator("#said-1").text_content() == "no map of this picture in this run"


def thinned(found: SimilarityMap) -> SimilarityMap:
    """Only layers 0, 4 and 8."""
    kept = [0, 4, 8]
    return dataclasses.replace(
        found, **{name: getattr(found, name)[kept] for name in ("layers", "codes", "error", "worst", "top")}
    )
