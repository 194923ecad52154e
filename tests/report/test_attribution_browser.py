"""The section of attributions in a real browser: the slider moves every figure, in both themes, at any width."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keepsight.report import build
from tests.report.browser import Tab, screenshot
from tests.report.sample import DEPTH, sample_run
from tests.report.test_attribution import series
from tests.report.test_page import HOSTILE
from tests.report.trainings import sample_attribution

pytestmark = pytest.mark.slow

TEXTURE = "attribution-0-checkpoints"


@pytest.fixture(scope="module")
def paid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build([sample_attribution()], tmp_path_factory.mktemp("paid") / "report.html")


def drawn(page: Any, panel: str, training: int) -> dict[str, list[float]]:
    """What Plotly holds of one training."""
    return page.evaluate(
        f"(({{ x, y }}) => ({{ x, y }}))(document.querySelector('[data-panel={panel}]').data[{training}])"
    )


def start(tab: Tab) -> Any:
    tab.page.wait_for_selector(f"[data-panel={TEXTURE}] .main-svg")
    return tab.page


def hover(page: Any) -> str:
    """What is said of the first checkpoint when the pointer rests on it."""
    panel = page.locator(f"[data-panel={TEXTURE}]")
    panel.evaluate("element => element.scrollIntoView({ block: 'center', behavior: 'instant' })")
    box = panel.locator(".point").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=3)
    page.wait_for_selector(f"[data-panel={TEXTURE}] .hoverlayer text")
    return panel.locator(".hoverlayer").text_content()


def test_keys_move_every_figure_to_another_layer(opened: Callable[..., Tab], paid: Path) -> None:
    page, run = start(opened(paid)), sample_attribution()
    assert page.locator("#attribution output").text_content() == "4 of 8"
    heading = page.locator(f"#figure-{TEXTURE} .at").text_content()
    slider = page.locator("#attribution-layer")
    slider.focus()
    for key, layer in (("End", DEPTH), ("Home", 0), ("ArrowRight", 1)):
        page.keyboard.press(key)
        assert page.locator("#attribution output").text_content() == f"{layer} of 8"
        assert slider.get_attribute("aria-valuetext") == f"layer {layer}"
        for training in range(3):
            skills, told = series(run, f"seed-{training}", "probe_accuracy", "texture", layer)
            found = drawn(page, TEXTURE, training)
            assert found["x"] == pytest.approx([100 * value for value in told])
            assert found["y"] == pytest.approx([100 * value for value in skills])
            assert drawn(page, "attribution-4-checkpoints", training)["x"] == pytest.approx(
                series(run, f"seed-{training}", "fidelity", "", layer)[1]
            )
        marks = page.evaluate("document.querySelector('[data-panel=attribution-0]').layout.shapes.map(({ x0 }) => x0)")
        assert marks == [layer]
    (row,) = [row for row in run.rows if (row.target, row.layer) == ("texture", 1)]
    now = page.locator(f"#figure-{TEXTURE} .at").text_content()
    assert now == f"layer 1: r = {row.value:.2f} [{row.low:.2f}, {row.high:.2f}], 3 seeds".replace("-", "−") != heading
    assert "Layer 1. " in page.locator("#attribution-spoken").text_content()
    cells = page.locator(f"#figure-{TEXTURE} td.cell").all_text_contents()
    told = [value for seed in range(3) for value in series(run, f"seed-{seed}", "probe_accuracy", "texture", 1)[1]]
    assert [cell.partition(" [")[0] for cell in cells] == [f"{100 * value:.1f} %" for value in told]


def test_a_click_on_r_chooses_the_layer_and_hovering_names_the_checkpoint(
    opened: Callable[..., Tab], paid: Path
) -> None:
    page = start(opened(paid))
    page.locator("[data-panel=attribution-0]").scroll_into_view_if_needed()
    box = page.locator("[data-panel=attribution-0] .nsewdrag").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 10, box["y"] + box["height"] / 2)
    page.mouse.click(box["x"] + box["width"] - 10, box["y"] + box["height"] / 2)
    page.wait_for_function("document.querySelector('#attribution output').textContent === '8 of 8'")
    assert page.locator("#attribution-layer").input_value() == "8"
    assert "start" in hover(page)


def test_both_themes_and_print(opened: Callable[..., Tab], paid: Path, tmp_path: Path) -> None:
    page = start(opened(paid, color_scheme="dark"))
    ink = "document.querySelector('[data-panel=attribution-0-checkpoints]').data[0].line.color"
    before = page.evaluate(ink)
    screenshot(page, "attribution-dark", full=True)
    page.locator("#theme").click()
    assert page.evaluate(ink) != before
    screenshot(page, "attribution-light", full=True)
    page.emulate_media(media="print")
    assert page.locator("#attribution .pin .legend").is_visible()
    assert not page.locator("#attribution-layer").is_visible()
    page.pdf(path=tmp_path / "report.pdf", format="A4", print_background=True)
    assert (tmp_path / "report.pdf").stat().st_size > 30_000


@pytest.mark.parametrize("width", [360, 1600])
def test_nothing_is_wider_than_the_window(opened: Callable[..., Tab], tmp_path: Path, width: int) -> None:
    """With a long name, without an r, and beside other runs."""
    paid = sample_attribution(["a-training-of-a-rather-long-name-" * 3, "b"])
    lacking = dataclasses.replace(paid.rows[4], value=None, low=None, high=None, note="why there is none " * 9)
    assert lacking.layer == DEPTH // 2
    runs = [sample_run(0), dataclasses.replace(paid, rows=[*paid.rows[:4], lacking, *paid.rows[5:]])]
    page = start(opened(build(runs, tmp_path / "r.html"), viewport={"width": width, "height": 800}))
    page.evaluate("document.querySelectorAll('details').forEach((details) => (details.open = true))")
    screenshot(page, f"attribution-{width}", full=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_hostile_names_are_text(opened: Callable[..., Tab], tmp_path: Path) -> None:
    run = sample_attribution([HOSTILE, HOSTILE + "2"], HOSTILE)
    points = [dataclasses.replace(point, name=f"{point.name}{HOSTILE}") for point in run.points]
    page = start(opened(build([dataclasses.replace(run, points=points)], tmp_path / "r.html", HOSTILE)))
    page.locator("#attribution-layer").focus()
    page.keyboard.press("End")
    assert f"start{HOSTILE}" in hover(page)
    assert page.locator("img, [onerror]").count() == 0
    assert HOSTILE in page.locator("#attribution .pin").text_content()
    assert page.title() == HOSTILE
