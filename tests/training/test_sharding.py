"""The configurations for `accelerate launch`: read by accelerate itself; FSDP2 run as it sets it up."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from accelerate.utils.launch import prepare_multi_gpu_env
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from keepsight.commands.train import parse
from keepsight.training.arguments import training_arguments
from tests.training.sharded import CONFIGS, assert_trained_alike, keepsight_train, launch_arguments
from tests.training.test_processes import ROOT, run
from tests.training.test_resume import recipe

BASE = ROOT / "recipes" / "clip-vicuna-7b.yaml"
KINDS = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}


def launched(name: str, **changes: Any) -> dict[str, str]:
    """The environment in which `accelerate launch` starts processes with this configuration."""
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(launch_arguments(name)))
    for key, value in changes.items():
        setattr(arguments, key, value)
    return prepare_multi_gpu_env(arguments)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_the_configuration(name):
    path = CONFIGS / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.distributed_type == DistributedType(KINDS[name])
    assert config.num_processes == 8
    first = path.read_text(encoding="utf-8").splitlines()[0]
    shown = f"recipes/accelerate/{name}.yaml"
    assert first == f"# accelerate launch --config_file {shown} -m keepsight train recipes/clip-vicuna-7b.yaml"
    arguments, _, precision = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(path), "-m", "keepsight"])
    )
    assert (arguments.use_fsdp, arguments.use_deepspeed) == (name == "fsdp2", name.startswith("zero"))
    if name.startswith("zero"):
        assert ROOT / arguments.deepspeed_config_file == CONFIGS / f"{name}.json"
    else:
        assert precision is not None
        assert str(arguments.mixed_precision) == "bf16"


def test_fsdp2_reaches_the_processes():
    environment = launched("fsdp2")
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    assert environment["FSDP_VERSION"] == "2"
    assert environment["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
    assert environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    assert "FSDP_TRANSFORMER_CLS_TO_WRAP" not in environment  # keepsight names the layers


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeeds_settings_as_accelerate_reads_them(stage):
    read = HfDeepSpeedConfig(str(CONFIGS / f"zero{stage}.json"))
    assert (read.is_zero2(), read.is_zero3(), read.is_offload()) == (stage == 2, stage == 3, False)
    assert read.is_true("bf16.enabled")
    assert read.is_true("zero_optimization.stage3_gather_16bit_weights_on_model_save") is (stage == 3)
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert read.get_value(name) == "auto"  # the recipe's decide


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeeds_settings_go_with_every_stage_of_the_recipe(stage, tmp_path):
    """As transformers fills them in: every "auto" is gone, nothing contradicts the recipe."""
    pytest.importorskip("deepspeed")
    config = parse([str(BASE), "--out", str(tmp_path), "--trainer.use_cpu", "true"])
    for name, part in config.stages().items():
        arguments = training_arguments(config, name, part)
        read = HfTrainerDeepSpeedConfig(json.loads((CONFIGS / f"zero{stage}.json").read_text(encoding="utf-8")))
        read.trainer_config_process(arguments, auto_find_batch_size=False)
        model = SimpleNamespace(config=SimpleNamespace(hidden_size=4096))
        read.trainer_config_finalize(arguments, model, num_training_steps=100)
        assert "auto" not in json.dumps(read.config)
        assert read.config["train_micro_batch_size_per_gpu"] == part.micro_batch_size
        assert read.config["train_batch_size"] == part.batch_size
        assert read.config["bf16"]["enabled"] is config.trainer["bf16"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("trainer", ()),
        ("trainer", ('normalise="whitened"', "layer=[1, 3]", "head_lr=0.01")),
        ("trainer-images", ()),
        ("trainer-images", ("weight=0",)),
        ("trainer-images", ('anchor="pre_projector"', 'control="other_image"')),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "paper",
)
def test_fsdp2_through_accelerate_trains_like_one_process(tmp_path, mode, settings):
    one = run(1, mode, tmp_path / "one.json", *settings)
    two = run(2, mode, tmp_path / "two.json", *settings, **launched("fsdp2", mixed_precision="no"))
    assert (one["sharded"], two["sharded"]) == (False, True)
    assert len(one["log"]) == len(two["log"]) == 3
    for single, double in zip(one["log"], two["log"], strict=True):
        for name in single:
            if name.startswith(("lm_loss", "pre")) and name != "pre_margin":
                assert double[name] == pytest.approx(single[name], abs=2e-5), name
    assert one["parameters"].keys() == two["parameters"].keys()
    for name, norm in one["parameters"].items():
        assert two["parameters"][name] == pytest.approx(norm, abs=2e-4), name


@pytest.mark.slow
def test_a_trainer_that_cannot_be_changed_under_fsdp2(tmp_path):
    """The layers to shard are named by its user: accelerate does not find all classes that the model itself names."""
    environment = launched("fsdp2", mixed_precision="no") | {"FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer"}
    one, two = run(1, "injected", tmp_path / "one.json"), run(2, "injected", tmp_path / "two.json", **environment)
    assert (one["sharded"], two["sharded"]) == (False, True)
    for single, double in zip(one["log"], two["log"], strict=True):
        for name in ("loss", "grad_norm", "pre_loss", "pre_images", "pre_tokens"):
            assert double[name] == pytest.approx(single[name], abs=1e-5), name


@pytest.mark.slow
def test_the_head_stays_float32_where_fsdp2_computes_in_bf16(tmp_path):
    """Its own group: in the root's, its weights would be bf16 in the forward."""
    found = run(2, "trainer", tmp_path / "two.json", **launched("fsdp2"))
    assert found["sharded"]
    assert found["head"] == "torch.float32"
    assert len(found["log"]) == 3


@pytest.mark.slow
def test_fsdp2_needs_whole_anchors(tmp_path):
    with pytest.raises(AssertionError, match="the anchor 'moving_average' keeps averages of whole weights"):
        run(2, "trainer", tmp_path / "two.json", 'anchor="moving_average"', **launched("fsdp2"))


@pytest.mark.slow
def test_a_sharded_recipe_is_written_whole_and_goes_on_after_a_kill(tmp_path, pictures):
    """Two stages, the second with other parts learning: curves and exported model as in one process."""
    made = recipe(tmp_path, pictures)
    environment = launched("fsdp2", mixed_precision="no")
    keepsight_train(made, tmp_path / "one")
    keepsight_train(made, tmp_path / "two", **environment)
    keepsight_train(made, tmp_path / "killed", point="step:full:5", **environment)
    keepsight_train(made, tmp_path / "killed", "--resume", **environment)
    assert_trained_alike(tmp_path, "one", "two", "killed")
