"""DeepSpeed's ZeRO-2 and ZeRO-3, as accelerate and `Trainer` run them, between CPU processes; skipped without it."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from safetensors.torch import load_file

import keepsight
from keepsight.training.checkpoints import WEIGHTS
from keepsight.training.config import LoraConfig
from keepsight.training.recipe import train
from keepsight.training.sharding import check_deepspeed
from keepsight.training.stages import KeepsightTrainer
from tests.tiny import llava_clip_llama
from tests.training.sharded import CONFIGS, assert_trained_alike, keepsight_train, launch_arguments
from tests.training.test_lora import setting
from tests.training.test_processes import run
from tests.training.test_resume import recipe
from tests.training.test_trainer import collate, make_trainer, samples

EXACT = "max_grad_norm=0"  # DeepSpeed clips the head's gradient with the model's
ON_CPU = ("--trainer.use_cpu", "false", "--trainer.ddp_backend", "gloo")


def launched(stage: int, folder: Path, *, bf16: bool = False) -> dict[str, str]:
    """The environment in which `accelerate launch` starts processes, on CPUs; ZeRO-3 with no weight left whole."""
    pytest.importorskip("deepspeed")
    settings = json.loads((CONFIGS / f"zero{stage}.json").read_text(encoding="utf-8"))
    settings["bf16"]["enabled"] = bf16
    if stage == 3:
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    file = folder / f"zero{stage}.json"
    file.write_text(json.dumps(settings), encoding="utf-8")
    given = launch_command_parser().parse_args(launch_arguments(f"zero{stage}"))
    arguments, defaults, _ = _validate_launch_command(given)
    arguments.deepspeed_config_file = str(file)
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    _, environment = prepare_deepspeed_cmd_env(arguments)
    own = {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return environment | own


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "mode", "settings"),
    [
        (2, "trainer", ()),
        (3, "trainer", ()),
        (3, "trainer", ('normalise="whitened"', "layer=[1, 3]", "head_lr=0.01", "gradient_checkpointing=true")),
        (3, "trainer", ('anchor="pre_projector"', 'control="other_image"', 'learns=["projector"]')),
        (2, "trainer", ('anchor="moving_average"', "anchor_decay=0.5")),
        (2, "trainer-all", ("accumulate=2",)),
        (3, "trainer-all", ("accumulate=2",)),
    ],
    ids=lambda value: "-".join(value) or "paper" if isinstance(value, tuple) else str(value),
)
def test_two_processes_train_like_one(tmp_path, stage, mode, settings):
    environment = launched(stage, tmp_path)
    one = run(1, mode, tmp_path / "one.json", EXACT, *settings)
    two = run(2, mode, tmp_path / "two.json", EXACT, *settings, **environment)
    assert (one["zero"], two["zero"]) == (None, stage)
    assert one["steps"] == two["steps"] == 3  # of λ's schedule and of running statistics
    assert len(one["log"]) == len(two["log"]) == 3
    for single, double in zip(one["log"], two["log"], strict=True):
        for name in single:
            if name.startswith(("lm_loss", "pre")) and name != "pre_margin":
                assert double[name] == pytest.approx(single[name], abs=2e-5), name
    assert one["parameters"].keys() == two["parameters"].keys()
    for name, norm in one["parameters"].items():
        assert two["parameters"][name] == pytest.approx(norm, abs=2e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_the_head_computes_in_float32_from_weights_that_deepspeed_keeps_in_bf16(tmp_path, stage):
    environment = launched(stage, tmp_path, bf16=True)
    one = run(1, "trainer", tmp_path / "one.json", EXACT)
    two = run(2, "trainer", tmp_path / "two.json", EXACT, "bf16=true", **environment)
    assert (one["head"], two["head"]) == ("torch.float32", "torch.bfloat16")
    for single, double in zip(one["log"], two["log"], strict=True):
        for name in ("lm_loss", "pre_loss"):
            assert double[name] == pytest.approx(single[name], abs=5e-3), name


@pytest.mark.slow
def test_a_process_without_pictures_is_refused(tmp_path):
    environment = launched(2, tmp_path)
    with pytest.raises(AssertionError, match="1 micro-batches of this step hold no picture"):
        run(2, "trainer-images", tmp_path / "two.json", **environment)


@pytest.mark.slow
def test_zero3_needs_whole_anchors(tmp_path):
    environment = launched(3, tmp_path)
    with pytest.raises(AssertionError, match="the anchor 'moving_average' keeps averages of whole weights, and ZeRO-3"):
        run(2, "trainer", tmp_path / "two.json", 'anchor="moving_average"', **environment)


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        ({"anchor": "encoder"}, {"zero_optimization": {"stage": 3}}, "the anchor 'encoder' keeps averages of whole"),
        ({"head_lr": 0.1}, {"optimizer": {"type": "AdamW"}}, "head_lr is 0.1, and DeepSpeed's settings name an opt"),
        ({"anchor": "encoder"}, {"zero_optimization": {"stage": 2}}, None),
        ({"anchor": "encoder", "weight": 0.0}, {"zero_optimization": {"stage": 3}}, None),
        ({"head_lr": 0.1}, {"zero_optimization": {"stage": 3}}, None),
        ({}, {"optimizer": {"type": "AdamW"}}, None),
    ],
)
def test_settings_that_do_not_go_together(config, settings, message):
    handle = keepsight.attach(llava_clip_llama()[0], keepsight.PReConfig(**config))
    plugin = SimpleNamespace(deepspeed_config=settings)
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    if message is None:
        check_deepspeed(accelerator, handle, head_lr=handle.config.head_lr)
        return
    with pytest.raises(ValueError, match=message):
        check_deepspeed(accelerator, handle, head_lr=handle.config.head_lr)


def test_adapters_in_shards_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("keepsight.training.recipe.zero_stage", lambda arguments: 3)
    with pytest.raises(ValueError, match=r"lora.rank is 4 under DeepSpeed's ZeRO-3: .* Launch without it"):
        train(setting(tmp_path, "run", lora=LoraConfig(rank=4)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["bit16_groups", "fp16_groups", "bf16_groups"])
def test_the_head_is_found_in_every_kind_of_deepspeeds_optimizers(name):
    """By the name under which each keeps the model's own parameters; the last is ZeRO-1 that sums in float32."""
    handle = keepsight.attach(llava_clip_llama()[0].train())
    optimizer = type("Optimizer", (), {"__module__": "deepspeed.runtime", "param_groups": [{"params": []}]})()
    handle.vlm.base(**collate(samples()))
    with pytest.raises(keepsight.DeadLossError, match="not in the optimizer"):
        handle.assert_alive(optimizer)
    setattr(optimizer, name, [list(handle.vlm.base.parameters())])
    handle.assert_alive(optimizer)


def test_a_checkpoint_holds_weights_where_zero3_is_not_told_to_gather_them(tmp_path):
    """`Trainer` then passes none to be saved (transformers 5.23, `save_model`)."""
    model, _ = llava_clip_llama()
    keepsight.attach(model)
    trainer = make_trainer(model, tmp_path, samples(), KeepsightTrainer, batch=8)
    trainer.learned = frozenset(
        name for name, _ in model.model.multi_modal_projector.named_parameters("model.multi_modal_projector")
    )
    trainer._save(str(tmp_path / "checkpoint-1"), {})
    assert trainer.learned <= load_file(tmp_path / "checkpoint-1" / WEIGHTS).keys()


def with_pictures(made: Path) -> Path:
    """The recipe with the entries that have pictures, as many as two processes can share out, and no clipping."""
    settings = yaml.safe_load(made.read_text(encoding="utf-8"))
    data = Path(settings["data"]["conversations"])
    entries = [row for row in json.loads(data.read_text(encoding="utf-8")) if "image" in row]
    data.write_text(json.dumps(entries[:8]), encoding="utf-8")
    settings["trainer"] |= {"max_grad_norm": 0.0}
    made.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return made


@pytest.mark.slow
def test_adapters_learn_under_zero2_as_in_one_process(tmp_path, pictures):
    environment = launched(2, tmp_path)
    made = with_pictures(recipe(tmp_path, pictures, lora={"rank": 4, "dropout": 0.0}))
    keepsight_train(made, tmp_path / "one")
    keepsight_train(made, tmp_path / "killed", *ON_CPU, point="step:full:5", **environment)
    keepsight_train(made, tmp_path / "killed", "--resume", *ON_CPU, **environment)
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        expected, found = (load_file(tmp_path / name / file) for name in ("one", "killed"))
        assert found.keys() == expected.keys()
        assert all(torch.allclose(found[key], expected[key], atol=2e-4) for key in expected)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_recipe_of_two_stages_is_written_whole_and_goes_on_after_a_kill(tmp_path, pictures, stage):
    environment = launched(stage, tmp_path)
    made = with_pictures(recipe(tmp_path, pictures))
    keepsight_train(made, tmp_path / "one")
    keepsight_train(made, tmp_path / "two", *ON_CPU, **environment)
    keepsight_train(made, tmp_path / "killed", *ON_CPU, point="step:full:5", **environment)
    keepsight_train(made, tmp_path / "killed", "--resume", *ON_CPU, **environment)
    assert_trained_alike(tmp_path, "one", "two", "killed")
