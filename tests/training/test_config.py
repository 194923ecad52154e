"""Recipes, flags, round trips, and what is refused."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from keepsight.commands.train import parse
from keepsight.pre.config import PReConfig
from keepsight.results import RunDirectory
from keepsight.settings import field_texts, leaves, normalise
from keepsight.training.arguments import check_trainer_settings, training_arguments
from keepsight.training.config import DataConfig, ModelConfig, StageConfig, TrainConfig

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
DATA = DataConfig(conversations="data.json")


def config(**changes) -> TrainConfig:
    return TrainConfig(**{"model": ModelConfig(path="model"), "out": "runs/a", "data": DATA, **changes})


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_says_how_to_run_it(recipe: Path) -> None:
    found = parse([str(recipe)])
    assert found.stages().keys() == {"projector", "full"}
    check_trainer_settings(found.trainer)
    first = recipe.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert f"train recipes/{recipe.name}" in first
    assert found.out == f"runs/{recipe.stem}"


def test_flags_override_the_recipe() -> None:
    tiny = str(next(path for path in RECIPES if path.stem == "tiny"))
    found = parse(
        [
            *(
                tiny,
                "--pre.layer",
                "16",
                "--pre.weight=0",
                "--full.micro_batch_size",
                "2",
                "--projector.max-steps",
                "7",
            ),
            *("--skip-broken", "--trainer.bf16", "true", "--full.train", "[encoder,projector]"),
        ]
    )
    assert found.pre == PReConfig(layer=16, weight=0.0)
    assert (found.full.micro_batch_size, found.full.batch_size) == (2, 8)
    assert found.projector.max_steps == 7
    assert found.skip_broken is True
    assert found.trainer == {"logging_steps": 1, "bf16": True}
    assert found.full.train == ("encoder", "projector")
    assert parse([tiny, "--skip-broken", "false"]).skip_broken is False


def test_defaults_are_the_dataclasss() -> None:
    found = parse(["--model.path", "model", "--out", "runs/a", "--data.conversations", "data.json"])
    assert found == config()
    assert found.full == StageConfig(train=("projector", "language_model"), lr=2e-5, batch_size=128)


def test_print_config_and_the_written_configuration_are_recipes(tmp_path: Path, capsys) -> None:
    flags = [
        "--model.vision",
        "a",
        "--model.language",
        "b",
        "--out",
        "runs/a",
        "--data.dataset",
        "c",
        "--pre.layer",
        "9",
    ]
    with pytest.raises(SystemExit):
        parse([*flags, "--print-config"])
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out, encoding="utf-8")
    assert parse([str(printed)]) == parse(flags)
    run = RunDirectory.create(tmp_path / "run", label="a")
    run.write_config(parse(flags))
    assert parse([str(run.path / "config.yaml")]) == parse(flags)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pre: {lyer: 3}", "pre.lyer' is not accepted"),
        ("full: {train: [head]}", "full.train"),
        ("full: {lr: fast}", "full.lr"),
        ("pre: {class_path: evil.Evil}", "class_path"),
        ("model: {class_path: evil.Evil}", "class_path"),
        ("full: {data: {class_path: evil.Evil}}", "class_path"),
        ("label: {class_path: evil.Evil}", "label"),
    ],
)
def test_recipes_with_unknown_fields_or_code_are_refused(tmp_path: Path, monkeypatch, capsys, text, message) -> None:
    (tmp_path / "evil.py").write_text("open('imported', 'w')\nclass Evil: pass\n", encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(f"out: a\n{text}\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as status:
        parse(["recipe.yaml"])
    assert status.value.code == 2
    assert message in capsys.readouterr().err
    assert not Path("imported").exists()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ModelConfig(), r"vision=None, language=None; give either `model.path`"),
        (lambda: ModelConfig(vision="a"), "or both `model.vision` and `model.language`"),
        (lambda: ModelConfig(path="a", language="b"), "not all"),
        (lambda: DataConfig(conversations="a", dataset="b"), "conversations='a' and dataset='b'; give one of the two"),
        (lambda: DataConfig(cache_megabytes=-1), "cache_megabytes is -1; allowed: 0"),
        (lambda: StageConfig(train=()), r"train is \[\]; allowed: one or more of"),
        (lambda: StageConfig(train=("head",)), r"train is \['head'\]"),
        (lambda: StageConfig(lr=0.0), "lr is 0.0; allowed: a finite number above 0"),
        (lambda: StageConfig(lr=float("nan")), "lr is nan"),
        (lambda: StageConfig(batch_size=0), "batch_size is 0; allowed: 1 or more"),
        (lambda: StageConfig(epochs=0.0), "epochs is 0.0"),
        (lambda: StageConfig(warmup_ratio=1.0), "warmup_ratio is 1.0; allowed: 0 up to, not including, 1"),
        (lambda: StageConfig(weight_decay=-1.0), "weight_decay is -1.0"),
        (lambda: config(out=""), "out is not set"),
        (lambda: config(max_length=0), "max_length is 0"),
        (lambda: config(data=DataConfig()), "stage 'projector' has no data"),
        (
            lambda: config(projector=StageConfig(enabled=False), full=StageConfig(enabled=False)),
            "no stage is enabled",
        ),
    ],
)
def test_settings_that_cannot_be(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_stages_own_data_wins() -> None:
    own = DataConfig(dataset="other")
    found = config(full=StageConfig(data=own))
    assert found.data_of(found.projector) == DATA
    assert found.data_of(found.full) == own


def test_batches_are_made_up_of_micro_batches(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    stage = StageConfig(batch_size=12, micro_batch_size=3, max_steps=5, lr=0.5, warmup_ratio=0.25)
    found = config(out=str(tmp_path), seed=3, projector=stage, trainer={"use_cpu": True, "logging_steps": 7})
    arguments = training_arguments(found, "projector", stage)
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (3, 4)
    assert (arguments.max_steps, arguments.learning_rate, arguments.seed) == (5, 0.5, 3)
    assert arguments.get_warmup_steps(8) == 2
    assert arguments.logging_steps == 7
    assert arguments.remove_unused_columns is False
    whole = training_arguments(found, "projector", StageConfig(batch_size=12))
    assert (whole.per_device_train_batch_size, whole.gradient_accumulation_steps) == (12, 1)
    with pytest.raises(ValueError, match=r"projector.batch_size is 12, which 1 process with .*micro_batch_size 5"):
        training_arguments(found, "projector", StageConfig(batch_size=12, micro_batch_size=5))


def test_trainer_settings_that_clash_or_do_not_exist() -> None:
    with pytest.raises(ValueError, match=r"trainer.learning_rate is decided by the recipe: use <stage>.lr instead"):
        check_trainer_settings({"learning_rate": 1})
    for name in ("save_total_limit", "save_only_model"):  # either would take away what --resume goes on from
        with pytest.raises(ValueError, match=rf"trainer.{name} is decided by the recipe: use keep_weights instead"):
            check_trainer_settings({name: 1})
    with pytest.raises(ValueError, match=r"trainer.loging_steps is no field .*near it are logging_steps"):
        check_trainer_settings({"loging_steps": 1})


def test_transformers_refusal_names_the_stage(tmp_path: Path) -> None:
    found = config(out=str(tmp_path), trainer={"use_cpu": True, "eval_strategy": "sometimes"})
    with pytest.raises(ValueError, match=r"transformers refuses the trainer settings of stage 'full': .*sometimes"):
        training_arguments(found, "full", found.full)


@dataclass(frozen=True)
class _Inner:
    """Inner.

    Attributes:
        size: of it, in
            100 % of cases.
    """

    size: int = 1


@dataclass(frozen=True)
class _Outer:
    inner: _Inner = field(default_factory=lambda: _Inner(size=5))
    on_off: bool = False


def test_leaves_take_texts_and_nested_defaults() -> None:
    size, switch = leaves(_Outer)
    assert (size.name, size.flag, size.default) == ("inner.size", "--inner.size", 5)
    assert size.text == "of it, in 100 %% of cases."
    assert (switch.flag, switch.default) == ("--on-off", False)
    assert field_texts(_Outer) == {}


def test_normalise() -> None:
    assert normalise(["a.yaml", "--on_off", "--inner.size", "3"], _Outer) == [
        *("--config", "a.yaml"),
        *("--on-off=true", "--inner.size", "3"),
    ]
    assert normalise(["a.yaml", "b.yaml", "--inner.size", "3"], _Outer)[:4] == [
        "--config",
        "a.yaml",
        "--config",
        "b.yaml",
    ]
    assert normalise(["--on-off", "false", "--print-config=skip_default"], _Outer) == [
        *("--on-off", "false", "--print_config=skip_default")
    ]


def test_help_is_fast() -> None:
    code = "import sys; from keepsight.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers', 'jsonargparse'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=dict(os.environ))


@pytest.mark.parametrize(("save", "logging", "expected"), [(500, 10, 500), (500, 7, 504), (3, 5, 5)])
def test_checkpoints_fall_on_logged_steps(tmp_path, save, logging, expected):
    found = config(out=str(tmp_path), save_steps=save, trainer={"use_cpu": True, "logging_steps": logging})
    assert training_arguments(found, "full", found.full).save_steps == expected


def test_checkpoints_need_logged_steps(tmp_path):
    found = config(out=str(tmp_path), trainer={"use_cpu": True, "logging_strategy": "epoch"})
    with pytest.raises(ValueError, match="must fall on logged steps"):
        training_arguments(found, "full", found.full)
    without = config(out=str(tmp_path), save_steps=None, trainer={"use_cpu": True, "logging_strategy": "epoch"})
    assert training_arguments(without, "full", without.full).save_strategy == "no"


def test_a_seed_below_zero_is_refused(tmp_path):
    with pytest.raises(ValueError, match="seed is -1; allowed: 0 or more"):
        config(out=str(tmp_path), seed=-1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"recipe.yaml' holds nothing; it must hold settings by name"),
        ("- model\n", r"recipe.yaml' holds a list; it must hold settings by name"),
        ("model: {path: [\n", r"recipe.yaml' is not YAML: .*line 2.* Correct it, or give another file"),
    ],
)
def test_a_file_without_settings_is_named(tmp_path, text, message) -> None:
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        parse([str(tmp_path / "recipe.yaml")])
