"""The watch over a training: planted answers, independent computations, and a trainer without PRe."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from torch._dynamo.utils import counters
from transformers import TrainerCallback, TrainerState

from keepsight import FidelityCallback
from keepsight.diagnosis.monitor import RIDGE, RunningRidge
from keepsight.vlm.grids import ImageTokens
from tests.families import FAMILIES
from tests.pre.test_support import patches
from tests.tiny import llava_clip_llama
from tests.training.test_trainer import InOrder, make_trainer, samples, train

WIDTH, TOKENS, IMAGES = 12, 40, 4


def tokens() -> ImageTokens:
    zero = torch.zeros(IMAGES * TOKENS, dtype=torch.long)
    image = torch.arange(IMAGES).repeat_interleave(TOKENS)
    return ImageTokens(zero, zero, image, zero, zero.bool(), zero, zero, grids=(((1, TOKENS),),) * IMAGES)


def states(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.5, 3, WIDTH)
    return torch.randn(IMAGES * TOKENS, WIDTH, generator=generator) * scale + 2


def watched(layer_of, looks: int = 3) -> FidelityCallback:
    callback = FidelityCallback(dimensions=WIDTH)
    callback._index_of_layer = 2
    for seed in range(looks):
        given = states(seed)
        callback.look(given, layer_of(given, seed), tokens())
    return callback


def test_a_layer_that_turns_its_input_keeps_all_of_it():
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9)))[0]
    seen = watched(lambda given, seed: given @ turn + 5).history
    assert "sight_fidelity" not in seen[0]  # nothing before to be scored by
    assert seen[1]["sight_fidelity"] > 0.99
    assert seen[2]["sight_dimension"] == pytest.approx(seen[2]["sight_dimension_input"], rel=1e-4)


def test_a_layer_that_forgets_keeps_nothing():
    seen = watched(lambda given, seed: states(seed + 100)).history
    assert seen[2]["sight_fidelity"] < 0.05


def test_a_layer_that_keeps_half_of_the_channels():
    keep = (torch.arange(WIDTH) % 2).float()
    seen = watched(lambda given, seed: given * keep).history
    scale = torch.linspace(0.5, 3, WIDTH).square()
    assert seen[2]["sight_fidelity"] == pytest.approx(float((scale * keep).sum() / scale.sum()), abs=0.03)


def test_score_is_scikit_learns_on_new_tokens():
    generator = np.random.default_rng(0)
    x, new = generator.normal(size=(300, 6)) * [1, 2, 3, 1, 1, 5] + 1, generator.normal(size=(50, 6)) + 1
    mixing = generator.normal(size=(6, 6))
    y, new_y = x @ mixing + generator.normal(size=(300, 6)), new @ mixing
    running = RunningRidge()
    running.update(torch.tensor(x), torch.tensor(y))
    alpha = RIDGE * x.var(axis=0).mean() * len(x)
    fitted = Ridge(alpha=alpha).fit(x, y)
    error = ((fitted.predict(new) - new_y) ** 2).sum()
    expected = 1 - error / ((new_y - y.mean(axis=0)) ** 2).sum()
    assert running.score(torch.tensor(new), torch.tensor(new_y)) == pytest.approx(expected, abs=1e-9)


def test_few_tokens_a_look_are_enough_in_time():
    """Ten looks of 4 tokens, to which fading would hold the sums, are less than the 48 that 12 dimensions take."""
    running, scores = RunningRidge(), []
    for seed in range(40):
        given = states(seed)[:4]
        scores.append(running.score(given * 2, given))
        running.update(given * 2, given)
        assert running.count <= 48 + 4
    assert scores[:12] == [None] * 12
    assert all(score is not None and score > 0.95 for score in scores[12:])


def test_homogeneity_and_dimension_by_hand():
    seen = watched(lambda given, seed: given.abs(), looks=1).history[0]
    held = states(0).abs()
    unit = torch.nn.functional.normalize(held, dim=1).view(IMAGES, TOKENS, WIDTH)
    cosine = unit @ unit.mT
    expected = ((cosine.sum(dim=(1, 2)) - TOKENS) / (TOKENS * (TOKENS - 1))).mean().item()
    assert seen["sight_homogeneity"] == pytest.approx(expected, abs=1e-5)
    share = PCA().fit(held.double().numpy()).explained_variance_ratio_
    assert seen["sight_dimension"] == pytest.approx(1 / (share**2).sum(), rel=1e-5)


def test_it_warns_once_when_sight_is_lost():
    def fading(given, seed):
        return given if seed < 5 else states(seed + 100)

    with pytest.warns(UserWarning, match=r"layer 2 is losing sight of the pictures: it predicted 1\.00 .* at first"):
        watched(fading, looks=12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watched(lambda given, seed: given, looks=12)


@pytest.mark.slow
def test_in_a_trainer_without_pre(tmp_path):
    model, _ = llava_clip_llama()
    twin, _ = llava_clip_llama()
    callback = FidelityCallback(every=2, dimensions=8)
    trainer = make_trainer(model, tmp_path / "a", samples(), InOrder, batch=4, max_steps=6, callbacks=[callback])
    trainer.train()
    logged = [row for row in trainer.state.log_history if "sight_homogeneity" in row]
    assert [row["step"] for row in logged] == [1, 3, 5]  # steps 0, 2 and 4 of six
    assert all(-1 <= row["sight_homogeneity"] <= 1 and row["sight_dimension_input"] >= 1 for row in logged)
    assert "sight_fidelity" in logged[-1]
    train(twin, tmp_path / "b", samples(), InOrder, batch=4, max_steps=6)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert len(model.model._forward_pre_hooks) == len(twin.model._forward_pre_hooks)


class Tracker(TrainerCallback):
    """Reads logs as TensorBoard's does, which `report_to` puts before the user's callbacks."""

    def __init__(self) -> None:
        self.seen: list[set[str]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append({name for name in logs if name.startswith("sight_")})


def test_trackers_get_its_numbers_and_a_training_that_raised_leaves_nothing_behind(tmp_path):
    model, _ = llava_clip_llama()
    hooks = len(model.model._forward_pre_hooks)
    tracker, after, callback = Tracker(), Tracker(), FidelityCallback(every=1, dimensions=8)
    data = [samples()[0], {"ids": [], "pixel_values": None}]  # the second cannot be collated into a batch
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        train_with(model, tmp_path, data, [tracker, callback, after])
    train_with(model, tmp_path, samples()[:2], [tracker, callback, after])
    expected = {f"sight_{name}" for name in ("homogeneity", "homogeneity_input", "dimension", "dimension_input")}
    assert tracker.seen[-3] == after.seen[-3]  # of two steps and the closing log
    assert expected <= tracker.seen[-3]
    assert len(model.model._forward_pre_hooks) == hooks


def train_with(model, path, data, callbacks):
    make_trainer(model, path, data, InOrder, batch=1, max_steps=2, callbacks=callbacks).train()


def test_a_training_without_pictures_is_told_at_the_end(tmp_path):
    model, _ = llava_clip_llama()
    with pytest.warns(UserWarning, match="logged nothing: no training forward of 2 steps had a picture"):
        train_with(model, tmp_path, samples()[1:2] * 2, [FidelityCallback(every=1)])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*logged nothing")
        train_with(model, tmp_path, samples()[:2], [FidelityCallback(every=1)])


@pytest.mark.slow
def test_the_compiler_sees_the_model_and_not_the_watch():
    found = []
    for callback in (None, FidelityCallback(dimensions=8)):
        model, batch = llava_clip_llama()
        model.train()
        if callback is not None:
            callback.on_train_begin(None, None, None, model=model)
            callback.on_step_begin(None, TrainerState(), None)
        torch._dynamo.reset()
        counters.clear()
        torch.compile(model, backend="eager")(**batch)
        found.append((counters["stats"]["unique_graphs"], counters["stats"]["calls_captured"]))
    assert callback is not None
    assert [row["sight_homogeneity"] > -1 for row in callback.history] == [True]
    (bare, calls), (graphs, watched_calls) = found
    assert bare <= graphs <= bare + 2
    assert calls <= watched_calls <= calls + 20


@pytest.mark.parametrize("values", [{"every": 0}, {"dimensions": 0}, {"warn_drop": 0.0}])
def test_numbers_out_of_range(values):
    with pytest.raises(ValueError, match="allowed are 1 or more"):
        FidelityCallback(**values)


def test_several_gpus_in_one_process_are_refused():
    model, batch = llava_clip_llama()
    callback = FidelityCallback()
    callback.on_train_begin(None, None, None, model=model.train())
    callback.on_step_begin(None, TrainerState(), None)
    with pytest.raises(ValueError, match=r"nn\.DataParallel.*torchrun --nproc_per_node"):
        model.model._replicate_for_data_parallel()(**batch)


@pytest.mark.parametrize("name", ["LLaVA-NeXT", "LLaVA-OneVision", "Qwen2.5-VL"])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
def test_the_tokens_it_looks_at_are_those_of_patches(name, half):
    """Newline tokens are no patches; and the numbers are float32's in a trainer with bf16=True."""
    model, batch = FAMILIES[name].make()
    callback = FidelityCallback()
    callback.on_train_begin(None, None, None, model=model.train())
    callback.on_step_begin(None, TrainerState(), None)
    with torch.no_grad():  # in which the watch does not look
        mask = patches(model, batch, model(**batch, output_hidden_states=True).hidden_states[0])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        inputs = model(**batch, output_hidden_states=True).hidden_states[0]
    callback.on_train_end(None, TrainerState(), None)
    pictures = inputs[mask].detach().float().split(FAMILIES[name].tokens)
    units = [torch.nn.functional.normalize(one, dim=-1) for one in pictures]
    cosines = [(((u @ u.T).sum() - len(u)) / (len(u) * (len(u) - 1))).item() for u in units]
    (numbers,) = callback.history
    assert numbers["sight_homogeneity_input"] == pytest.approx(sum(cosines) / 3, abs=1e-5)
    share = PCA().fit(torch.cat(pictures).double().numpy()).explained_variance_ratio_
    assert numbers["sight_dimension_input"] == pytest.approx(1 / (share**2).sum(), rel=1e-4)
