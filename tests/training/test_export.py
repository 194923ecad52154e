"""What `keepsight export` writes is the trained model, for plain transformers or PEFT, and nothing else."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, TrainerCallback

from keepsight import cli
from keepsight.pre import PReConfig
from keepsight.results import RunDirectory, StorageError
from keepsight.training import export as module
from keepsight.training.card import model_card
from keepsight.training.config import DataConfig, LoraConfig, ModelConfig, StageConfig, TrainConfig
from keepsight.training.export import ExportError, export
from keepsight.training.recipe import train
from keepsight.training.record import start
from tests.tiny_processors import make_llava, save_llava
from tests.training.test_conversations import entry

LORA = LoraConfig(rank=4, dropout=0.25)


@torch.no_grad()
def answers(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a picture with a question, and what is generated from it."""
    was = model.training
    model.eval()
    inputs = make_llava()(images=[Image.new("RGB", (16, 16), "red")], text="<image> what color ?", return_tensors="pt")
    found = model(**inputs).logits, model.generate(**inputs, max_new_tokens=8, do_sample=False, min_new_tokens=8)
    model.train(was)
    return found


class Watch(TrainerCallback):
    """What the training model itself answers, at each checkpoint and at the end."""

    seen: ClassVar[dict[str, Any]] = {}
    stop_at: int | None = None

    def on_save(self, args, state, control, model=None, **kwargs) -> None:
        random = torch.get_rng_state()
        self.seen[f"{Path(args.output_dir).name}:{state.global_step}"] = answers(model)
        torch.set_rng_state(random)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if Path(args.output_dir).name == "full" and state.global_step == self.stop_at:
            raise KeyboardInterrupt


def setting(folder: Path, name: str, **changes: Any) -> TrainConfig:
    for color in ("red", "blue"):
        Image.new("RGB", (16, 16), color).save(folder / f"{color}.png")
    entries = [entry("<image>\nwhat color ?", color, image=f"{color}.png") for color in ("red", "blue")] * 4
    (folder / "data.json").write_text(json.dumps(entries), encoding="utf-8")
    if not (folder / "start").is_dir():
        save_llava(folder / "start")
    both = ("projector", "language_model")
    given: dict[str, Any] = {
        "model": ModelConfig(path=str(folder / "start")),
        "data": DataConfig(conversations=str(folder / "data.json"), image_folder=str(folder), cache_megabytes=10),
        "out": str(folder / name),
        "projector": StageConfig(batch_size=4, max_steps=2, lr=1e-2),
        "full": StageConfig(train=both, batch_size=4, max_steps=4, lr=3e-2, projector_lr=1e-2),
        "trainer": {"use_cpu": True, "disable_tqdm": True, "logging_steps": 1},
        "save_steps": 2,
    }
    return TrainConfig(**{**given, **changes})


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, tuple[Path, Any]]:
    """Finished and stopped runs, without and with LoRA, each with what its training model answered."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for name, lora in (("plain", LoraConfig()), ("lora", LORA)):
        watch = Watch()
        watch.seen = {}
        train(setting(folder, name, lora=lora), callbacks=[watch])
        found[name] = folder / name, watch.seen["full:4"]
        watch.stop_at, stopped = 3, f"{name}-stopped"
        with pytest.raises(KeyboardInterrupt):
            train(setting(folder, stopped, lora=lora), callbacks=[watch])
        found[stopped] = folder / stopped, watch.seen["full:2"]
    return found


def same(answer: Any, expected: Any, *, exact: bool) -> None:
    (logits, generated), (its_logits, its_generated) = answer, expected
    assert torch.equal(generated, its_generated)
    assert torch.equal(logits, its_logits) if exact else torch.allclose(logits, its_logits, atol=2e-6)


@pytest.mark.parametrize("name", ["plain", "lora", "plain-stopped", "lora-stopped"])
@pytest.mark.slow
def test_it_is_the_training_model_in_plain_transformers(runs, tmp_path, name) -> None:
    run, expected = runs[name]
    out = export(run, tmp_path / "out", unfinished="stopped" in name)
    model, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    # Merged matrices are added up before the product, so the last digits differ.
    same(answers(model), expected, exact="lora" not in name)
    start = answers(AutoModelForImageTextToText.from_pretrained(run.parent / "start"))
    assert not torch.allclose(start[0], expected[0], atol=1e-2)
    assert AutoProcessor.from_pretrained(out).chat_template == make_llava().chat_template
    written = "".join(load_file(out / "model.safetensors"))
    assert "keepsight" not in written
    assert "lora" not in written
    assert {file.name for file in out.iterdir()} == {file.name for file in (run.parent / "plain/model").iterdir()} | {
        "README.md"
    }


@pytest.mark.parametrize("name", ["lora", "lora-stopped"])
@pytest.mark.slow
def test_the_adapter_on_its_base_is_the_training_model(runs, tmp_path, name) -> None:
    peft = pytest.importorskip("peft")
    run, expected = runs[name]
    out = export(run, tmp_path / "out", form="adapter", unfinished="stopped" in name)
    base = AutoModelForImageTextToText.from_pretrained(run.parent / "start")
    same(answers(peft.PeftModel.from_pretrained(base, out)), expected, exact=True)
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(run.parent / "start")
    assert settings["modules_to_save"] == ["model.multi_modal_projector"]
    assert not any("vision" in key or "keepsight" in key for key in load_file(out / "adapter_model.safetensors"))
    assert sorted(file.name for file in out.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.slow
def test_the_card_says_what_the_run_was(runs, tmp_path) -> None:
    run, _ = runs["lora"]
    card = ModelCard.load(export(run, tmp_path / "out") / "README.md")
    assert card.data.tags == ["keepsight", "predictive-regularization"]
    assert card.data.pipeline_tag == "image-text-to-text"
    assert card.data.library_name == "transformers"
    assert card.data.base_model is None  # a folder of this machine is no model of the hub
    saved = RunDirectory.open(run)
    last = [json.loads(line) for line in (run / "curves.jsonl").read_text().splitlines()][-1]
    for said in (
        "λ = 0.5, layer 2 of 4, anchor pre_llm, patch cosine",
        "| full | projector, LoRA | `" + str(run.parent / "data.json"),
        "| 4 | 4 | 0.03 (projector 0.01) | 0.5 |",
        "rank 4, alpha 8, dropout 0.25, on all linear layers of the language model",
        f"| full | 4 | {last['lm_loss']:.4f} | {last['pre_loss']:.4f} | {last['pre_cosine']:.4f} |",
        f"command: `{saved.info['command']}`",
        f"torch {torch.__version__}",
        "seed: 0",
    ):
        assert said in card.text, said
    block = card.text.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(block) == yaml.safe_load((run / "config.yaml").read_text())


@pytest.mark.slow
def test_a_run_without_pre_is_exported_as_the_baseline_it_is(tmp_path) -> None:
    off = StageConfig(enabled=False)
    train(setting(tmp_path, "run", pre=PReConfig(weight=0.0), projector=off))
    card = ModelCard.load(export(tmp_path / "run", tmp_path / "out") / "README.md")
    assert "without predictive regularization (λ = 0): a baseline" in card.text
    assert card.data.tags == ["keepsight"]
    assert "| full | 4 |" in card.text


@pytest.mark.parametrize(
    ("run_weight", "stage_weights", "said"),
    [(0.0, (None, 0.25), "λ = 0.25, "), (0.5, (0.125, None), "λ = 0.125 and 0.5, "), (0.5, (0.0, None), "λ = 0.5, ")],
)
def test_the_card_names_the_weights_of_the_stages(tmp_path, run_weight, stage_weights, said) -> None:
    off, both = StageConfig(max_steps=2, pre_weight=stage_weights[0]), ("projector", "language_model")
    stages = {"projector": off, "full": StageConfig(train=both, max_steps=2, pre_weight=stage_weights[1])}
    config = setting(tmp_path, "run", pre=PReConfig(weight=run_weight), **stages)
    card = model_card(start(config), config, [], form="merged", steps=None)
    assert f"with predictive regularization: {said}layer middle" in card.text


@pytest.mark.slow
def test_hub_names_are_in_the_front_matter(runs, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["plain"][0], run)
    written = yaml.safe_load((run / "config.yaml").read_text())
    written["model"]["path"] = "some-lab/some-vlm"
    written["data"] = {"dataset": "some-lab/some-data"}
    (run / "config.yaml").write_text(yaml.safe_dump(written))
    data = ModelCard.load(export(run, tmp_path / "out") / "README.md").data
    assert (data.base_model, data.datasets) == (["some-lab/some-vlm"], ["some-lab/some-data"])


@pytest.mark.slow
def test_the_command(runs, tmp_path, capsys) -> None:
    assert cli.main(["export", str(runs["plain"][0]), str(tmp_path / "out")]) == 0
    assert "model card" in capsys.readouterr().out
    assert cli.main(["export", str(runs["plain"][0]), str(tmp_path / "out")]) == 2
    assert "is not empty (README.md, chat_template.jinja, config.json, …). Choose a new" in capsys.readouterr().err


@pytest.mark.slow
def test_what_cannot_be_exported(runs, tmp_path) -> None:
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match="holds no run"):
        export(tmp_path, out)
    RunDirectory.create(tmp_path / "diagnosis", label="a", kind="diagnosis")
    with pytest.raises(ExportError, match="holds a diagnosis, not a training"):
        export(tmp_path / "diagnosis", out)
    with pytest.raises(ExportError, match=r"has not ended: go on with .*--resume.*with --unfinished"):
        export(runs["plain-stopped"][0], out)
    with pytest.raises(ExportError, match="without LoRA, so it has no adapter"):
        export(runs["plain"][0], out, form="adapter")
    broken = tmp_path / "broken"
    shutil.copytree(runs["plain-stopped"][0], broken)
    shutil.rmtree(broken / "stages")
    with pytest.raises(ExportError, match="holds no whole checkpoint"):
        export(broken, out, unfinished=True)
    lost = tmp_path / "lost"
    shutil.copytree(runs["plain"][0], lost)
    shutil.rmtree(lost / "model")
    with pytest.raises(ExportError, match="is missing or empty, though the run has ended"):
        export(lost, out)
    (lost / "config.yaml").unlink()
    with pytest.raises(ExportError, match=r"config.yaml' is missing"):
        export(lost, out)
    assert not out.exists()


@pytest.mark.slow
def test_a_base_model_that_has_changed_is_noticed(runs, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["plain-stopped"][0], run)
    written = yaml.safe_load((run / "config.yaml").read_text())
    written["model"]["path"] = str(runs["plain"][0] / "model")
    (run / "config.yaml").write_text(yaml.safe_dump(written))
    with pytest.raises(ExportError, match="its weights differ"):
        export(run, tmp_path / "out", unfinished=True)


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_in_rust(*_: Any, **__: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("name", "owner", "what", "fails"),
    [
        ("plain", shutil, "copy2", full),
        ("plain", module, "write_file", full),
        ("plain-stopped", PreTrainedModel, "save_pretrained", full_in_rust),
        ("lora-stopped", PreTrainedModel, "save_pretrained", full),
    ],
)
@pytest.mark.slow
def test_a_full_disk_leaves_nothing(runs, tmp_path, monkeypatch, name, owner, what, fails) -> None:
    monkeypatch.setattr(owner, what, fails)
    with pytest.raises(StorageError, match=r"out': the disk is full: free some space"):
        export(runs[name][0], tmp_path / "deep" / "out", unfinished="stopped" in name)
    assert not (tmp_path / "deep").exists()


@pytest.mark.slow
def test_too_little_room_is_seen_before_anything_is_written(runs, tmp_path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setattr(shutil, "copy2", None)
    with pytest.raises(StorageError, match="the disk is full"):
        export(runs["plain"][0], tmp_path / "out")


@pytest.mark.slow
def test_a_model_put_together_has_no_base_for_an_adapter(runs, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["lora"][0], run)
    written = yaml.safe_load((run / "config.yaml").read_text())
    written["model"] |= {"path": None, "vision": "a", "language": "b"}
    (run / "config.yaml").write_text(yaml.safe_dump(written))
    with pytest.raises(ExportError, match="put together from a and b, so there is no checkpoint that an adapter"):
        export(run, tmp_path / "out", form="adapter")
