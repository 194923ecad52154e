"""What is shipped agrees with itself: versions, dependencies, commands, data files."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import keepsight

ROOT = Path(__file__).parents[2]
SIZE_LIMIT = 20 * 2**20  # bytes of pretrained weights in the wheel


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def normal(requirement: str) -> str:
    """The package's name as indices compare it."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name is not None
    return re.sub(r"[-_.]+", "-", name.group()).lower()


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {normal(name): version for name, version in pairs}


def test_one_version_everywhere(project: dict[str, Any]) -> None:
    version = project["version"]
    assert keepsight.__version__ == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_licence_is_the_same_everywhere(project: dict[str, Any]) -> None:
    assert project["license"] == "Apache-2.0"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_citation_names_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    (paper,) = citation["references"]
    assert paper["title"].startswith("Predictive Regularization Against Visual Representation Degradation")
    assert [author["family-names"] for author in paper["authors"]] == [
        "Wang", "Wang", "Wu", "Yan", "Yuan", "Ding", "Liu", "Cheng",
    ]  # fmt: skip
    assert paper["identifiers"][0]["value"] == "arXiv:2603.20808"


def test_what_is_installed_is_pinned(project: dict[str, Any]) -> None:
    """Everything `make` installs has one version in constraints.txt, and a clean machine gets no other."""
    extras = project["optional-dependencies"]
    wanted = {normal(item) for item in (*project["dependencies"], *extras["train"], *extras["figures"], *extras["dev"])}
    assert wanted <= set(pinned()), f"not in constraints.txt: {sorted(wanted - set(pinned()))}"
    assert "torchvision" not in pinned()


def test_core_is_lean(project: dict[str, Any]) -> None:
    core = {normal(item) for item in project["dependencies"]}
    assert not core & {"accelerate", "datasets", "peft", "scikit-learn", "pandas", "matplotlib", "torchvision"}


def dry_run(*arguments: str) -> str:
    """What make would do; the tests may run under make themselves, whose own settings must not be inherited."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "-n", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", ["demo", "test", "check", "bench", "test-real"])
def test_make_targets_set_up_before_they_run(target: str, tmp_path: Path) -> None:
    lines = dry_run(target, f"VENV={tmp_path / 'venv'}", "ARGS=--flag").splitlines()
    torch = next(i for i, line in enumerate(lines) if line.endswith("-c constraints.txt torch"))
    rest = next(i for i, line in enumerate(lines) if "-e '.[train,figures,dev]'" in line)
    assert torch < rest < len(lines) - 1
    assert all("-c constraints.txt" in line for line in lines if "pip install" in line)
    assert "--flag" in lines[-1]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_bench_runs_every_benchmark_and_no_helper() -> None:
    listed = re.search(r"for file in (.*?); do", dry_run("bench"))
    assert listed is not None
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "benchmarks").glob("[!_]*.py")}
    assert set(listed.group(1).split()) == files


def test_ci_script_is_sound() -> None:
    script = ROOT / ".ci" / "run"
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text
    assert text.index("make test") < text.index("make demo")
    assert "KEEPSIGHT_BROWSER=required make test" in text


def test_shipped_weights_are_safetensors_and_small() -> None:
    package = ROOT / "src" / "keepsight"
    files = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt", ".npy"}]
    assert sum(path.stat().st_size for path in files if path.suffix == ".safetensors") <= SIZE_LIMIT
    assert (package / "py.typed").is_file()


def test_text_files_are_utf8() -> None:
    for pattern in ("src/**/*", "tests/**/*", "docs/**/*", "recipes/**/*", "examples/**/*", "benchmarks/**/*", "*"):
        for path in ROOT.glob(pattern):
            if path.suffix in {".py", ".md", ".yaml", ".toml", ".txt", ".cff", ".j2", ".js", ".css", ".json"}:
                path.read_text(encoding="utf-8")
