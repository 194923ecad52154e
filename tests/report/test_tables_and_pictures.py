"""The terminal table and the outlines, against values worked out by hand."""

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from rich.table import Table

from keepsight.report import table
from keepsight.report.curves import open_runs
from keepsight.report.metrics import write_difference, write_interval, write_number
from keepsight.report.pictures import outline, show
from keepsight.report.tables import Cell, others, said
from keepsight.results import Example, LoadedRun, Measurement


def text_of(grid: Table) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(grid)
    return console.export_text()


def test_numbers_in_words() -> None:
    assert write_number("probe_accuracy", 0.8725) == "87.2 %"
    assert write_number("gap", -0.0001) == "0.000"
    assert write_number("gap", None) == "–"
    assert write_interval("gap", -0.25, 0.5) == "[−0.250, 0.500]"
    assert write_interval("gap", None, 0.5) == ""
    assert write_difference("probe_accuracy", -0.041, -0.05, -0.01) == "−4.1 points [−5.0, −1.0]"
    assert write_number("not_known", 1.5) == "1.500"


def test_a_difference_that_is_told_is_not_rounded_to_none() -> None:
    assert write_difference("gap", 0.0003, 0.0001, 0.00052) == "+0.0003 [0.0001, 0.0005]"
    assert write_difference("probe_accuracy", -0.0004, -0.0006, -0.0002) == "−0.04 points [−0.06, −0.02]"
    assert write_difference("gap", 0.0003, -0.0001, 0.0007) == "0.000 [0.000, 0.001]"  # not told: the usual digits
    assert write_difference("gap", 1e-12, 1e-13, 2e-12) == "0.00000000 [0.00000000, 0.00000000]"


def test_the_table_says_of_how_many(base: LoadedRun) -> None:
    text = " ".join(text_of(table([base])).split())
    assert "n = 600 images (Probe accuracy, " in text
    assert text.endswith("600 objects (Gap, Contrast), 2,400 questions (Answers)")
    rows = [row for row in base.rows if row.metric == "gap"]
    assert text_of(table(rows)).splitlines()[-1].rstrip() == "n = 600 objects"


def test_table_compares_runs(base: LoadedRun, pre: LoadedRun) -> None:
    lines = text_of(table([base, pre])).splitlines()
    gap = next(i for i, line in enumerate(lines) if "Gap, centred" in line)
    assert "0.869" in lines[gap]
    assert "4 middle" in lines[gap + 1]
    assert "+0.117 [0.094, 0.140]" in lines[gap + 1]
    assert any("Probe accuracy, texture never asked" in line for line in lines)
    assert any("Answers, all questions" in line and "76.5 %" in line for line in lines)
    assert not any("Feature correlation" in line for line in lines)
    assert any("Feature correlation" in line for line in text_of(table([base, pre], full=True)).splitlines())


def test_table_of_bare_rows_shows_brackets_and_markup_as_they_are() -> None:
    rows = [Measurement("probe_accuracy", 0.5, layer=0, low=0.4, high=0.6, target="[red]cat[/red]")]
    text = text_of(table(rows))
    assert "Probe accuracy, [red]cat[/red]" in text
    assert "50.0 % [40.0, 60.0]" in text


def test_outline_of_one_pixel_is_its_four_sides() -> None:
    mask = np.zeros((3, 4), dtype=np.uint8)
    mask[1, 2] = 5
    assert outline(mask) == "M2 1H3M2 2H3M2 1V2M3 1V2"


def test_outline_follows_objects_to_the_rim_and_ignores_255() -> None:
    mask = np.array([[1, 1, 255], [2, 1, 0]], dtype=np.uint8)
    drawn = outline(mask)
    # top rim above the 1s; under (0,0) where 2 begins; bottom rim under 2 and 1 together
    assert drawn.startswith("M0 0H2M0 1H1M0 2H2")
    # left rim down both rows; 2|1 in the second row; right side of the 1s down both rows; nothing between 255 and 0
    assert drawn.endswith("M0 0V2M1 1V2M2 0V2")


def test_large_pictures_shrink_with_their_masks() -> None:
    mask = np.zeros((960, 480), dtype=np.uint8)
    mask[:480] = 3
    picture = show(Example(Image.new("RGB", (480, 960)), mask))
    assert (picture.width, picture.height) == (240, 480)
    assert picture.outline == "M0 0H240M0 240H240M0 0V240M240 0V240"
    assert picture.objects == [picture.outline]
    assert picture.uri.startswith("data:image/jpeg;base64,")


def test_each_object_has_an_outline_of_its_own() -> None:
    mask = np.array([[7, 3], [255, 7]], dtype=np.uint8)
    picture = show(Example(Image.new("RGB", (2, 2)), mask))
    # in the order of their values: 3 at the top right, then 7 at the top left and the bottom right
    assert picture.objects == ["M1 0H2M1 1H2M1 0V1M2 0V1", "M0 0H1M0 1H2M1 2H2M0 0V1M1 0V2M2 1V2"]


def test_what_the_lens_reads_layer_by_layer() -> None:
    note = "256 tokens; 1 of 400 listed, most frequent: '<b>' 31 %, ' the' 12 %"
    rows = [
        Measurement("silencing", 0.25, layer=0, low=0.2, high=0.3, note=note),
        Measurement("silencing", 0.75, layer=0, tokens="without sinks", note=note),
        Measurement("silencing", None, layer=4, note="no LM head"),
    ]
    lines = said(open_runs([LoadedRun("a", rows), LoadedRun("b", rows[:1])]))
    assert [line.layer for line in lines] == [0, 4]
    assert lines[0].cells[0] == Cell("25.0 %", "[20.0, 30.0]", "'<b>' 31 %, ' the' 12 %")
    assert lines[1].cells == (Cell("–", "", "no LM head"), Cell("–"))
    assert said(open_runs([LoadedRun("a", [Measurement("gap", 0.5, layer=0)])])) == []


def test_other_numbers_without_sinks_are_listed_where_they_differ() -> None:
    same = {"layer": 4, "low": 0.1, "high": 0.3, "target": "texture"}
    rows = [
        Measurement("probe_drop", 0.2, **same),
        Measurement("probe_drop", 0.2, **same, tokens="without sinks"),
        Measurement("probe_worst_layer", 0.3, layer=5, target="texture"),
        Measurement("probe_worst_layer", 0.2, layer=7, target="texture", tokens="without sinks"),
        Measurement("probe_accuracy", 0.5, layer=4, target="texture", tokens="without sinks"),
    ]
    assert [name for _, name, _ in others(open_runs([LoadedRun("a", rows)]))] == [
        "Probe drop (texture), layer 4",
        "Probe drop at the worst layer (texture), layer 5",
        "Probe drop at the worst layer (texture, without sinks), layer 7",
    ]


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mask of example 'a.png' is \(3, 3\), its picture \(4, 5\)"):
        show(Example(Image.new("RGB", (5, 4)), np.zeros((3, 3), dtype=np.uint8), "a.png"))


def test_a_run_without_numbers_has_an_empty_table() -> None:
    assert table([LoadedRun("nothing", [], {"label": "nothing"})]).row_count == 0
