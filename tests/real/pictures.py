"""A small labelled picture set with exact masks: emoji glyphs on photographs, with captions and questions.

    python -m tests.real.pictures OUT --train 800 --test 240

writes

    OUT/train/, OUT/test/   images/<category of the main object>/<name>.png    an ImageFolder
                            masks/<category>/<name>.png                        0 background, 1… objects
                            captions.json, questions.json                      LLaVA conversations
                            labels.json                                        label sets for `keepsight diagnose`
    OUT/test/eval.json      the questions one by one, for scoring answers

Each picture holds one to three glyphs of different categories, in different quadrants; the largest is the main
object. Questions ask for category, place, number and presence. No question ever asks for the photograph behind or the
colour that it is tinted in: what language does not ask for is what should fade. The same seed gives the same pixels.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from tests.real.fetch import Parts, fetch

SIDE = 128
MAIN, OTHER = (54, 60), (36, 44)  # glyph sides in pixels, within a quadrant of 64
GLYPH_SIZE = 109  # the only size in the font
OPAQUE = 128  # alpha from which a pixel belongs to the object
PLACES = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("no", "one", "two", "three")
CATEGORIES = {
    "animal": "🐶🐱🐭🐰🦊🐼🐷🐸",
    "fruit": "🍎🍐🍋🍌🍉🍇🍓🍍",
    "vehicle": "🚗🚕🚌🚑🚒🚚🚜🛵",
    "flower": "🌷🌹🌺🌻🌼🌸",
    "building": "🏠🏡🏢🏥🏦🏫🏰⛪",
    "ball": "⚽🏀🏈⚾🏐🎱",
    "clock": "⏰🕰⌚🕐🕓⏱",
    "face": "😀😎😍😡😭😱🤔",
}
TINTS = ("red", "green", "blue")
ASKED, UNASKED = ("category", "count"), ("photograph", "tint")
DESCRIBE = "Describe the picture."


@dataclass(frozen=True)
class Thing:
    """One glyph in a picture: its category, which glyph of it, its quadrant (index into PLACES)."""

    category: str
    glyph: int
    place: int

    @property
    def name(self) -> str:
        return ("an " if self.category[0] in "aeiou" else "a ") + self.category


@dataclass(frozen=True)
class Scene:
    """What is in one picture; `things[0]` is the main object."""

    name: str
    things: tuple[Thing, ...]
    photograph: str
    tint: int  # index into TINTS
    pixels: np.ndarray  # [SIDE, SIDE, 3] uint8
    mask: np.ndarray  # [SIDE, SIDE] uint8: 1 + index into things


class Painter:
    """Draws scenes from the fetched font and photographs."""

    def __init__(self, parts: Parts) -> None:
        font = ImageFont.truetype(str(parts.font), GLYPH_SIZE)
        self.glyphs = {name: [_glyph(font, glyph) for glyph in glyphs] for name, glyphs in CATEGORIES.items()}
        self.photographs = {path.stem: Image.open(path).convert("L") for path in sorted(parts.photographs.iterdir())}

    def scene(self, name: str, rng: np.random.Generator) -> Scene:
        photograph = str(rng.choice(list(self.photographs)))
        tint = int(rng.integers(len(TINTS)))
        canvas = self._background(photograph, tint, rng)
        mask = np.zeros((SIDE, SIDE), np.uint8)
        count = int(rng.integers(1, 4))
        categories = rng.permutation(list(CATEGORIES))[:count]
        places = rng.permutation(4)[:count]
        things = []
        for index, (category, place) in enumerate(zip(categories, places, strict=True)):
            glyph = int(rng.integers(len(self.glyphs[category])))
            things.append(Thing(str(category), glyph, int(place)))
            side = int(rng.integers(*(MAIN if index == 0 else OTHER), endpoint=True))
            drawn = ImageOps.contain(self.glyphs[category][glyph], (side, side), Image.Resampling.LANCZOS)
            room = np.array([SIDE // 2 - drawn.width, SIDE // 2 - drawn.height])
            x, y = np.array([place % 2, place // 2]) * (SIDE // 2) + rng.integers(0, room, endpoint=True)
            canvas.paste(drawn, (int(x), int(y)), drawn)
            covered = np.asarray(drawn.getchannel("A")) >= OPAQUE
            mask[y : y + drawn.height, x : x + drawn.width][covered] = index + 1
        return Scene(name, tuple(things), photograph, tint, np.asarray(canvas), mask)

    def _background(self, name: str, tint: int, rng: np.random.Generator) -> Image.Image:
        grey = self.photographs[name]
        side = int(rng.integers(SIDE, min(grey.size), endpoint=True))
        x, y = (int(rng.integers(0, length - side, endpoint=True)) for length in grey.size)
        crop = grey.crop((x, y, x + side, y + side)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        if rng.random() < 0.5:
            crop = ImageOps.mirror(crop)
        levels = np.asarray(crop, np.float32)
        levels = (levels - levels.mean()) / max(float(levels.std()), 1.0) * rng.uniform(25, 45) + rng.uniform(90, 160)
        channels = rng.uniform(0.75, 1.0, size=3).astype(np.float32)
        channels[tint] = rng.uniform(1.1, 1.25)
        return Image.fromarray(np.clip(levels[:, :, None] * channels, 0, 255).astype(np.uint8))


def _glyph(font: ImageFont.FreeTypeFont, character: str) -> Image.Image:
    """One glyph, cropped to what is drawn."""
    image = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(image).text((10, 10), character, font=font, embedded_color=True)
    box = image.getchannel("A").getbbox()
    if box is None:
        raise RuntimeError(f"the emoji font draws nothing for {character!r}: is Pillow built with PNG glyph support?")
    return image.crop(box)


def caption(scene: Scene) -> str:
    """Number, then each object with its place, in reading order."""
    ordered = sorted(scene.things, key=lambda thing: thing.place)
    said = [f"{thing.name} at the {PLACES[thing.place]}" for thing in ordered]
    return f"The picture shows {' and '.join(said)}."


def questions(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """(kind, question, answer): eight turns in random order; yes and no are equally frequent."""
    filled = {thing.place: thing.category for thing in scene.things}
    turns = [("what", f"What is at the {name}?", filled.get(place, "nothing")) for place, name in enumerate(PLACES)]
    placed = scene.things[int(rng.integers(len(scene.things)))]
    turns.append(("where", f"Where is the {placed.category}?", PLACES[placed.place]))
    turns.append(("count", "How many objects are there?", NUMBERS[len(scene.things)]))
    present = {thing.category for thing in scene.things}
    for answer, categories in (("yes", present), ("no", set(CATEGORIES) - present)):
        category = str(rng.choice(sorted(categories)))
        article = "an" if category[0] in "aeiou" else "a"
        turns.append(("presence", f"Is there {article} {category}?", answer))
    return [turns[i] for i in rng.permutation(len(turns))]


def conversation(scene: Scene, turns: list[tuple[str, str]]) -> dict[str, Any]:
    said = []
    for number, (question, answer) in enumerate(turns):
        said.append({"from": "human", "value": f"<image>\n{question}" if number == 0 else question})
        said.append({"from": "gpt", "value": answer})
    return {"id": scene.name, "image": f"{scene.things[0].category}/{scene.name}.png", "conversations": said}


def write_split(folder: Path, painter: Painter, count: int, seed: int) -> None:
    """`count` pictures with masks, conversations, labels and single questions under `folder`."""
    streams = np.random.SeedSequence(seed).spawn(2 * count)
    scenes, captions, asked, single = [], [], [], []
    for index in range(count):
        scene = painter.scene(f"{seed:03d}-{index:05d}", np.random.default_rng(streams[2 * index]))
        scenes.append(scene)
        for kind, pixels in (("images", scene.pixels), ("masks", scene.mask)):
            path = folder / kind / scene.things[0].category / f"{scene.name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
        turns = questions(scene, np.random.default_rng(streams[2 * index + 1]))
        captions.append(conversation(scene, [(DESCRIBE, caption(scene))]))
        asked.append(conversation(scene, [(question, answer) for _, question, answer in turns]))
        for kind, question, answer in turns:
            single.append({"image": asked[-1]["image"], "kind": kind, "question": question, "answer": answer})
    of = {
        "category": lambda scene: scene.things[0].category,
        "count": lambda scene: NUMBERS[len(scene.things)],
        "photograph": lambda scene: scene.photograph,
        "tint": lambda scene: TINTS[scene.tint],
    }
    names = [entry["image"] for entry in asked]
    labels = {
        target: {name: of[target](scene) for name, scene in zip(names, scenes, strict=True)}
        for target in (*ASKED, *UNASKED)
    }
    contents = {"captions": captions, "questions": asked, "labels": labels, "eval": single}
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write(out: Path, parts: Parts, *, train: int, test: int, seed: int = 0) -> Path:
    """Both splits under `out`, which must not exist yet; it appears only when it is whole."""
    if out.exists():
        raise FileExistsError(f"{out} exists; give a new folder or remove it")
    building = out.with_name(f".{out.name}-building")
    painter = Painter(parts)
    write_split(building / "train", painter, train, 2 * seed)
    write_split(building / "test", painter, test, 2 * seed + 1)
    building.rename(out)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the picture set of the real test.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=int, default=800)
    parser.add_argument("--test", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(write(options.out, fetch(), train=options.train, test=options.test, seed=options.seed))
