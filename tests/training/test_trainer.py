"""The mixin in HF `Trainer`: exact normalisation, clipping, logging, proof of life."""

import copy
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

import keepsight
from tests.tiny import FAMILIES, IMAGE, llava_clip_llama, pixels

PICTURE = [IMAGE] * 16


def samples() -> list[dict[str, Any]]:
    """Eight: one with two pictures, one with none, answers of unequal length."""
    rows = [
        ([1, *PICTURE, 5, *PICTURE, 6, 7], 2),
        ([1, 20, 21, 22], 0),
        *[([1, *PICTURE, *range(30, 33 + i)], 1) for i in range(6)],
    ]
    return [
        {"ids": ids, "pixel_values": pixels(n, 3, 16, 16, seed=i) if n else None} for i, (ids, n) in enumerate(rows)
    ]


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    length = max(len(row["ids"]) for row in rows)
    ids = torch.tensor([row["ids"] + [0] * (length - len(row["ids"])) for row in rows])
    attention = torch.tensor([[1] * len(row["ids"]) + [0] * (length - len(row["ids"])) for row in rows])
    labels = ids.masked_fill((ids == IMAGE) | (attention == 0), -100)
    batch = {"input_ids": ids, "attention_mask": attention, "labels": labels}
    pictures = [row["pixel_values"] for row in rows if row["pixel_values"] is not None]
    return {**batch, "pixel_values": torch.cat(pictures)} if pictures else batch


class InOrder(Trainer):
    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class PReTrainer(keepsight.PReTrainerMixin, InOrder):
    pass


class Gradients(TrainerCallback):
    """Gradients of every step, before the optimizer uses them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def train(
    model: Any, path: Any, data: list[dict[str, Any]], cls: type[Trainer] = PReTrainer, **arguments: Any
) -> tuple[Any, Gradients]:
    """`make_trainer`'s arguments; the trainer when it is done, and the gradients of its steps."""
    gradients = Gradients()
    trainer = make_trainer(model, path, data, cls, callbacks=[gradients], **arguments)
    trainer.train()
    return trainer, gradients


def make_trainer(
    model: Any,
    path: Any,
    data: list[dict[str, Any]],
    cls: Callable[..., Trainer] = PReTrainer,
    *,
    batch: int,
    accumulate: int = 1,
    callbacks: Any = (),
    **arguments: Any,
) -> Any:
    settings = {
        "learning_rate": 1e-3,
        "max_grad_norm": 0.0,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "remove_unused_columns": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
        **arguments,
    }
    return cls(
        model=model,
        args=TrainingArguments(
            str(path), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate, **settings
        ),
        train_dataset=data,
        data_collator=collate,
        callbacks=list(callbacks),
    )


def attached(**config: Any) -> Any:
    model, _ = llava_clip_llama()
    keepsight.attach(model, keepsight.PReConfig(**config))
    return model


@pytest.mark.parametrize("control", [None, "other_image"])
@pytest.mark.parametrize(("batch", "accumulate"), [(1, 8), (4, 2), (2, 4)])
def test_accumulated_micro_batches_train_like_one_batch(tmp_path, batch, accumulate, control):
    model = attached(control=control)
    twin = copy.deepcopy(model)
    whole, one = train(model, tmp_path / "one", samples(), batch=8)
    parts, many = train(twin, tmp_path / "many", samples(), batch=batch, accumulate=accumulate)
    assert len(one.steps) == len(many.steps) == 1
    assert one.steps[0].keys() == many.steps[0].keys()
    assert any("keepsight_head" in name for name in one.steps[0])
    for name, gradient in one.steps[0].items():
        assert torch.allclose(gradient, many.steps[0][name], atol=2e-6), name
    expected, got = whole.state.log_history[0], parts.state.log_history[0]
    for key in ("loss", "lm_loss", "pre_loss", "pre_cosine", "pre_images", "pre_tokens", "pre_skipped"):
        assert got[key] == pytest.approx(expected[key], abs=2e-5), key
    assert (got["pre_images"], got["pre_tokens"], got["pre_skipped"]) == (8, 128, 1)
    assert got["loss"] == pytest.approx(got["lm_loss"] + 0.5 * got["pre_loss"], abs=2e-4)  # `loss` is rounded


def test_a_resumed_trainer_remembers_the_picture_before(tmp_path):
    runs = []
    for checkpoint in (None, tmp_path / "checkpoint-2"):
        model = attached(control="other_image")
        settings = {"save_strategy": "steps", "save_steps": 2}
        trainer = make_trainer(model, tmp_path, samples(), PReTrainer, batch=2, max_steps=4, **settings)
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        runs.append((model.state_dict(), [row.get("pre_margin") for row in trainer.state.log_history]))
    (whole, margins), (resumed, again) = runs
    assert margins == again
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_a_trainer_that_cannot_be_changed_remembers_the_picture_before(tmp_path):
    """As a callback: written beside the checkpoint, read where the training goes on from that step."""
    handles = []
    for _ in range(2):
        model, batch = llava_clip_llama()
        handles.append(keepsight.attach(model.train(), keepsight.PReConfig(control="other_image"), inject=True))
    handles[0].vlm.base(**batch)
    args, state = SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(global_step=3)
    handles[0].on_save(args, state, None)
    assert list(tmp_path.iterdir()) == []  # a trainer that keeps its checkpoints elsewhere
    (tmp_path / "checkpoint-3").mkdir()
    handles[0].on_save(args, state, None)
    handles[1].on_train_begin(args, state, None)
    (before, grids), (after, same) = (handle.memory()["control"] for handle in handles)
    assert torch.equal(before, after)
    assert grids == same


def test_the_last_partial_accumulation_is_a_mean_over_its_own_pictures(tmp_path):
    data = samples()[:7]  # 8 + 7: the second step of an epoch of 4 + 3
    model = attached()
    twin = copy.deepcopy(model)
    _, one = train(model, tmp_path / "one", data, batch=4, max_steps=2, learning_rate=0.0)
    _, many = train(twin, tmp_path / "many", data, batch=1, accumulate=4, max_steps=2, learning_rate=0.0)
    assert len(one.steps) == len(many.steps) == 2
    for first, second in zip(one.steps, many.steps, strict=True):
        for name, gradient in first.items():
            assert torch.allclose(gradient, second[name], atol=2e-6), name


def test_gradient_is_that_of_the_formula_written_by_hand(tmp_path):
    model = attached()
    twin = copy.deepcopy(model)
    _, got = train(model, tmp_path, samples(), batch=2, accumulate=4)
    handle = keepsight.handle_of(twin)
    twin.train()
    out = twin(**collate(samples()))
    (out.loss + handle.loss).backward()
    for name, parameter in twin.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(got.steps[0][name], parameter.grad, atol=2e-6), name


@pytest.mark.parametrize("config", [{"weight": 0.0}, {"weight": 0.0, "observe": True}], ids=["weight=0", "observe"])
def test_baseline_is_the_bare_trainer_bit_for_bit_under_clipping(tmp_path, config):
    bare, _ = llava_clip_llama()
    model = copy.deepcopy(bare)
    keepsight.attach(model, keepsight.PReConfig(**config))
    run = {"batch": 2, "accumulate": 2, "max_steps": 10, "max_grad_norm": 0.05}
    trained, _ = train(bare, tmp_path / "bare", samples(), InOrder, **run)
    observed, _ = train(model, tmp_path / "pre", samples(), **run)
    expected = dict(bare.named_parameters())
    for name, parameter in model.named_parameters():
        if "keepsight_head" not in name:
            assert torch.equal(parameter, expected[name]), name
    losses = [row["loss"] for row in trained.state.log_history if "loss" in row]
    assert [row["lm_loss"] for row in observed.state.log_history if "loss" in row] == pytest.approx(losses, abs=1e-4)
    assert all(row["grad_norm"] > 0.05 for row in trained.state.log_history if "grad_norm" in row)  # clipping did bite


def test_clipping_with_pre_leaves_the_head_out_of_the_models_norm(tmp_path):
    model = attached(weight=0.5)
    twin = copy.deepcopy(model)
    _, free = train(model, tmp_path / "free", samples(), batch=8)
    _, clipped = train(twin, tmp_path / "clipped", samples(), batch=8, max_grad_norm=0.01)
    for part in (False, True):  # the model's gradients, then the head's: each scaled to a norm of 0.01
        names = [name for name in free.steps[0] if ("keepsight_head" in name) is part]
        norm = torch.stack([free.steps[0][name].norm() for name in names]).norm()
        assert norm > 0.01
        for name in names:
            assert torch.allclose(clipped.steps[0][name], free.steps[0][name] * (0.01 / norm), rtol=1e-3, atol=1e-8)


def test_head_learning_rate_is_its_own_group(tmp_path):
    model = attached(head_lr=0.02)
    trainer, _ = train(model, tmp_path, samples(), batch=8, weight_decay=0.1)
    head = {id(p) for p in keepsight.handle_of(model).parameters()}
    groups = [group for group in trainer.optimizer.param_groups if any(id(p) in head for p in group["params"])]
    assert len(groups) == 1
    assert {id(p) for p in groups[0]["params"]} == head
    assert groups[0]["lr"] == 0.02
    others = [group["lr"] for group in trainer.optimizer.param_groups if group is not groups[0]]
    assert set(others) == {1e-3}
    every = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(every) == len(set(every)) == len(list(model.parameters()))


def test_a_dead_loss_stops_the_run_at_the_first_step(tmp_path):
    model = attached()
    keepsight.handle_of(model).head.requires_grad_(False)
    with pytest.raises(keepsight.DeadLossError, match="head is frozen"):
        train(model, tmp_path, samples(), batch=8)


def test_a_run_without_any_picture_stops_at_the_end(tmp_path):
    text = [{"ids": [1, 20, 21, 22 + i], "pixel_values": None} for i in range(8)]
    with pytest.raises(keepsight.DeadLossError, match="not one batch held a picture"):
        train(attached(), tmp_path, text, batch=4, max_steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("inject", [False, True], ids=["mixin", "inject"])
def test_a_resumed_run_is_not_dead_for_what_it_did_not_see(tmp_path, inject):
    """The rest of a run, text alone or no step at all; but a dead loss is found in it as in any other."""
    text = [{"ids": [1, 20, 21, 22 + i], "pixel_values": None} for i in range(4)]
    data = [*samples()[2:6], *text]  # two steps an epoch

    def trainer(max_steps: int, **settings: Any) -> Any:
        model, _ = llava_clip_llama()
        handle = keepsight.attach(model, inject=inject)
        own: Any = {"cls": InOrder, "callbacks": [handle]} if inject else {}
        return make_trainer(model, tmp_path, data, batch=4, max_steps=max_steps, **own, **settings)

    trainer(2, save_strategy="steps", save_steps=1).train()
    first, last = str(tmp_path / "checkpoint-1"), str(tmp_path / "checkpoint-2")
    assert trainer(2).train(resume_from_checkpoint=last).global_step == 2  # nothing is left
    assert trainer(2).train(resume_from_checkpoint=first).global_step == 2  # text alone is left
    dead = trainer(3)
    dead.create_optimizer()
    keepsight.handle_of(dead.model).head.requires_grad_(False)
    with pytest.raises(keepsight.DeadLossError, match="head is frozen"):
        dead.train(resume_from_checkpoint=last)


def test_text_only_steps_before_the_first_picture_do_not_stop_it(tmp_path):
    text = [{"ids": [1, 20, 21, 22 + i], "pixel_values": None} for i in range(4)]
    trainer, _ = train(attached(), tmp_path, [*text, *samples()], batch=4, max_steps=3)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert "pre_cosine" not in rows[0]
    assert rows[0]["pre_skipped"] == 4
    assert -1 <= rows[1]["pre_cosine"] <= 1
    assert "pre_margin" in rows[1]


def test_a_trainer_without_attach_is_an_error(tmp_path):
    model, _ = llava_clip_llama()
    with pytest.raises(ValueError, match=r"call keepsight.attach\(model"):
        train(model, tmp_path, samples(), batch=8)


def test_a_handle_given_as_a_callback_too_is_there_once(tmp_path):
    model = attached()
    trainer = make_trainer(model, tmp_path, samples(), batch=8, callbacks=[keepsight.handle_of(model)])
    assert trainer.callback_handler.callbacks.count(trainer.pre) == 1


def test_evaluation_is_untouched(tmp_path):
    model = attached()
    trainer, _ = train(model, tmp_path, samples(), batch=8)
    with_head = trainer.evaluate(samples())["eval_loss"]
    keepsight.handle_of(model).detach()
    model.eval()
    plain = InOrder(model=model, args=trainer.args, data_collator=collate)
    assert plain.evaluate(samples())["eval_loss"] == with_head


@pytest.mark.parametrize("family", ["llava-clip-llama", "qwen2.5-vl"])
@pytest.mark.slow
def test_resuming_trainer_itself_gets_the_weights_back(tmp_path, family):
    """Whatever names the family has on disk: LLaVA's are others than in memory."""
    settings = {"batch": 4, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    text = [{"ids": [1, 20, 21, 22 + i], "pixel_values": None} for i in range(8)]
    data = samples() if family == "llava-clip-llama" else text
    build = FAMILIES[family]

    def model(seed: int) -> Any:
        built = build(seed)[0]
        keepsight.attach(built, keepsight.PReConfig(weight=0.5 if family == "llava-clip-llama" else 0.0))
        return built

    whole = model(0)
    train(whole, tmp_path, data, **settings)
    other = model(1)  # any weights but those
    make_trainer(other, tmp_path / "again", data, **settings).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    expected, got = whole.state_dict(), other.state_dict()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def texts(n: int) -> list[dict[str, Any]]:
    return [{"ids": [1, 20, 21, 22 + i], "pixel_values": None} for i in range(n)]


@pytest.mark.slow
def test_life_is_proven_by_the_micro_batch_that_had_the_picture(tmp_path):
    """A picture, then text alone: the last micro-batch of every step shows nothing."""
    data = [row for pair in zip(samples()[2:6], texts(4), strict=True) for row in pair]
    trainer, gradients = train(attached(), tmp_path / "alive", data, batch=1, accumulate=2, max_steps=4)
    assert len(gradients.steps) == 4
    assert [row["pre_images"] for row in trainer.state.log_history[:-1]] == [1] * 4
    model = attached()
    keepsight.handle_of(model).head.requires_grad_(False)
    with pytest.raises(keepsight.DeadLossError, match="the prediction head is frozen"):
        train(model, tmp_path / "dead", data, batch=1, accumulate=2, max_steps=4)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_text_alone_trains_no_projector_and_does_not_crash(tmp_path, weight):
    """Either arm: with all else frozen, a micro-batch of text has nothing to learn."""
    model = attached(weight=weight)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    if weight:
        keepsight.handle_of(model).predictors.heads.requires_grad_(True)
    data = [row for pair in zip(samples()[2:6], texts(4), strict=True) for row in pair]
    before = model.model.multi_modal_projector.linear_2.weight.detach().clone()
    trainer, _ = train(model, tmp_path, data, batch=1, max_steps=8)
    assert trainer.state.global_step == 8
    assert not torch.equal(before, model.model.multi_modal_projector.linear_2.weight)


@pytest.mark.slow
def test_the_best_model_at_the_end_is_the_best_one(tmp_path):
    """`Trainer` reads it by the names in the file, as when it resumes. The first step's is called best."""
    once, _ = train(attached(), tmp_path / "once", samples(), batch=4, max_steps=1)
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    with_data = partial(PReTrainer, eval_dataset=samples())
    three = make_trainer(attached(), tmp_path / "three", samples(), with_data, batch=4, **settings, **best)
    three.train()
    assert three.state.best_global_step == 1
    expected = once.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in three.model.state_dict().items())


@pytest.mark.parametrize("inject", [False, True], ids=["mixin", "inject"])
def test_where_the_weight_has_decayed_to_nothing_there_is_no_life_to_prove(tmp_path, inject):
    """λ is 0 from the third step on; another training, as a recipe's second stage is, begins after that."""
    model, _ = llava_clip_llama()
    handle = keepsight.attach(model, keepsight.PReConfig(decay_steps=2), inject=inject)
    own: Any = {"cls": InOrder, "callbacks": [handle]} if inject else {}
    for _ in range(2):
        trainer = make_trainer(model, tmp_path, samples(), batch=8, max_steps=3, **own)
        trainer.train()
    assert [row["pre_weight"] for row in trainer.state.log_history[:-1]] == [0.0] * 3
    assert handle.steps == 6


@pytest.mark.parametrize("anchor", ["encoder", "moving_average"])
def test_observing_leaves_training_as_it_is_where_the_encoder_has_dropout(tmp_path, anchor):
    """The anchor's own pass through the encoder draws no random numbers of the model's."""
    bare, _ = llava_clip_llama()
    for layer in bare.model.vision_tower.encoder.layers:
        layer.self_attn.dropout = 0.25
    model = copy.deepcopy(bare)
    keepsight.attach(model, keepsight.PReConfig(weight=0.0, observe=True, anchor=anchor))
    train(bare, tmp_path / "bare", samples(), InOrder, batch=4, max_steps=2)
    train(model, tmp_path / "observed", samples(), batch=4, max_steps=2)
    keepsight.handle_of(model).detach()
    assert model.model.vision_tower.training
    assert all(torch.equal(p, q) for p, q in zip(bare.parameters(), model.parameters(), strict=True))


def test_an_optimizer_of_ones_own_from_param_groups_stays_as_it_is(tmp_path):
    """With its own schedule, which knows its groups."""
    model = attached(head_lr=0.5)
    optimizer = torch.optim.AdamW(keepsight.param_groups(model), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    make_trainer(
        model, tmp_path, samples(), partial(PReTrainer, optimizers=(optimizer, schedule)), batch=8, max_steps=3
    ).train()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-3 / 4, 0.5 / 4])
