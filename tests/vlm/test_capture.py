import copy
from typing import Any

import pytest
import torch
from torch import nn

from keepsight.vlm import Vlm, capture
from tests import families
from tests.tiny import FAMILIES, IMAGE, llava_clip_llama

ALL = range(5)


def reference(model: Any, vlm: Vlm, batch: dict[str, Any]) -> dict[int, torch.Tensor]:
    """h[0] … h[L-1] from transformers; h[L] is not among its outputs, which end after the final norm."""
    out = model(**batch, output_hidden_states=True)
    mask = batch["input_ids"] == IMAGE
    newline = getattr(vlm.core, "image_newline", None)
    if newline is not None:
        mask &= ~(out.hidden_states[0] == newline).all(dim=-1)
    return {layer: state[mask] for layer, state in enumerate(out.hidden_states)}


def assert_equal(
    states: dict[int, torch.Tensor], expected: dict[int, torch.Tensor], vlm: Vlm, atol: float = 0.0
) -> None:
    assert sorted(states) == list(ALL)
    for layer in range(vlm.depth):
        assert torch.allclose(states[layer], expected[layer], rtol=0, atol=atol), layer
    normed = vlm.final_norm(states[vlm.depth])
    assert torch.allclose(normed, expected[vlm.depth], rtol=0, atol=max(atol, 1e-6))
    assert not torch.allclose(states[vlm.depth], expected[vlm.depth], atol=1e-3)  # before the norm, not after


@pytest.mark.parametrize("name", families.WORKING)
def test_equals_output_hidden_states(name):
    model, batch = families.FAMILIES[name].make()
    vlm = Vlm(model)
    with torch.no_grad(), capture(vlm, ALL) as taken:
        expected = reference(model, vlm, batch)
    assert_equal(taken.states, expected, vlm)
    with torch.no_grad(), capture(vlm, ALL) as without_head:
        vlm.forward_core(**batch)
    assert_equal(without_head.states, expected, vlm)


@pytest.mark.parametrize("name", families.WORKING)
def test_what_follows_the_picture_matters_only_where_images_are_said_to_be_bidirectional(name):
    model, batch = families.FAMILIES[name].make()
    vlm = Vlm(model)
    other = {**batch, "input_ids": torch.where(batch["input_ids"] == 10, 11, batch["input_ids"])}  # the very last word
    assert not torch.equal(batch["input_ids"], other["input_ids"])
    with torch.no_grad(), capture(vlm, [4]) as taken:
        vlm.forward_core(**batch)
        before = taken.states[4]
        vlm.forward_core(**other)
    same = torch.allclose(before, taken.states[4], rtol=0, atol=1e-6)
    assert same or vlm.bidirectional_images


@pytest.mark.parametrize("family", ["llava-clip-llama", "qwen2.5-vl", "gemma3"])
def test_equals_nnsight(family):
    nnsight = pytest.importorskip("nnsight")
    model, batch = FAMILIES[family]()
    vlm = Vlm(model)
    with torch.no_grad(), capture(vlm, [1, 2, 3, 4]) as taken:
        model(**batch)
    traced = nnsight.NNsight(copy.deepcopy(model))
    mask = batch["input_ids"] == IMAGE
    layers = traced.model.language_model.layers
    with torch.no_grad(), traced.trace(**batch):
        first = layers[0].output.save()
        second = layers[1].output.save()
        third = layers[2].output.save()
        fourth = layers[3].output.save()
    for layer, output in enumerate((first, second, third, fourth), start=1):
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        assert torch.equal(taken.states[layer], hidden[mask]), layer


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_gradient_checkpointing(reentrant):
    model, batch = llava_clip_llama()
    vlm = Vlm(model)
    with torch.no_grad():
        expected = reference(model, vlm, batch)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with capture(vlm, ALL) as taken:
        model(**batch).logits.sum().backward()  # recomputed layers must not be captured again
    assert_equal(taken.states, expected, vlm, atol=1e-6)


def test_through_peft():
    peft = pytest.importorskip("peft")
    model, batch = llava_clip_llama()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=r".*language_model.*q_proj")).eval()
    vlm = Vlm(wrapped)
    with torch.no_grad(), capture(vlm, ALL) as taken:
        expected = reference(wrapped, vlm, batch)
    assert_equal(taken.states, expected, vlm)


def test_through_ddp(tmp_path):
    model, batch = llava_clip_llama()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        vlm = Vlm(wrapped)
        with torch.no_grad(), capture(vlm, ALL) as taken:
            expected = reference(wrapped, vlm, batch)
    finally:
        torch.distributed.destroy_process_group()
    assert_equal(taken.states, expected, vlm)


@pytest.mark.slow
def test_under_compile():
    model, batch = llava_clip_llama()
    vlm = Vlm(model)
    with torch.no_grad():
        expected = reference(model, vlm, batch)
    compiled = torch.compile(model, backend="eager")
    vlm = Vlm(compiled)
    with torch.no_grad(), capture(vlm, ALL) as taken:  # before the first compiled call
        compiled(**batch)
    assert_equal(taken.states, expected, vlm, atol=1e-6)


def test_a_sink_gets_the_layers_in_order_and_nothing_is_kept():
    model, batch = llava_clip_llama()
    got: list[tuple[int, torch.Size]] = []
    with (
        torch.no_grad(),
        capture(Vlm(model), ["last", 0, "middle"], sink=lambda layer, t: got.append((layer, t.shape))) as taken,
    ):
        model(**batch)
    assert got == [(0, (48, 32)), (2, (48, 32)), (4, (48, 32))]
    assert taken.states == {}


def test_states_carry_gradient_in_training():
    model, batch = llava_clip_llama()
    with capture(Vlm(model), [2]) as taken:
        model(**batch)
    taken.states[2].sum().backward()
    assert model.model.language_model.layers[1].mlp.down_proj.weight.grad is not None
    assert model.model.language_model.layers[2].mlp.down_proj.weight.grad is None


def test_hooks_go_away_even_after_an_error():
    model, _ = llava_clip_llama()
    vlm = Vlm(model)
    with pytest.raises(RuntimeError, match="stop"), capture(vlm, ALL):
        raise RuntimeError("stop")
    assert not vlm.core._forward_hooks
    assert not vlm.core._forward_pre_hooks
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in vlm.layers)


def test_ids_are_needed_to_find_the_pictures():
    model, batch = llava_clip_llama()
    embeds = model.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(ValueError, match="called without 'input_ids'"), capture(Vlm(model), [0]):
        model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])


def test_batches_without_pictures_give_no_tokens():
    model, _ = llava_clip_llama()
    ids = torch.tensor([[1, 5, 6]])
    with torch.no_grad(), capture(Vlm(model), [0, 4]) as taken:
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert {layer: tuple(state.shape) for layer, state in taken.states.items()} == {0: (0, 32), 4: (0, 32)}


@pytest.mark.slow
def test_a_model_compiled_before_says_so():
    """Hooks put on after the first compiled call are passed by."""
    model, batch = llava_clip_llama()
    compiled = torch.compile(model, backend="eager")
    torch._dynamo.reset()
    with torch.no_grad():
        compiled(**batch)
        late = r"hooks on layers \[1, 2\] were not called.*torch\._dynamo\.reset"
        with pytest.raises(RuntimeError, match=late), capture(Vlm(compiled), [1, 2]):
            compiled(**batch)
    torch._dynamo.reset()
