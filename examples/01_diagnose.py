"""Look inside a model: what is left of a picture at every layer.

python examples/01_diagnose.py            # the tiny testbed model, offline
python examples/01_diagnose.py MODEL DIR  # any image-text-to-text checkpoint, and a folder of pictures
"""

import sys
from pathlib import Path

import rich
from PIL import Image

import keepsight
from keepsight.testbed.drawing import render
from keepsight.testbed.models import build_vlm
from keepsight.testbed.scenes import draw_scenes
from keepsight.vlm.load import load_model

if len(sys.argv) == 3:
    model, processor = load_model(sys.argv[1])
    pictures, labels, masks = sys.argv[2], None, None  # labels are the names of the subfolders
else:
    model, processor = build_vlm()
    scenes = draw_scenes(seed=7, count=240)
    pixels, masks = render(scenes)
    pictures = [Image.fromarray(array) for array in pixels]
    # Two things one may want to read off a picture: one that questions ask about, one that they never do.
    labels = {name: [scene.labels()[name] for scene in scenes] for name in ("top_left_color", "texture")}
    masks = list(masks)

result = keepsight.diagnose(model, processor, pictures, labels=labels, masks=masks)
rich.print(result.table())
depth = result.info["depth"]

for row in result.rows:
    # There are controls, in `variant`, and the same without sinks, in `tokens`.
    if (row.metric, row.variant, row.tokens) == ("probe_accuracy", "", "all") and row.layer in (0, depth // 2, depth):
        print(f"{row.target:16s} layer {row.layer:2d}: {row.value:.2f} [{row.low:.2f}, {row.high:.2f}]")
print(result.report(Path("runs") / "example-diagnosis.html"))
