"""What the pages name is there: commands with their options, make targets, files, tests, and the places of links."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from keepsight import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "recipes/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
# Options of other programs that the pages name: accelerate, the benchmarks, the table's own writer, TrainingArguments,
# lmms-eval.
ELSEWHERE = {"--num-processes", "--shape", "--write", "--model-args", "--force-simple"}
ELSEWHERE |= {"--trainer.logging-steps", "--trainer.use-cpu", "--trainer.ddp-backend"}
page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())


def options(text: str) -> set[str]:
    """`--pre.head_lr 1` and `--pre.head-lr=1` → --pre.head-lr."""
    return {name.replace("_", "-").rstrip(".") for name in re.findall(r"(?<![\w-])--[a-z][\w.-]*", text)}


@pytest.fixture(scope="module")
def known() -> dict[str, set[str]]:
    """Command → its options, from what `--help` prints."""
    found = {}
    for command in cli.COMMANDS:
        with pytest.MonkeyPatch.context() as patch:
            shown: list[str] = []
            patch.setattr("argparse.ArgumentParser._print_message", lambda self, text, file=None: shown.append(text))  # noqa: B023
            with pytest.raises(SystemExit):
                cli.main([command, "--help"])
        found[command] = options("".join(shown)) | {"--debug"}
    return found


def shown_commands(text: str) -> Iterator[tuple[str, str]]:
    """Every `keepsight COMMAND …` in blocks and between backticks, with the rest of it."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line.split("  #")[0] for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    for line in lines:
        if match := re.search(r"(?:^|-m )keepsight (\S+)(.*)", line.strip()):
            yield match[1], match[2]


@page
def test_commands_and_their_options(page: Path, known: dict[str, set[str]]) -> None:
    text = page.read_text(encoding="utf-8")
    for command, rest in shown_commands(text):
        if command not in ("COMMAND", "--version"):
            assert command in known, f"keepsight {command}"
            assert options(rest) - ELSEWHERE <= known[command], f"keepsight {command}{rest}"
    every = set().union(*known.values()) | ELSEWHERE
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    spans = [span for span in re.findall(r"`([^`\n]+)`", prose) if span.startswith("--")]
    assert options(" ".join(spans)) <= every, options(" ".join(spans)) - every


@page
def test_make_targets(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"(?:^|`|&& )make ([a-z][a-z-]*)", text, re.MULTILINE)
    assert set(named) <= targets, set(named) - targets


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@page
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there.read_text(encoding="utf-8")), target


@page
def test_files_that_are_named_exist(page: Path) -> None:
    """Paths between backticks, from the root of the repository or of the package."""
    spans = re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))
    paths = [word for span in spans for word in span.split() if re.fullmatch(r"[\w.-]+/[\w./-]+\.(?:py|md|yaml)", word)]
    missing = [path for path in paths if not any((base / path).exists() for base in (ROOT, ROOT / "src" / "keepsight"))]
    assert not missing


def test_tests_that_are_named_exist() -> None:
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in (ROOT / "tests").rglob("test_*.py")]
    there = {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for file in PAGES:
        for name in re.findall(r"`(test_\w+)(…?)`", file.read_text(encoding="utf-8")):
            assert any(other.startswith(name[0]) if name[1] else other == name[0] for other in there), name[0]


def test_the_tree_of_the_readme_is_the_repository() -> None:
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## What is where")[1].split("```")[1]
    package = ROOT / "src" / "keepsight"
    inside, outside = tree.partition("\nrecipes/")[::2]
    folders = {path.name for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"}
    files = {path.name for path in package.glob("[!_]*.py")}
    assert set(re.findall(r"(?<![\w/])(\w+)/(?=\s)", inside)) == folders
    assert set(re.findall(r"(\w+\.py)", inside)) == files
    rooms = {path.parent.name for path in (package / "diagnosis").glob("*/__init__.py")}
    assert set(re.findall(r"diagnosis/(\w+)", inside)) == rooms
    named = re.findall(r"(?<![\w/])([\w/]+/|\w+\.md)(?= |:|$)", f"recipes/{outside}", re.MULTILINE)
    assert len(named) > 8
    assert all((ROOT / name).exists() or (ROOT / "docs" / name).exists() for name in named)
