"""Which picture is kept under which name."""

from PIL import Image

from keepsight.evaluation import Question, keep
from keepsight.evaluation.generate import Answer
from keepsight.evaluation.run import assemble
from keepsight.results import RunDirectory


def test_pictures_without_a_path(tmp_path):
    """`picture` names what questions are clustered by, which several pictures may share; each is kept as itself."""
    red, blue, green = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "green"))
    red.save(tmp_path / "red.png")
    questions = [
        Question("a", "x", red, picture="patient 1"),
        Question("b", "x", red, picture="patient 1"),
        Question("c", "x", [blue, green], picture="patient 1", id="third"),
        Question("d", "x", green),
        Question("e", "x", tmp_path / "red.png"),
        Question("f", "x", tmp_path / "missing.png"),
        Question("g", "x"),
    ]
    run = RunDirectory.create(tmp_path / "run", label="a", kind="evaluation")
    keep(
        run, {"t": questions}, {"t": assemble(questions, {i: Answer("x") for i in range(5)}, {5: "missing", 6: "why"})}
    )
    said = run.read_answers()
    path = str(tmp_path / "red.png")
    assert [record.images for record in said[:5]] == [
        ("patient 1",), ("patient 1",), ("third", "third (2)"), ("3",), (path,),
    ]  # fmt: skip
    kept = run.load().thumbnails
    colours = {name: kept.get("t", name).getpixel((0, 0)) for name in ("patient 1", "third", "third (2)", "3", path)}
    assert list(colours.values()) == [(255, 0, 0), (0, 0, 255), (0, 128, 0), (0, 128, 0), (255, 0, 0)]
    assert kept.get("t", str(tmp_path / "missing.png")) is None
    assert [record.left_out for record in said[5:]] == ["missing", "why"]
