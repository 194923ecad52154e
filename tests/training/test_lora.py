"""LoRA in the recipe: what learns, at which rate, and what is refused. Exports: test_export; resuming: test_resume."""

from dataclasses import replace
from importlib import util
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from keepsight.pre import PReConfig
from keepsight.training import lora as module
from keepsight.training.config import LoraConfig, ModelConfig, StageConfig
from keepsight.training.freeze import train_only
from keepsight.training.lora import adapt, targets
from keepsight.training.recipe import train
from keepsight.vlm import Vlm
from tests.tiny import FAMILIES, llava
from tests.tiny_processors import make_llava
from tests.training.test_export import setting

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


class Spy(TrainerCallback):
    """The parameters at the start and end of each stage, and the optimizer's groups."""

    def __init__(self) -> None:
        self.before: list[dict[str, torch.Tensor]] = []
        self.after: list[dict[str, torch.Tensor]] = []
        self.rates: list[dict[str, float]] = []

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        self.before.append({name: p.detach().clone() for name, p in model.named_parameters()})
        names = {id(p): name for name, p in model.named_parameters()}
        self.rates.append({names[id(p)]: g["initial_lr"] for g in optimizer.param_groups for p in g["params"]})

    def on_train_end(self, args, state, control, model=None, **kwargs) -> None:
        self.after.append({name: p.detach().clone() for name, p in model.named_parameters()})

    def moved(self, stage: int) -> set[str]:
        return {n for n, p in self.after[stage].items() if not torch.equal(p, self.before[stage][n])}


def kind(name: str) -> str:
    found = ("keepsight_head", "lora_A", "lora_B", "multi_modal_projector", "vision_tower", "language_model", "lm_head")
    return next(part for part in found if part in name)


@pytest.mark.slow
def test_adapters_projector_and_head_learn_and_nothing_else(tmp_path) -> None:
    spy = Spy()
    config = setting(tmp_path, "run", lora=LoraConfig(rank=4), pre=PReConfig(head_lr=0.5), save_steps=None)
    run = train(config, model=llava(patch=8), processor=make_llava(), callbacks=[spy])
    assert {kind(name) for name in spy.moved(0)} == {"multi_modal_projector", "keepsight_head"}
    assert not any("lora" in name for name in spy.before[0])  # the stage of the projector does not pay for them
    moved = spy.moved(1)
    assert {kind(name) for name in moved} == {"multi_modal_projector", "keepsight_head", "lora_A", "lora_B"}
    # Every adapter learns; of the fourth layer too, which PRe does not reach and the language-model loss does.
    adapters = {name for name in spy.after[1] if "lora_" in name}
    assert adapters <= moved
    assert len(adapters) == 2 * 4 * len(LINEAR)
    assert {(kind(name), rate) for name, rate in spy.rates[1].items()} == {
        ("lora_A", 3e-2),
        ("lora_B", 3e-2),
        ("multi_modal_projector", 1e-2),
        ("keepsight_head", 0.5),
    }
    assert run.info["counts"]["full: parameters trained"] == sum(
        spy.after[1][name].numel() for name in moved if "keepsight_head" not in name
    )


@pytest.mark.slow
def test_weight_zero_with_lora_is_as_without_the_head(tmp_path) -> None:
    """The head draws from its own generator, so that both arms have the same adapters."""
    spies = []
    for name, pre in (("zero", PReConfig(weight=0.0)), ("half", PReConfig(weight=0.5))):
        spies.append(Spy())
        config = setting(tmp_path, name, lora=LoraConfig(rank=4), pre=pre, projector=StageConfig(enabled=False))
        train(config, model=llava(patch=8), processor=make_llava(), callbacks=[spies[-1]])
    zero, half = (spy.before[0] for spy in spies)
    assert all(torch.equal(zero[name], half[name]) for name in zero if "keepsight" not in name)
    zero, half = (spy.after[0] for spy in spies)
    assert any(not torch.equal(zero[name], half[name]) for name in zero if "lora_A" in name)


@pytest.mark.parametrize("family", ["llava-clip-llama", "qwen2.5-vl", "gemma3", "internvl"])
def test_by_default_all_linear_layers_of_the_decoder_and_no_others(family) -> None:
    model, batch = FAMILIES[family]()
    vlm = Vlm(model)
    found = targets(model, LoraConfig(rank=2))
    assert {name.rpartition(".")[2] for name in found} == LINEAR
    assert len(found) == 4 * len(LINEAR)
    inside = {id(module) for layer in vlm.layers for module in layer.modules()}
    assert all(id(layer) in inside for layer in found.values())
    with torch.no_grad():
        before = model.eval()(**batch).logits
        adapt(model, LoraConfig(rank=2))
        assert torch.equal(model.eval()(**batch).logits, before)  # the second matrix starts at zero
    assert train_only(model, ["language_model"]) == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    train_only(model, ["projector"])
    assert not any(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)


def test_chosen_layers() -> None:
    found = targets(llava(patch=8), LoraConfig(rank=2, target_modules=("q_proj", "layers.3.mlp.up_proj")))
    assert sorted(found) == [
        *(f"model.language_model.layers.{n}.self_attn.q_proj" for n in range(3)),
        "model.language_model.layers.3.mlp.up_proj",
        "model.language_model.layers.3.self_attn.q_proj",
    ]
    with pytest.raises(ValueError, match=r"has 'query', and no linear layer .* is called so; it has \['down_proj', "):
        targets(llava(patch=8), LoraConfig(rank=2, target_modules=("query",)))


def test_names_that_match_nothing_are_refused_before_a_folder_is_made(tmp_path) -> None:
    with pytest.raises(ValueError, match="has 'query'"):
        train(setting(tmp_path, "run", lora=LoraConfig(rank=2, target_modules=("query",))))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "lora.rank is 0; allowed: 1 or more, or null"),
        ({"rank": 4, "alpha": 0.0}, "lora.alpha is 0.0; allowed: a number above 0"),
        ({"rank": 4, "dropout": 1.0}, "lora.dropout is 1.0; allowed"),
        ({"rank": 4, "target_modules": ()}, "lora.target_modules is an empty list"),
        ({"load_in_4bit": True}, "lora.load_in_4bit is True without LoRA; set lora.rank"),
        ({"alpha": 16.0}, "lora.alpha is 16.0 without LoRA"),
    ],
)
def test_settings_out_of_range(values, message) -> None:
    with pytest.raises(ValueError, match=message):
        LoraConfig(**values)


def test_settings_that_do_not_go_together(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"lora.rank is 4 and no stage trains the language model"):
        setting(tmp_path, "run", lora=LoraConfig(rank=4), full=StageConfig(enabled=False))
    with pytest.raises(ValueError, match=r"projector_lr is 0.1 and train is \['language_model'\]; add projector"):
        StageConfig(train=("language_model",), projector_lr=0.1)
    with pytest.raises(ValueError, match=r"projector_lr is 0\.0; allowed"):
        StageConfig(projector_lr=0.0)


@pytest.mark.parametrize(
    ("installed", "cuda", "error", "message"),
    [
        (None, False, ImportError, "needs bitsandbytes, which is not installed: pip install bitsandbytes"),
        (True, False, ValueError, "no CUDA device is visible: the 4-bit layers are made on a GPU"),
    ],
)
def test_four_bits_say_what_is_missing(tmp_path, monkeypatch, installed, cuda, error, message) -> None:
    find = util.find_spec
    monkeypatch.setattr(module, "find_spec", lambda name: installed if name == "bitsandbytes" else find(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    config = setting(tmp_path, "run", lora=LoraConfig(rank=4, load_in_4bit=True), model=ModelConfig(path="nowhere"))
    with pytest.raises(error, match=message):
        train(config)
    assert not (tmp_path / "run").exists()


def test_four_bits_need_a_model_by_name(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("keepsight.training.recipe.check_available", lambda _: None)
    config = setting(tmp_path, "run", lora=LoraConfig(rank=4, load_in_4bit=True))
    given: Any = {"model": llava(patch=8), "processor": make_llava()}
    with pytest.raises(ValueError, match=r"needs a model by name \(config.model\), not one in memory"):
        train(config, **given)


def test_four_bits_train_and_are_merged_into_the_weights_themselves(tmp_path, monkeypatch) -> None:
    """On a CPU, which newer bitsandbytes have kernels for: what a GPU adds is speed."""
    bnb = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("keepsight.training.recipe.check_available", lambda _: None)
    seen: list[set[str]] = []

    class Layers(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs) -> None:
            seen.append({n.removesuffix(".base_layer") for n, m in model.named_modules() if is_packed(m)})

    def is_packed(layer: torch.nn.Module) -> bool:
        return isinstance(layer, bnb.nn.Linear4bit) and layer.weight.dtype == torch.uint8

    lora = LoraConfig(rank=4, target_modules=("q_proj",), load_in_4bit=True)
    config = setting(tmp_path, "run", lora=lora, projector=StageConfig(enabled=False))
    run = train(config, callbacks=[Layers()])
    assert seen == [set(targets(llava(patch=8), LoraConfig(rank=4)))]
    before, after = (load_file(path / "model.safetensors") for path in (tmp_path / "start", run.path / "model"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {kind(name) for name in moved} == {"multi_modal_projector", "language_model"}
    assert all("q_proj" in name or "projector" in name for name in moved)


def test_shards_are_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"lora.rank is 4 under FSDP: .* Launch without FSDP"):
        train(setting(tmp_path, "run", lora=LoraConfig(rank=4)))
    assert not (tmp_path / "run").exists()


def test_shards_that_the_recipe_asks_for_are_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # `TrainingArguments` sets it; here it is taken back
    config = setting(tmp_path, "run", lora=LoraConfig(rank=4))
    config = replace(config, trainer={**config.trainer, "fsdp": "full_shard"})
    with pytest.raises(ValueError, match=r"lora.rank is 4 under FSDP \(trainer.fsdp\): .* Launch without it"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_without_peft_it_says_what_to_install(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'LoRA needs PEFT: pip install "keepsight\[train\]"'):
        train(setting(tmp_path, "run", lora=LoraConfig(rank=4)))
