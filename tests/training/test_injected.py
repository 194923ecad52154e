"""`inject=True` in a trainer that is not changed: gradients and logs are those of the mixin."""

from functools import partial

import pytest
import torch
from transformers import TrainerCallback

import keepsight
from tests.tiny import llava_clip_llama
from tests.training.test_trainer import Gradients, InOrder, PReTrainer, make_trainer, samples

HEAD = "model.keepsight_head.heads.2.down.weight"


def test_the_last_partial_accumulation_counts_its_own_micro_batches(tmp_path):
    """Five samples of one picture each, two at a time: over two epochs steps of 2, 2, 1, 2, 2, 1 micro-batches."""
    found = {}
    for kind in ("mixin", "injected"):
        model, _ = llava_clip_llama()
        handle = keepsight.attach(model, keepsight.PReConfig(), inject=kind == "injected")
        gradients = Gradients()
        trainer = make_trainer(
            model,
            tmp_path / kind,
            samples()[2:7],
            InOrder if kind == "injected" else PReTrainer,
            batch=1,
            accumulate=2,
            callbacks=[gradients, handle] if kind == "injected" else [gradients],
            max_steps=6,
            learning_rate=0.0,
        )
        trainer.train()
        found[kind] = [step[HEAD].norm().item() for step in gradients.steps]
    ratios = [own / exact for own, exact in zip(found["injected"], found["mixin"], strict=True)]
    assert [round(ratio, 4) for ratio in ratios] == [1.0] * 6


class Tracker(TrainerCallback):
    """What a tracker such as TensorBoard gets."""

    def __init__(self) -> None:
        self.got: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.got.append(dict(logs))


@pytest.mark.parametrize("config", [{}, {"layer": (1, 3), "warmup_steps": 4}], ids=["paper", "two layers, warm-up"])
def test_the_callback_logs_what_the_mixin_logs(tmp_path, config):
    """Eight samples, one without a picture and one with two, as 4 × 2, twice; logged every second step."""
    logs, trackers = {}, {}
    for kind in ("mixin", "injected"):
        model, _ = llava_clip_llama()
        handle = keepsight.attach(model, keepsight.PReConfig(**config), inject=kind == "injected")
        trackers[kind] = Tracker()
        trainer = make_trainer(
            model,
            tmp_path / kind,
            samples(),
            InOrder if kind == "injected" else PReTrainer,
            batch=2,
            accumulate=4,
            callbacks=[trackers[kind], handle] if kind == "injected" else [trackers[kind]],
            max_steps=4,
            logging_steps=2,
            learning_rate=0.0,
        )
        trainer.train()
        logs[kind] = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs["injected"]) == 2
    for got, expected, tracked in zip(logs["injected"], logs["mixin"], trackers["injected"].got, strict=False):
        names = {name for name in expected if name.startswith("pre_")}
        assert {name for name in got if name.startswith("pre_")} == names
        for name in names:
            assert got[name] == tracked[name] == pytest.approx(expected[name], abs=1e-6), name
        assert (got["pre_images"], got["pre_tokens"], got["pre_skipped"]) == (8, 128, 1)
        assert got["loss"] == pytest.approx(expected["lm_loss"], abs=2e-4)  # `loss` is rounded
    if config:
        assert [log["pre_weight"] for log in logs["injected"]] == pytest.approx(
            [0.5 * 2 / 5, 0.5 * 4 / 5]
        )  # steps 2 and 4 of a warm-up of 4
        assert "pre_cosine_3" in logs["injected"][0]


def test_a_baseline_logs_nothing_of_the_kind(tmp_path):
    model, _ = llava_clip_llama()
    handle = keepsight.attach(model, keepsight.PReConfig(weight=0.0), inject=True)
    trainer = make_trainer(model, tmp_path, samples(), InOrder, batch=8, callbacks=[handle])
    trainer.train()
    assert not any(name.startswith("pre_") for log in trainer.state.log_history for name in log)


class Stream(torch.utils.data.IterableDataset):
    """Data whose number nobody knows."""

    def __iter__(self):
        yield from samples()


@pytest.mark.parametrize("kind", ["mixin", "injected"])
def test_data_may_come_as_a_stream(tmp_path, kind):
    model, _ = llava_clip_llama()
    handle = keepsight.attach(model, inject=kind == "injected")
    cls, callbacks = (InOrder, [handle]) if kind == "injected" else (PReTrainer, [])
    trainer = make_trainer(model, tmp_path, Stream(), cls, batch=2, accumulate=2, max_steps=2, callbacks=callbacks)
    trainer.train()
    assert [log["pre_images"] for log in trainer.state.log_history if "loss" in log] == [4, 4]
    assert handle.accumulation == 2


def test_averages_of_weights_in_shards_are_refused(tmp_path):
    """As ZeRO-3 marks the parameters that it holds."""
    model, _ = llava_clip_llama()
    handle = keepsight.attach(model, keepsight.PReConfig(anchor="moving_average"), inject=True)
    model.model.multi_modal_projector.linear_1.weight.ds_id = 0
    trainer = make_trainer(model, tmp_path, samples(), InOrder, batch=8, callbacks=[handle])
    with pytest.raises(ValueError, match=r"'moving_average' keeps averages .* this trainer has them in shards"):
        trainer.train()


def test_a_learning_rate_of_the_head_that_the_trainer_does_not_heed_is_refused(tmp_path):
    def trainer(**own):
        model, _ = llava_clip_llama()
        handle = keepsight.attach(model, keepsight.PReConfig(head_lr=0.5), inject=True)
        optimizer = torch.optim.AdamW(keepsight.param_groups(model), lr=1e-3)
        cls = partial(InOrder, optimizers=(optimizer, None)) if own.pop("given", False) else InOrder
        return make_trainer(model, tmp_path, samples(), cls, batch=8, callbacks=[handle], **own)

    with pytest.raises(ValueError, match=r"head_lr is 0.5 with inject=True.* has the head at 0.001: give the trainer"):
        trainer().train()
    warm = trainer(given=True, max_steps=2, warmup_steps=2, lr_scheduler_type="constant_with_warmup")
    warm.train()
    assert [group["lr"] for group in warm.optimizer.param_groups] == [1e-3, 0.5]
