"""The recipe end to end on a tiny LLaVA: what learns, what is written, what is left behind when it is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, TrainerCallback

from keepsight.images import ImageError
from keepsight.pre import PReConfig, handle_of
from keepsight.results import StorageError
from keepsight.results.storage import disk_error
from keepsight.training import recipe, stages
from keepsight.training.checkpoints import latest
from keepsight.training.config import ModelConfig, StageConfig, TrainConfig
from keepsight.training.conversations import ConversationError
from keepsight.training.freeze import parts, train_only
from keepsight.training.recipe import train
from keepsight.training.record import read_curves
from tests.tiny import FAMILIES, llava
from tests.tiny_processors import make_llava
from tests.training.conftest import FULL, STEPS
from tests.training.test_conversations import entry


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def changed(setting: dict[str, Any], run: Any) -> set[str]:
    before, after = weights(Path(setting["model"].path)), weights(run.path / "model")
    assert before.keys() == after.keys()
    assert any("multi_modal_projector" in name for name in before)
    found = ("multi_modal_projector", "vision_tower", "language_model")
    return {part for part in found for name in before if part in name and not torch.equal(before[name], after[name])}


def test_two_stages_leave_a_plain_checkpoint(setting) -> None:
    run = train(TrainConfig(**setting))
    model, info = AutoModelForImageTextToText.from_pretrained(run.path / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert handle_of(model) is None
    processor = AutoProcessor.from_pretrained(run.path / "model")
    assert processor.chat_template == make_llava().chat_template
    curves = read_curves(run.path)
    assert [row["stage"] for row in curves if "lm_loss" in row] == ["projector"] * 3 + ["full"] * 3
    assert all(-1 <= row["pre_cosine"] <= 1 for row in curves if "lm_loss" in row)
    saved = json.loads((run.path / "run.json").read_text())
    assert saved["finished"] is True
    assert (saved["depth"], saved["width"], saved["pre_layer"], saved["seed"]) == (4, 32, 2, 0)
    assert saved["model"]["before"] != saved["model"]["fingerprint"]
    assert saved["counts"]["full: steps"] == 3
    written = yaml.safe_load((run.path / "config.yaml").read_text())
    assert written["full"]["lr"] == 3e-3
    assert written["pre"]["layer"] == "middle"


def test_text_alone_is_refused_before_anything_is_trained_unless_pre_is_off(setting, tmp_path) -> None:
    (tmp_path / "data.json").write_text(json.dumps([entry("hello", "world")] * 8), encoding="utf-8")
    with pytest.raises(
        ConversationError, match=r"none of the 8 entries for the stage 'projector' has a usable picture"
    ):
        train(TrainConfig(**setting))
    assert not Path(setting["out"]).exists()
    without = {name: replace(setting[name], pre=False, max_steps=1) for name in ("projector", "full")}
    assert train(TrainConfig(**{**setting, **without})).info["finished"]


@pytest.mark.slow
def test_each_stage_trains_its_parts_only(setting) -> None:
    off = StageConfig(enabled=False)
    first = train(TrainConfig(**{**setting, "full": off}))
    assert changed(setting, first) == {"multi_modal_projector"}
    second = train(TrainConfig(**{**setting, "projector": off, "out": setting["out"] + "2"}))
    assert changed(setting, second) == {"multi_modal_projector", "language_model"}
    encoder = StageConfig(train=("encoder",), batch_size=4, max_steps=2, lr=1e-2)
    third = train(TrainConfig(**{**setting, "projector": off, "full": encoder, "out": setting["out"] + "3"}))
    assert changed(setting, third) == {"vision_tower"}


@pytest.mark.slow
def test_weight_zero_is_one_field_and_the_stage_switch_the_same(setting) -> None:
    """λ = 0, and PRe switched off in both stages, give the same weights bit for bit; λ = 0.5 gives others."""
    zero = train(TrainConfig(**setting, pre=PReConfig(weight=0.0)))
    off = {
        "projector": StageConfig(**{**vars(STEPS), "pre": False}),
        "full": StageConfig(**{**vars(FULL), "pre": False}),
    }
    without = train(TrainConfig(**{**setting, **off, "out": setting["out"] + "2"}))
    with_pre = train(TrainConfig(**{**setting, "out": setting["out"] + "3"}))
    one, two, three = (weights(run.path / "model") for run in (zero, without, with_pre))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], three[name]) for name in one)
    assert zero.info["pre_layer"] is None
    assert with_pre.info["pre_layer"] == 2


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run(setting) -> None:
    first = train(TrainConfig(**setting))
    second = train(TrainConfig(**{**setting, "out": setting["out"] + "2"}))
    one, two = weights(first.path / "model"), weights(second.path / "model")
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = train(TrainConfig(**{**setting, "out": setting["out"] + "3", "seed": 1}))
    three = weights(other.path / "model")
    assert any(not torch.equal(one[name], three[name]) for name in one)


@pytest.mark.slow
def test_the_head_goes_on_from_stage_to_stage(setting, monkeypatch) -> None:
    heads = []
    trainer = stages.KeepsightTrainer

    class Watched(trainer):
        def train(self, *args, **kwargs):
            before = self.pre.head.up.weight.clone()
            result = super().train(*args, **kwargs)
            heads.append((before, self.pre.head.up.weight.clone()))
            return result

    monkeypatch.setattr(stages, "KeepsightTrainer", Watched)
    train(TrainConfig(**setting))
    assert not torch.equal(*heads[0])
    assert torch.equal(heads[0][1], heads[1][0])


def test_head_learning_rate_has_its_own_group(setting, monkeypatch) -> None:
    seen: list[list[tuple[int, float]]] = []
    trainer = stages.KeepsightTrainer

    class Watched(trainer):
        def create_optimizer(self, *args, **kwargs):
            optimizer = super().create_optimizer(*args, **kwargs)
            head = {id(p) for p in self.pre.parameters()}
            groups = [g for g in optimizer.param_groups if head & {id(p) for p in g["params"]}]
            seen.append([(len(g["params"]), g["lr"]) for g in groups])
            return optimizer

    monkeypatch.setattr(stages, "KeepsightTrainer", Watched)
    train(TrainConfig(**{**setting, "full": StageConfig(enabled=False)}, pre=PReConfig(head_lr=0.125)))
    assert seen == [[(4, 0.125)]]


class Steps(TrainerCallback):
    seen: ClassVar[list[int]] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seen.append(state.global_step)


@pytest.mark.slow
def test_two_arms_share_data_and_a_model_given_in_memory(setting) -> None:
    config = TrainConfig(**{**setting, "projector": StageConfig(enabled=False)})
    processor = make_llava()
    datasets = recipe._datasets(config, recipe._sources(config), processor)
    arms = []
    for name, weight in (("a", 0.0), ("b", 0.5)):
        given = {**setting, "projector": StageConfig(enabled=False), "out": f"{setting['out']}-{name}"}
        arm = TrainConfig(**given, pre=PReConfig(weight=weight))
        arms.append(train(arm, model=llava(patch=8), processor=processor, datasets=datasets, callbacks=[Steps()]))
    assert Steps.seen == [1, 2, 3] * 2
    assert len(datasets["full"]._cache) == 10
    on_disk = train(config)
    one, two = weights(arms[1].path / "model"), weights(on_disk.path / "model")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_broken_pictures_are_counted_in_the_run(setting, pictures: Path) -> None:
    whole = (pictures / "wide.png").read_bytes()
    (pictures / "blue.png").write_bytes(whole[: len(whole) // 2])
    run = train(TrainConfig(**setting, skip_broken=True))
    assert run.info["counts"]["full: unreadable image"] == 5
    assert run.info["skipped_full"][0] == "entry 1 (id 'a')"
    logged = [row for row in read_curves(run.path) if row["stage"] == "full"]
    assert logged[-1]["skipped_unreadable_image"] == 5
    with pytest.raises(ValueError, match=r"entry \d \(id 'a'\): image 'blue.png' cannot be read"):
        train(TrainConfig(**{**setting, "out": setting["out"] + "2"}))


@pytest.mark.parametrize("fault", ["data", "model", "layer", "trainer", "trainer's own"])
def test_a_refused_run_leaves_no_folder(setting, tmp_path: Path, fault: str) -> None:
    if fault == "data":
        (tmp_path / "data.json").write_text(json.dumps([entry("<image>", "red")]))
        expected = "1 <image> placeholder for 0 images"
    elif fault == "model":
        setting["model"] = ModelConfig(path=str(tmp_path / "nowhere"))
        expected = "nowhere' does not exist"
    elif fault == "layer":
        setting["pre"] = PReConfig(layer=9)
        expected = "9"
    elif fault == "trainer's own":  # it refuses this when it is built, as it does a tracker that is not installed
        setting["trainer"] = {**setting["trainer"], "eval_strategy": "epoch"}
        expected = "eval_dataset"
    else:
        setting["trainer"] = {"loging_steps": 1}
        expected = "near it are logging_steps"
    with pytest.raises((ValueError, FileNotFoundError), match=expected):
        train(TrainConfig(**setting))
    assert not Path(setting["out"]).exists()


@pytest.mark.parametrize("fault", ["memory", "max_length"])
def test_a_run_that_fails_in_its_first_step_leaves_no_folder(setting, monkeypatch, fault: str) -> None:
    """The corrected command, a smaller batch say, has another configuration, with which no run could be resumed."""
    config = TrainConfig(**setting)
    if fault == "memory":

        def full(self, *_, **__):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(stages.KeepsightTrainer, "training_step", full)
        expected: tuple[Any, str] = (torch.OutOfMemoryError, "out of memory")
    else:
        config = replace(config, max_length=2, skip_broken=True)
        expected = (ConversationError, r"none of the 10 entries can be used \(image cut off by max_length: 10\)")
    with pytest.raises(expected[0], match=expected[1]):
        train(config)
    assert not Path(config.out).exists()


def test_a_failure_after_the_first_step_keeps_the_curves(setting, monkeypatch) -> None:
    step, calls = stages.KeepsightTrainer.training_step, []

    def breaks(self, *args, **kwargs):
        calls.append(0)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(stages.KeepsightTrainer, "training_step", breaks)
    with pytest.raises(torch.OutOfMemoryError):
        train(TrainConfig(**{**setting, "projector": replace(STEPS, max_steps=6, micro_batch_size=None)}))
    assert [row["step"] for row in read_curves(setting["out"])] == [1, 2]


def test_a_file_that_torch_cannot_finish_is_the_disks(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(RuntimeError) as raised:
            torch.save(torch.zeros(100_000), tmp_path / "optimizer.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "the disk may be full" in str(disk_error(tmp_path, raised.value))
    assert disk_error(tmp_path, RuntimeError("unexpected pos of a token")) is None


@pytest.mark.parametrize("library", ["safetensors", "torch"])
def test_a_full_disk_is_called_so_and_the_run_goes_on(setting, monkeypatch, library: str) -> None:
    """Both libraries keep the system's error to themselves; "damaged weights" would send the user to download again."""
    config = TrainConfig(**setting)

    def full(*_, **__):
        if library == "torch":
            raise RuntimeError(
                "[enforce fail at inline_container.cc:668] . PytorchStreamWriter failed writing file data/2"
            )
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr(PreTrainedModel, "save_pretrained", full)
        with pytest.raises(StorageError, match=r"run': .*disk .* full.* repeat the command with --resume"):
            train(config)
    assert train(config, resume=True).info["finished"]


def test_a_folder_with_a_run_is_refused_and_kept(setting) -> None:
    out = Path(setting["out"])
    out.mkdir()
    (out / "run.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"already holds a run .*, or go on with it by resume=True \(--resume\)$"):
        train(TrainConfig(**setting))
    assert (out / "run.json").read_text() == "{}"


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_every_family(family: str) -> None:
    model, _ = FAMILIES[family]()
    found = parts(model)
    assert all(found.values())
    assert sum(map(len, found.values())) == len(list(model.parameters()))
    count = train_only(model, ["projector"])
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert count == sum(p.numel() for p in found["projector"])
    markers = ("multi_modal_projector", "merger", "connector")
    assert learning == {name for name, _ in model.named_parameters() if any(m in name for m in markers)}


def test_an_unknown_part() -> None:
    with pytest.raises(ValueError, match=r"no parameters in part 'head'; it has \['projector', 'language_model', 'enc"):
        train_only(llava(patch=8), ["head"])


@pytest.mark.slow
def test_a_truncated_picture_costs_nothing_that_was_trained(setting, pictures) -> None:
    """Found before a step it leaves no folder behind; found later, the run goes on with --skip-broken."""
    whole = (pictures / "red.png").read_bytes()
    (pictures / "red.png").write_bytes(whole[:40])
    config = TrainConfig(**{**setting, "data": replace(setting["data"], cache_megabytes=0)}, save_steps=1)
    with pytest.raises(ImageError, match=r"red\.png"):
        train(config)
    first = Path(config.out)
    assert not first.exists() or latest(first / "stages" / "projector") is not None
    (pictures / "red.png").write_bytes(whole)

    class Breaks(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 2:
                (pictures / "red.png").write_bytes(whole[:40])

    again = replace(config, out=setting["out"] + "2", projector=replace(STEPS, max_steps=6))
    with pytest.raises(ImageError, match="What was trained is kept: repeat the command with --resume"):
        train(again, callbacks=[Breaks()])
    run = train(replace(again, skip_broken=True), resume=True)
    assert run.info["finished"]
    assert [row["step"] for row in read_curves(run.path) if row["stage"] == "projector"] == [1, 2, 3, 4, 5, 6]
