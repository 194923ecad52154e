"""Every recipe: at its real sizes on the meta device, and two steps a stage on look-alikes of the same depth."""

import math
import re
import shlex
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from keepsight.commands.train import parse
from keepsight.pre import anchors, attach
from keepsight.pre.config import PReConfig
from keepsight.training.arguments import check_trainer_settings
from keepsight.training.config import TrainConfig
from keepsight.training.freeze import parts, train_only
from keepsight.training.recipe import train
from keepsight.training.record import read_curves
from keepsight.vlm import assemble
from tests.training import lookalikes
from tests.training.lookalikes import ANCHORS, CLIP, QWEN, REAL, SIGLIP, TOKENS, VICUNA

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
BASE = RECIPES / "clip-vicuna-7b.yaml"
PAPER, ABLATIONS = sorted((RECIPES / "paper").glob("*.yaml")), sorted((RECIPES / "ablations").glob("*.yaml"))
MODELS = {(CLIP, VICUNA): [], (CLIP, QWEN): ["qwen2.5-7b"], (SIGLIP, VICUNA): ["siglip2"]}
MODELS |= {(SIGLIP, QWEN): ["siglip2", "qwen2.5-7b"]}
# By hand: weights and biases of two layers from the encoder's width to the decoder's.
PROJECTOR = {
    (CLIP, VICUNA): 20_979_712,
    (CLIP, QWEN): 16_522_240,
    (SIGLIP, VICUNA): 21_504_000,
    (SIGLIP, QWEN): 16_980_992,
}
# As published, plus the row of the placeholder, which Vicuna's table has no room for, in embedding and output layer.
LANGUAGE = {VICUNA: 6_738_415_616 + 2 * 4096, QWEN: 7_615_616_512}
ENCODER = {CLIP: 303_507_456, SIGLIP: 428_225_600}
VISUAL = {CLIP: 576, SIGLIP: 729}


def recipe(*names: str) -> list[str]:
    found = {path.stem: str(path) for path in (*PAPER, *ABLATIONS)}
    return [str(BASE), *(found[name] for name in names)]


ARMS = [[*overrides, *encoder] for overrides in MODELS.values() for encoder in ([], ["trainable-encoder"])]
ARMS += [[path.stem] for path in ABLATIONS] + [["trainable-encoder", "anchor-first-encoder"]]
each_arm = pytest.mark.parametrize("arm", ARMS, ids=lambda arm: "+".join(arm) or "clip-vicuna-7b")


@cache
def real(vision: str, language: str) -> tuple[Any, Any]:
    """`assemble` on parts of the published sizes without values; what needs values is left out."""
    sides = {CLIP: 336, SIGLIP: 384}
    with torch.device("meta"):
        see = lookalikes.encoder(vision, REAL[vision])
        speak = lookalikes.language_model(language, REAL[language])
    with pytest.MonkeyPatch.context() as patch:
        read = (see, lookalikes.pictures_of(vision, sides[vision]))
        patch.setattr(assemble, "load_vision", lambda *_: read)
        patch.setattr(assemble, "load_language", lambda *_: (speak, lookalikes.tokenizer(TOKENS[language])))
        patch.setattr(assemble, "mean_embedding_norm", lambda *_: 1.0)
        patch.setattr(assemble, "initialise_projector", lambda *_: None)
        patch.setattr(assemble, "_check_same_logits", lambda *_: None)
        return assemble.assemble(vision, language)


def built(config: TrainConfig) -> tuple[Any, Any]:
    assert config.model.vision is not None
    assert config.model.language is not None
    return real(config.model.vision, config.model.language)


@pytest.mark.parametrize("names", MODELS, ids=lambda names: "+".join(name.split("/")[1] for name in names))
@pytest.mark.slow
def test_the_papers_models_have_their_published_sizes(names):
    config = parse(recipe(*MODELS[names]))
    model, processor = built(config)
    vision, language = names
    assert (config.model.vision, config.model.language) == names
    sizes = {part: sum(p.numel() for p in found) for part, found in parts(model).items()}
    assert sizes == {"projector": PROJECTOR[names], "language_model": LANGUAGE[language], "encoder": ENCODER[vision]}
    text = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])
    batch = processor(text=text, images=Image.new("RGB", (640, 480)), return_tensors="pt")
    assert int((batch["input_ids"] == model.config.image_token_id).sum()) == VISUAL[vision]
    features = model.model.vision_tower(batch["pixel_values"].to("meta"), output_hidden_states=True).hidden_states[-2]
    kept = features[:, 1:] if model.config.vision_feature_select_strategy == "default" else features
    assert kept.shape == (1, VISUAL[vision], REAL[vision]["hidden_size"])


@each_arm
@pytest.mark.slow
def test_each_stage_at_the_real_sizes(arm, monkeypatch):
    """What learns, where the heads sit and how large they are."""
    config = parse(recipe(*arm))
    check_trainer_settings(config.trainer)
    assert config.out == "runs/" + "+".join(["clip-vicuna-7b", *arm])
    model, _ = built(config)
    vision, language = config.model.vision, config.model.language
    width, depth = REAL[language]["hidden_size"], REAL[language]["num_hidden_layers"]
    monkeypatch.setattr(anchors, "ExternalEncoder", lambda name, _: SimpleNamespace(width=ANCHORS[name]))
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda weight, *_, **__: weight)  # 33 million numbers a head, unused
    learns = {
        "projector": PROJECTOR[vision, language],
        "full": PROJECTOR[vision, language] + LANGUAGE[language] + ("trainable-encoder" in arm) * ENCODER[vision],
    }
    assert config.stages().keys() == {"projector", "full"}
    for name, stage in config.stages().items():
        assert train_only(model, stage.train) == learns[name]
    with attach(model, config.pre) as handle:
        several = {"three-layers", "cascade"} & set(arm)
        middle = {VICUNA: 16, QWEN: 14}[language]
        assert handle.layers == ([8, 16, 24] if several else [depth] if "last-layer" in arm else [middle])
        external = {"anchor-dinov2": 1024, "viral": 768}
        before = {"anchor-pre-projector", "anchor-first-encoder"} & set(arm)
        target = next((external[name] for name in arm if name in external), 0)
        target = target or (REAL[vision]["hidden_size"] if before else width)
        one = width * width + width + width * target + target
        assert sum(p.numel() for p in handle.parameters()) == len(handle.layers) * one
        assert all(p.requires_grad == config.pre.active for p in handle.parameters())


def test_every_value_says_whose_it_is():
    published = {"batch_size": (256, 128), "lr": (1e-3, 2e-5), "micro_batch_size": (32, 16), "epochs": (1, 1)}
    published |= {"warmup_ratio": (0.03, 0.03), "lr_scheduler": ("cosine", "cosine"), "weight_decay": (0, 0)}
    config = parse([str(BASE)])
    for field, values in published.items():
        assert (getattr(config.projector, field), getattr(config.full, field)) == values
    assert (config.projector.train, config.full.train) == (("projector",), ("projector", "language_model"))
    assert (config.max_length, config.trainer["bf16"], config.pre) == (2048, True, PReConfig())
    for line in BASE.read_text(encoding="utf-8").split("model:\n", 1)[1].splitlines():
        if re.match(r"  \w+: \S", line) and not line.strip().startswith("dtype"):
            assert re.search(r"\[(paper|LLaVA|ours)\]", line), line


@pytest.mark.parametrize("path", [*PAPER, *ABLATIONS], ids=lambda path: path.stem)
@pytest.mark.slow
def test_overrides_open_with_their_command_and_say_whose_they_are(path):
    first, *rest = path.read_text(encoding="utf-8").splitlines()
    assert first == f"# keepsight train recipes/clip-vicuna-7b.yaml {path.relative_to(ROOT).as_posix()}"
    comment = " ".join(line for line in rest if line.startswith("#"))
    assert "[paper]" in comment or "[ours]" in comment
    assert parse(shlex.split(first.removeprefix("# keepsight train "))) != parse([str(BASE)])


@pytest.mark.slow
def test_the_readme_lists_every_recipe_and_its_commands_parse(monkeypatch):
    monkeypatch.chdir(ROOT)
    page = (RECIPES / "README.md").read_text(encoding="utf-8")
    for path in (*PAPER, *ABLATIONS):
        assert f"recipes/{path.parent.name}/{path.name}" in page
    block = page.split("```bash\n")[1].split("```")[0].replace("\\\n", " ")
    shown = [line.removeprefix("keepsight train ") for line in block.splitlines()]
    tables = [part for row in page.splitlines() if row.startswith("|") for part in re.findall(r"`([^`]+)`", row)]
    assert len(shown) == 3
    assert len(tables) > 30
    for flags in [*shown, *(f"recipes/clip-vicuna-7b.yaml {cell}" for cell in tables)]:
        parse(shlex.split(flags, comments=True))


def test_a_later_file_overrides_and_a_flag_overrides_all(tmp_path):
    later = tmp_path / "later.yaml"
    later.write_text("pre: {weight: 0.25}\nfull: {lr: 1.0e-5}\n", encoding="utf-8")
    found = parse([*recipe("last-layer"), str(later), "--full.batch-size", "64"])
    assert (found.pre.layer, found.pre.weight) == ("last", 0.25)
    assert (found.full.lr, found.full.batch_size, found.full.micro_batch_size) == (1e-5, 64, 16)
    assert found.out == "runs/clip-vicuna-7b+last-layer+later"
    assert parse([f"--config={BASE}", "--out", "elsewhere"]).out == "elsewhere"
    assert parse([f"--config={BASE}"]).out == "runs/clip-vicuna-7b"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[dict[str, str], list[str]]:
    folder = tmp_path_factory.mktemp("lookalikes")
    return lookalikes.write_small_parts(folder), lookalikes.write_data(folder)


@pytest.mark.slow
@each_arm
def test_each_recipe_trains_on_a_lookalike(arm, small, tmp_path):
    places, data = small
    wanted = parse(recipe(*arm))
    flags = [*data, "--out", str(tmp_path / "run"), "--save-steps", "null"]
    flags += ["--model.vision", places[wanted.model.vision], "--model.language", places[wanted.model.language]]
    for stage in ("projector", "full"):
        flags += [f"--{stage}.max-steps", "2", f"--{stage}.batch-size", "2", f"--{stage}.micro-batch-size", "2"]
    for setting in ("use_cpu=true", "disable_tqdm=true", "dataloader_num_workers=0", "logging_steps=1"):
        flags.append(f"--trainer.{setting}")
    if wanted.pre.anchor_model is not None:
        flags += ["--pre.anchor-model", places[wanted.pre.anchor_model]]
    config = parse([*recipe(*arm), *flags])
    assert config.trainer["bf16"]
    assert config.trainer["gradient_checkpointing"]
    run = train(config)
    assert run.info["finished"]
    curves = [row for row in read_curves(run.path) if "lm_loss" in row]
    assert [row["stage"] for row in curves] == ["projector"] * 2 + ["full"] * 2
    for row in curves:
        stage = config.stages()[row["stage"]]
        assert math.isfinite(row["lm_loss"])
        seen = stage.pre and config.pre.active
        assert ("pre_cosine" in row) is seen
        if seen:
            assert -1 <= row["pre_cosine"] <= 1
            assert row["pre_tokens"] == row["pre_images"] * 4 > 0
