"""PRe under `torch.compile`: gradients are those of the model as it is, and PRe itself is not traced at length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import keepsight
from tests.tiny import llava_clip_llama

CHOICES: dict[str, dict[str, Any]] = {
    "the paper's": {},
    "cascade of a second pass": {"layer": (1, 3), "cascade": True, "normalise": "centred", "anchor": "moving_average"},
    "injected": {"inject": True},
}


def gradients(choice: dict[str, Any] | None, *, compiled: bool) -> dict[str, torch.Tensor]:
    """Of one training forward and backward, by parameter name; with None for `choice` of the model without PRe."""
    model, batch = llava_clip_llama()
    model.train()
    handle = None
    if choice is not None:
        options = dict(choice)
        handle = keepsight.attach(model, inject=options.pop("inject", False), config=keepsight.PReConfig(**options))
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] >= 90, -100)
    torch._dynamo.reset()
    counters.clear()
    called = torch.compile(model, backend="eager") if compiled else model
    loss = called(**batch).loss
    (loss if handle is None else loss + handle.loss).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES)
def test_gradients_are_those_of_the_model_as_it_is(choice):
    expected = gradients(CHOICES[choice], compiled=False)
    got = gradients(CHOICES[choice], compiled=True)
    assert counters["stats"]["unique_graphs"] > 0  # some of it was compiled
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(got[name], gradient, rtol=1e-4, atol=1e-6), name
    assert got["model.keepsight_head.heads." + ("3" if "cascade" in choice else "2") + ".up.weight"].any()


@pytest.mark.slow
def test_the_compiler_sees_the_model_and_not_where_the_visual_tokens_are():
    """It would trace Python that asks the data, line by line, which takes several times as long as the model."""
    found = []
    for choice in (None, {}):
        gradients(choice, compiled=True)
        found.append((counters["stats"]["unique_graphs"], counters["stats"]["calls_captured"]))
    (bare, calls), (graphs, with_pre) = found
    assert bare <= graphs <= bare + 2
    assert calls <= with_pre <= calls + 20


@pytest.mark.slow
@pytest.mark.parametrize("anchor", ["pre_llm", "pre_projector"])
def test_code_compiled_without_the_hooks_is_told(anchor):
    """The compiler reuses what it made of another model of the class, hooks and all."""
    torch._dynamo.reset()
    before, batch = llava_clip_llama()
    before.train()
    if anchor == "pre_projector":  # all hooks but the projector's
        keepsight.attach(before)
    torch.compile(before, backend="eager")(**batch)
    model, _ = llava_clip_llama(seed=1)
    model.train()
    handle = keepsight.attach(model, keepsight.PReConfig(anchor=anchor))
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(RuntimeError, match=r"was not called: if the model is compiled, .* torch\._dynamo\.reset\(\)"):
        compiled(**batch)
    torch._dynamo.reset()
    compiled(**batch)
    assert handle.tokens == 48
    torch._dynamo.reset()
