"""Scenes as what users have: a folder of pictures, masks, labels and LLaVA conversations; or items to evaluate on."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from keepsight.evaluation import Question
from keepsight.results import write_file
from keepsight.results.storage import HALF
from keepsight.testbed.drawing import render
from keepsight.testbed.language import CAPTION_REQUEST, caption, questions
from keepsight.testbed.scenes import ASKED, UNASKED, Scene

_WRITTEN = frozenset({"images", "masks", "captions.json", "questions.json", "labels.json"})
_PICTURE = re.compile(r"\d+-\d{6}\.png")  # what `name_of` makes of a scene


def name_of(scene: Scene) -> str:
    """Of the scene's files, without a suffix."""
    return f"{scene.seed}-{scene.index:06d}"


def conversation(scene: Scene, turns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """One entry of LLaVA's JSON: the picture `<name>.png` and what is said about it."""
    said = []
    for number, (question, answer) in enumerate(turns):
        said.append({"from": "human", "value": f"<image>\n{question}" if number == 0 else question})
        said.append({"from": "gpt", "value": answer})
    return {"id": name_of(scene), "image": f"{name_of(scene)}.png", "conversations": said}


def write_folder(folder: str | Path, scenes: Sequence[Scene], *, turns: int = 6) -> Path:
    """Writes `images/*.png`, `masks/*.png`, `captions.json` (stage 1), `questions.json` (stage 2) and `labels.json`.

    `labels.json` holds `images` (file names), `labels` ({target: one class a picture, in that order}) and the names
    of the `asked` and `unasked` targets. The same scenes write the same bytes.

    Raises:
        ValueError: the folder exists and is not empty, or no scenes.
    """
    folder = Path(folder)
    if not scenes:
        raise ValueError("no scenes to write; give at least one, as from draw_scenes(seed, count)")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; give a new folder, or empty this one")
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    pictures, masks = render(scenes)
    for scene, pixels, mask in zip(scenes, pictures, masks, strict=True):
        Image.fromarray(pixels).save(folder / "images" / f"{name_of(scene)}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{name_of(scene)}.png")
    truth = [scene.labels() for scene in scenes]
    asked = {scene: [(t.question, t.answer) for t in questions(scene, turns)] for scene in scenes}
    contents = {
        "captions.json": [conversation(scene, [(CAPTION_REQUEST, caption(scene))]) for scene in scenes],
        "questions.json": [conversation(scene, asked[scene]) for scene in scenes],
        "labels.json": {
            "images": [f"{name_of(scene)}.png" for scene in scenes],
            "labels": {target: [row[target] for row in truth] for target in (*ASKED, *UNASKED)},
            "asked": list(ASKED),
            "unasked": list(UNASKED),
        },
    }
    for name, content in contents.items():
        write_file(folder / name, json.dumps(content, indent=1) + "\n")
    return folder


def remove_folder(folder: Path) -> None:
    """Remove what `write_folder` wrote.

    Raises:
        FileExistsError: the folder holds anything else; nothing is removed then.
    """
    present = {path.name for path in folder.iterdir()}
    foreign = sorted(name for name in present - _WRITTEN if not HALF.fullmatch(name))  # a half: killed while writing
    for part in ("images", "masks"):
        if (folder / part).is_dir():
            foreign += sorted(p.name for p in (folder / part).iterdir() if not _PICTURE.fullmatch(p.name))
    if foreign:
        raise FileExistsError(
            f"'{folder}' holds files that are not the testbed's ({', '.join(foreign[:3])}); nothing was removed. "
            "Choose another folder, or move them away"
        )
    shutil.rmtree(folder)


def vqa_items(scenes: Sequence[Scene], turns: int = 6) -> list[Question]:
    """The scenes' questions as items for `keepsight.evaluation`: bare answers, with pictures, by scene."""
    items = []
    for scene, pixels in zip(scenes, render(scenes)[0], strict=True):
        image = Image.fromarray(pixels)
        for turn in questions(scene, turns):
            name = name_of(scene)
            items.append(Question(turn.question, turn.answer, image, turn.kind, picture=name))
    return items
