"""Faults of related projects: tests that no other file has a place for; `docs/peers.md` names only real ones."""

import ast
import re
from pathlib import Path

import pytest
import torch

import keepsight
from keepsight.diagnosis.probes.probe import fit_probes
from keepsight.vlm import Vlm
from keepsight.vlm.capture import capture
from keepsight.vlm.view import hidden_states_out
from tests.tiny import FAMILIES, IMAGE, llava_clip_llama
from tests.training.test_trainer import attached, samples, train

ROOT = Path(__file__).resolve().parents[1]


def test_every_test_that_is_named_exists() -> None:
    table = (ROOT / "docs" / "peers.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in table.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(row[1]) for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) >= 11
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in (ROOT / "tests").rglob("test_*.py")]
    there = {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row[4])
        assert named, f"fault {row[1]} has no test"
        assert set(named) <= there, set(named) - there


@pytest.mark.parametrize("family", ["llava-clip-llama", "smolvlm"])
def test_states_of_text_and_padding_are_nothing_to_the_loss(family) -> None:
    model, batch = FAMILIES[family]()
    model.train()
    handle = keepsight.attach(model)
    model(**batch)
    before = handle.loss.item()
    elsewhere = (batch["input_ids"] != IMAGE)[..., None]

    def disturb(module, args, output):
        changed = hidden_states_out(output).masked_fill(elsewhere, 1e3)
        return changed if torch.is_tensor(output) else (changed, *output[1:])

    # The first of the layer's hooks, so that what PRe reads has been disturbed.
    Vlm(model).layers[handle.layer - 1].register_forward_hook(disturb, prepend=True)
    model(**batch)
    assert handle.loss.item() == before


@pytest.mark.parametrize("normalise", ["centred", "whitened"])
def test_running_statistics_survive_text_alone(normalise) -> None:
    assert not torch.distributed.is_initialized()
    model, batch = llava_clip_llama()
    model.train()
    handle = keepsight.attach(model, keepsight.PReConfig(normalise=normalise, weight=1.0))
    optimizer = torch.optim.SGD(keepsight.param_groups(model), lr=0.0)
    ids = torch.tensor([[1, 5, 6, 7]])
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    losses = []
    for given in (text, batch, text, batch, batch):
        out = model(**given)
        (handle.loss if out.loss is None else out.loss + handle.loss).backward()
        optimizer.step()
        losses.append(handle.loss.item())
    statistics = handle.predictors.statistics_of("anchor")
    assert statistics is not None
    assert int(statistics.seen) == 3  # steps with pictures
    assert all(bool(value.isfinite().all()) for value in statistics.state_dict().values())
    assert losses[0] == losses[2] == 0.0
    assert losses[3] == losses[4]  # the same batch, whose mean is known by then


def test_what_is_logged_is_what_is_documented(tmp_path) -> None:
    model = attached(layer=(1, 2), warmup_steps=3)
    trainer, _ = train(model, tmp_path, samples(), batch=4, max_steps=2)
    logged = {name for name in trainer.state.log_history[0] if name.startswith(("pre_", "lm_"))}
    written = set(re.findall(r"``((?:pre|lm)_\w+)(?:_<layer>)?``", keepsight.PReTrainerMixin.__doc__ or ""))
    by_layer = {"pre_cosine_1", "pre_cosine_2"}
    assert "pre_cosine_<layer>" in (keepsight.PReTrainerMixin.__doc__ or "")
    assert logged - by_layer == {name.rstrip("_") for name in written}
    assert by_layer <= logged
    guide = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in guide for name in logged - by_layer - {"pre_weight"})


def test_the_step_of_the_trainer_moves_with_lambda(tmp_path) -> None:
    """Gradients are linear in λ: at 1 they lie as far from 0.5 as this from 0, and not at 0."""
    found = []
    for weight in (0.0, 0.5, 1.0):
        _, gradients = train(attached(weight=weight), tmp_path / str(weight), samples(), batch=8)
        found.append(gradients.steps[0])
    none, half, one = found
    below = [name for name in none if "language_model.layers.0" in name]
    assert below
    for name in below:
        assert torch.allclose(one[name] - half[name], half[name] - none[name], atol=1e-6), name
        assert (half[name] - none[name]).norm() > 1e-3 * none[name].norm(), name


def test_a_probe_cannot_find_what_is_not_linear() -> None:
    """The class is the sign of a product: plain to one hidden layer, nothing to a linear map."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1200, 2, generator=generator)
    labels = ["same" if float(row.prod()) > 0 else "other" for row in x]
    probe = fit_probes(lambda layer: x, [0], labels, seed=0)
    assert probe.correct.mean() < 0.6
    linear = ["right" if float(row[0]) > 0 else "left" for row in x]
    assert fit_probes(lambda layer: x, [0], linear, seed=0).correct.mean() > 0.95


def test_layers_that_return_a_tuple_are_seen() -> None:
    model, batch = llava_clip_llama()
    layers = Vlm(model).layers
    with torch.no_grad(), capture(Vlm(model), [1, 2]) as plain:
        model(**batch)
    as_tuple, hidden = layers[1].forward, []

    def forward(*args, **kwargs):
        return (as_tuple(*args, **kwargs), "attention weights")

    layers[1].forward = forward
    # The decoder of today takes no tuple; a hook behind all others gives it what it wants.
    with torch.no_grad(), capture(Vlm(model), [1, 2]) as taken:
        layers[1].register_forward_hook(lambda _, args, output: hidden.append(output) or output[0])
        model(**batch)
    assert isinstance(hidden[0], tuple)
    assert all(torch.equal(taken.states[layer], plain.states[layer]) for layer in (1, 2))
