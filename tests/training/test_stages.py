"""What goes from stage to stage, and from a stopped run to the resumed one: λ, head, anchors that remember, counts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from keepsight.pre import PReConfig, handle_of
from keepsight.training.config import DataConfig, ModelConfig, StageConfig, TrainConfig
from keepsight.training.conversations import ConversationError
from keepsight.training.recipe import train
from tests.tiny import llava
from tests.tiny_processors import make_llava
from tests.training.conftest import FULL, STEPS
from tests.training.test_conversations import entry
from tests.training.test_recipe import weights


@pytest.mark.slow
def test_counts_of_a_resumed_run_cover_all_of_it(setting, tmp_path: Path) -> None:
    """What was found out before the stop is not seen again after it: every entry is read once."""
    entries = [entry("<image>\nwhat color ?", "red", image="red.png"), entry("hello", "world " * 30)]
    (tmp_path / "data.json").write_text(json.dumps([entries[n % 2] | {"id": str(n)} for n in range(12)]))
    given = {**setting, "projector": StageConfig(enabled=False), "max_length": 24, "save_steps": 1}
    given["data"] = replace(setting["data"], cache_megabytes=0)
    given["full"] = replace(FULL, max_steps=None, epochs=1.0, batch_size=2)

    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 5:
                raise KeyboardInterrupt

    whole = train(TrainConfig(**given))
    given["out"] += "2"
    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig(**given), callbacks=[Stops()])
    resumed = train(TrainConfig(**given), resume=True)
    assert whole.info["counts"] == resumed.info["counts"]
    counts = whole.info["counts"]
    assert counts["full: text shortened to max_length"] == counts["full: samples without a picture"] == 6
    assert (counts["full: pictures"], counts["full: visual tokens"]) == (6, 6 * 4)
    (tmp_path / "data.json").write_text(json.dumps(entries[:1] * 3))
    resumed.update(finished=False)
    with pytest.raises(ConversationError, match="is of a run on 12 entries, and there are 3 now"):
        train(TrainConfig(**given), resume=True)


@pytest.mark.slow
def test_steps_after_the_last_log_of_a_stage_are_counted_after_a_resume(setting) -> None:
    """Three steps, a log after the second: the last one's pictures are in the stage's checkpoint too."""

    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if Path(args.output_dir).name == "full":
                raise KeyboardInterrupt

    def counts() -> dict[str, int]:
        found = json.loads((Path(config.out) / "run.json").read_text())["counts"]
        return {name: value for name, value in found.items() if name.startswith("projector: ")}

    config = TrainConfig(**{**setting, "trainer": {**setting["trainer"], "logging_steps": 2}, "full": FULL})
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[Stops()])
    before = counts()
    assert before["projector: visual tokens"] == 4 * before["projector: pictures"] >= 4 * 10
    train(config, resume=True)
    assert counts() == before


class Weights(TrainerCallback):
    """λ and the head at the start of each stage."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, torch.Tensor, int]] = []
        self.ended: list[torch.Tensor] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        handle = handle_of(model)
        self.seen.append((handle.config.weight, handle.head.up.weight.detach().clone(), handle.steps))

    def on_train_end(self, args, state, control, model=None, **kwargs) -> None:
        self.ended.append(handle_of(model).head.up.weight.detach().clone())


@pytest.mark.slow
def test_a_stage_may_have_a_weight_of_its_own(setting) -> None:
    watch = Weights()
    stages = {"projector": replace(STEPS, pre_weight=0.125), "full": FULL}
    config = TrainConfig(**{**setting, **stages}, pre=PReConfig(weight=0.5))
    run = train(config, callbacks=[watch])
    assert [(weight, steps) for weight, _, steps in watch.seen] == [(0.125, 0), (0.5, 3)]
    assert torch.equal(watch.seen[1][1], watch.ended[0])  # the head goes on
    same = train(
        TrainConfig(
            **{**setting, "out": setting["out"] + "2", "projector": STEPS, "full": replace(FULL, pre_weight=0.5)},
            pre=PReConfig(weight=0.125),
        )
    )
    one, two = weights(run.path / "model"), weights(same.path / "model")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_a_weight_of_zero_in_a_stage_is_the_stage_without_pre(setting) -> None:
    zero = train(TrainConfig(**{**setting, "projector": replace(STEPS, pre_weight=0.0)}))
    off = train(TrainConfig(**{**setting, "out": setting["out"] + "2", "projector": replace(STEPS, pre=False)}))
    one, two = weights(zero.path / "model"), weights(off.path / "model")
    assert all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(ValueError, match=r"pre_weight is 0\.1 and pre is false; set one of them"):
        StageConfig(pre=False, pre_weight=0.1)
    with pytest.raises(ValueError, match=r"pre_weight is -1\.0; allowed: 0 or more"):
        StageConfig(pre_weight=-1.0)


def test_observing_is_for_stages_without_weight() -> None:
    data = DataConfig(conversations="data.json")
    config = TrainConfig(
        model=ModelConfig(path="m"),
        out="run",
        data=data,
        pre=PReConfig(weight=0.0, observe=True),
        full=replace(FULL, pre_weight=0.5),
    )
    first, second = (config.pre_in(stage) for stage in config.stages().values())
    assert (first.weight, first.observe) == (0.0, True)
    assert (second.weight, second.observe) == (0.5, False)


@pytest.mark.slow
def test_the_encoders_anchor_stays_the_initial_one_when_a_later_stage_trains_it(setting) -> None:
    """In the first stage it is frozen, and so not held apart; the second moves it."""
    averages: list[dict[str, torch.Tensor]] = []

    class Held(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs) -> None:
            averages.append(handle_of(model).predictors.teacher.averages())

    model = llava(patch=8)
    initial = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    every = replace(FULL, train=("projector", "language_model", "encoder"))
    config = TrainConfig(**{**setting, "full": every}, pre=PReConfig(anchor="encoder"))
    train(config, model=model, processor=make_llava(), callbacks=[Held()])
    assert {name.split(".")[0] for name in averages[0]} == {"multi_modal_projector"}
    held = averages[1]
    assert {name.split(".")[0] for name in held} == {"multi_modal_projector", "vision_tower"}
    assert all(torch.equal(value, initial[name]) for name, value in held.items())
    moved = [name for name, p in model.model.named_parameters() if name in held and not torch.equal(p, initial[name])]
    assert any("vision_tower" in name for name in moved)
