"""Every anchor, granularity, distance, layer scheme and normalisation, against the definition written out by hand.

Pairwise covering rather than the full product: each value of each choice meets each value of the others in some case.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import keepsight
from keepsight.pre.normalise import AnchorStatistics
from keepsight.vlm import Vlm
from keepsight.vlm.features import image_features, projector_of
from tests.tiny import FAMILIES, IMAGE, TOKENS, llava_clip_llama, qwen2_5_vl

CASES = [
    ("llava-clip-llama", {"anchor": "pre_projector", "granularity": "patch", "distance": "mse"}),
    ("llava-siglip-qwen2", {"anchor": "pre_projector", "granularity": "global", "distance": "cosine"}),
    ("qwen2.5-vl", {"anchor": "pre_projector", "granularity": "relational", "distance": "infonce"}),
    ("internvl", {"anchor": "pre_projector", "granularity": "patch", "distance": "cosine"}),
    ("gemma3", {"anchor": "pre_projector", "granularity": "patch", "distance": "infonce"}),
    ("smolvlm", {"anchor": "pre_projector", "granularity": "patch", "distance": "cosine"}),
    ("llava-clip-llama", {"anchor": "encoder", "granularity": "relational", "distance": "cosine"}),
    ("qwen2.5-vl", {"anchor": "encoder", "granularity": "patch", "distance": "cosine"}),
    ("llava-clip-llama", {"anchor": "moving_average", "granularity": "patch", "distance": "infonce"}),
    ("qwen2.5-vl", {"anchor": "moving_average", "granularity": "global", "distance": "mse"}),
    ("internvl", {"anchor": "moving_average", "granularity": "relational", "distance": "mse"}),
    ("llava-clip-llama", {"anchor": "pre_llm", "granularity": "global", "distance": "mse"}),
    ("gemma3", {"anchor": "pre_llm", "granularity": "relational", "distance": "infonce"}),
    ("qwen2.5-vl", {"anchor": "pre_llm", "granularity": "patch", "distance": "mse"}),
    ("smolvlm", {"anchor": "pre_llm", "granularity": "global", "distance": "cosine"}),
]


def one_loss(prediction: torch.Tensor, anchor: torch.Tensor, granularity: str, distance: str) -> torch.Tensor:
    """Of one picture, token by token: [N, d'] twice."""
    n = len(prediction)
    if granularity == "global":
        prediction, anchor, n = prediction.mean(dim=0, keepdim=True), anchor.mean(dim=0, keepdim=True), 1
    if granularity == "relational":
        prediction, anchor = (
            torch.stack([torch.stack([F.cosine_similarity(a, b, dim=0) for b in x]) for a in x])
            for x in (prediction, anchor)
        )
    losses = []
    for i in range(n):
        if distance == "cosine":
            losses.append(-F.cosine_similarity(prediction[i], anchor[i], dim=0))
        elif distance == "mse":
            target = anchor[i]
            if granularity != "relational":
                target = (target - target.mean()) / (target.var(correction=0) + 1e-5).sqrt()
            losses.append((prediction[i] - target).square().mean())
        else:
            scores = torch.stack([F.cosine_similarity(prediction[i], anchor[j], dim=0) for j in range(n)]) / 0.1
            losses.append(scores.logsumexp(dim=0) - scores[i])
    return torch.stack(losses).mean()


def pooled_by_hand(model: Any, batch: dict[str, Any], family: str) -> torch.Tensor:
    """The projector's input on the token grid: its merging replaced by a plain mean, the rest of the family's own code.

    [T, d_v], in the order of the visual tokens.
    """
    vlm = Vlm(model)
    projector = projector_of(vlm)
    merge = {"qwen2.5-vl": 4, "gemma3": 2, "smolvlm": 2}.get(family, 1)

    def mean(features: torch.Tensor) -> torch.Tensor:
        if family == "qwen2.5-vl":
            return features.view(-1, merge, features.shape[-1]).mean(dim=1)
        if merge == 1:
            return features
        side = round(features.shape[1] ** 0.5)
        rows = []
        for tile in features:
            square = tile.view(side, side, -1)
            for r in range(0, side, merge):
                for c in range(0, side, merge):
                    rows.append(square[r : r + merge, c : c + merge].flatten(0, 1).mean(dim=0))
        return torch.stack(rows).view(len(features), -1, features.shape[-1])

    kept = projector.forward
    projector.forward = mean
    try:
        with torch.no_grad():
            return image_features(vlm, batch)
    finally:
        projector.forward = kept


@pytest.mark.parametrize(("family", "choice"), CASES, ids=[f"{f}-{'-'.join(c.values())}" for f, c in CASES])
def test_loss_is_the_definition(family, choice):
    model, batch = FAMILIES[family]()
    model.train()
    initial = copy.deepcopy(model)
    handle = keepsight.attach(model, keepsight.PReConfig(weight=0.5, anchor_decay=0.9, **choice))
    with torch.no_grad():  # what learns has moved since: the anchors that remember must not follow
        for p in [*model.get_encoder(modality="image").parameters(), *projector_of(Vlm(model)).parameters()]:
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    out = model(**batch, output_hidden_states=True)
    mask = batch["input_ids"] == IMAGE
    anchor = {
        "pre_llm": lambda: out.hidden_states[0][mask].detach(),
        "pre_projector": lambda: pooled_by_hand(model, batch, family),
        "encoder": lambda: pooled_by_hand(initial, batch, family),
        "moving_average": lambda: image_features(Vlm(initial), batch).detach(),  # no step taken yet
    }[choice["anchor"]]()
    prediction = handle.head(out.hidden_states[2][mask])
    assert prediction.shape == anchor.shape
    sizes = TOKENS[family]
    losses = [
        one_loss(p, a, choice["granularity"], choice["distance"])
        for p, a in zip(prediction.split(sizes), anchor.split(sizes), strict=True)
    ]
    assert handle.loss.item() == pytest.approx(0.5 * torch.stack(losses).mean().item(), abs=2e-6)
    assert handle.sight.images == 3
    handle.loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    assert any("keepsight_head" in name for name in reached)
    assert not any("layers.3" in name for name in reached if "vision" not in name and "visual" not in name)
    handle.detach()
    assert not any("keepsight" in name for name in model.state_dict())


def test_the_moving_average_moves_with_the_optimizer():
    model, batch = llava_clip_llama()
    model.train()
    handle = keepsight.attach(model, keepsight.PReConfig(anchor="moving_average", anchor_decay=0.75))
    name = "multi_modal_projector.linear_2.weight"
    weight = model.model.get_parameter(name)
    expected = weight.detach().clone()
    optimizer = torch.optim.SGD(keepsight.param_groups(model), lr=1.0)
    for _ in range(3):
        model(**batch)
        handle.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected = 0.75 * expected + 0.25 * weight.detach()
        assert torch.allclose(handle.predictors.teacher.averages()[name], expected, atol=1e-7)
    assert not torch.allclose(expected, weight)


def test_a_frozen_encoder_needs_no_second_pass_and_no_copy():
    model, _ = llava_clip_llama()
    model.get_encoder(modality="image").requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    handle = keepsight.attach(model, keepsight.PReConfig(anchor="encoder"))
    assert handle.predictors.teacher is None


def cosines(handle: Any, out: Any, batch: dict[str, Any], layer: int, target: torch.Tensor) -> torch.Tensor:
    mask = batch["input_ids"] == IMAGE
    prediction = handle.predictors.heads[str(layer)](out.hidden_states[layer][mask])
    return F.cosine_similarity(prediction, target, dim=-1).view(3, 16).mean()


def test_several_layers_are_a_weighted_mean():
    model, batch = llava_clip_llama()
    model.train()
    handle = keepsight.attach(model, keepsight.PReConfig(layer=(3, "middle"), layer_weights=(3.0, 1.0), weight=1.0))
    assert handle.layers == [2, 3]
    out = model(**batch, output_hidden_states=True)
    anchor = out.hidden_states[0][batch["input_ids"] == IMAGE]
    at_2, at_3 = (cosines(handle, out, batch, layer, anchor) for layer in (2, 3))
    assert handle.loss.item() == pytest.approx(-(0.25 * at_2 + 0.75 * at_3).item(), abs=1e-6)
    assert handle.cosine == pytest.approx(0.5 * (at_2 + at_3).item(), abs=1e-6)
    assert [handle.sights[layer].cosine for layer in (2, 3)] == pytest.approx([at_2.item(), at_3.item()], abs=1e-6)


def test_cascade_each_layer_predicts_the_one_below():
    model, batch = llava_clip_llama()
    model.train()
    handle = keepsight.attach(model, keepsight.PReConfig(layer=(1, 2, 3), cascade=True, weight=1.0))
    out = model(**batch, output_hidden_states=True)
    mask = batch["input_ids"] == IMAGE
    expected = torch.stack(
        [cosines(handle, out, batch, layer, out.hidden_states[layer - 1][mask].detach()) for layer in (1, 2, 3)]
    )
    assert handle.loss.item() == pytest.approx(-expected.mean().item(), abs=1e-6)
    handle.loss.backward(retain_graph=True)
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and "keepsight" not in n}
    model.zero_grad()
    (-expected.mean()).backward()
    assert all(torch.allclose(p.grad, got[n], atol=1e-7) for n, p in model.named_parameters() if n in got)


@pytest.mark.parametrize("normalise", ["centred", "whitened"])
def test_normalisation_uses_the_steps_before(normalise):
    model, batch = llava_clip_llama()
    model.train()
    handle = keepsight.attach(model, keepsight.PReConfig(normalise=normalise, weight=1.0))
    optimizer = torch.optim.SGD(keepsight.param_groups(model), lr=0.0)
    mask = batch["input_ids"] == IMAGE
    anchors = []
    for step in range(2):
        out = model(**batch, output_hidden_states=True)
        anchor = out.hidden_states[0][mask].detach()
        target = anchor
        if step:
            target = anchor - anchors[0].mean(dim=0)
            if normalise == "whitened":
                covariance = torch.cov(anchors[0].double().T, correction=0)
                floor = 0.01 * covariance.trace() / len(covariance) * torch.eye(len(covariance), dtype=torch.float64)
                values, vectors = torch.linalg.eigh(covariance + floor)
                target = (target.double() @ (vectors * values**-0.5) @ vectors.T).float()
        assert handle.loss.item() == pytest.approx(-cosines(handle, out, batch, 2, target).item(), abs=1e-5)
        handle.loss.backward()
        optimizer.step()
        anchors.append(anchor)
    assert "model.keepsight_head.statistics.anchor.mean" in model.state_dict()


def test_whitening_makes_planted_data_white():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator) * torch.tensor([10.0, 5.0, 2.0, 1.0, 1.0, 1.0])
    x = torch.randn(20_000, 6, generator=generator) @ mixing + 100
    statistics = AnchorStatistics(6, whiten=True)
    statistics.collect(x[:10_000])
    statistics.collect(x[10_000:])
    statistics.commit()
    white = statistics(x)
    assert white.mean(dim=0).abs().max() < 1e-2
    # A direction of variance v ends with v / (v + floor): one, but for the weakest.
    values, vectors = torch.linalg.eigh(torch.cov(x.double().T, correction=0))
    expected = (vectors * (values / (values + 0.01 * values.mean()))) @ vectors.T
    assert torch.allclose(torch.cov(white.double().T, correction=0), expected, atol=1e-3)


def test_micro_batches_share_the_statistics_of_the_steps_before():
    model, batch = llava_clip_llama()
    model.train()
    one = copy.deepcopy(model)
    config = keepsight.PReConfig(normalise="whitened")
    parts = [
        {
            "input_ids": batch["input_ids"][r : r + 1],
            "attention_mask": batch["attention_mask"][r : r + 1],
            "pixel_values": batch["pixel_values"][i],
        }
        for r, i in ((0, slice(0, 2)), (1, slice(2, 3)))
    ]
    found = []
    for copy_, micro in ((one, [batch]), (model, parts)):
        handle = keepsight.attach(copy_, config)
        handle.images_in_step = 3
        optimizer = torch.optim.SGD(keepsight.param_groups(copy_), lr=0.1)
        losses = []
        for _ in range(3):
            total = 0.0
            for part in micro:
                copy_(**part)
                handle.loss.backward()
                total += handle.loss.item()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
        found.append(losses)
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_schedule_of_the_weight_by_hand():
    config = keepsight.PReConfig(weight=1.0, warmup_steps=3, decay_steps=4)
    assert [config.weight_at(step) for step in range(9)] == pytest.approx([0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0, 0])
    assert keepsight.PReConfig(weight=0.5).weight_at(10**6) == 0.5


def test_the_weight_follows_the_optimizers_steps_and_survives_a_checkpoint():
    model, batch = llava_clip_llama()
    model.train()
    handle = keepsight.attach(model, keepsight.PReConfig(weight=1.0, warmup_steps=3))
    optimizer = torch.optim.SGD(keepsight.param_groups(model), lr=0.0)
    seen = []
    for _ in range(3):
        model(**batch)
        seen.append(handle.loss.item() / -handle.cosine)
        handle.loss.backward()
        optimizer.step()
    assert seen == pytest.approx([0.25, 0.5, 0.75])
    again, _ = llava_clip_llama()
    resumed = keepsight.attach(again, keepsight.PReConfig(weight=1.0, warmup_steps=3))
    assert resumed.weight == 0.25
    again.load_state_dict(model.state_dict())
    assert resumed.steps == 3
    assert resumed.weight == 1.0


def control_target(kind: str) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """What the head is measured against, the true anchor, and the predictions' cosine to it: [3, 16, d]."""
    model, batch = llava_clip_llama()
    model.train()
    handle = keepsight.attach(model, keepsight.PReConfig(control=kind, weight=1.0))
    targets = []
    observer = handle._forward.observers[2]
    look = observer.look

    def watched(prediction, target, *args, **kwargs):
        targets.append(target)
        return look(prediction, target, *args, **kwargs)

    observer.look = watched
    for _ in range(2):
        out = model(**batch, output_hidden_states=True)
    anchor = out.hidden_states[0][batch["input_ids"] == IMAGE].detach()
    return targets[0].view(3, 16, -1), anchor.view(3, 16, -1), [t.view(3, 16, -1) for t in targets]


def test_control_other_image():
    """The picture before; the first has only its own patches, back to front, until another batch came before it."""
    first, anchor, (_, target) = control_target("other_image")
    assert torch.equal(first[1:], anchor[:-1])
    assert torch.equal(first[0], anchor[0].flip(0))
    assert torch.equal(target, anchor.roll(1, dims=0))


def test_control_shuffled_patches():
    target, anchor, both = control_target("shuffled_patches")
    for mine, own in zip(target, anchor, strict=True):
        order = torch.cdist(mine, own).argmin(dim=1)
        assert sorted(order.tolist()) == list(range(16))
        assert torch.equal(mine, own[order])
        assert order.tolist() != list(range(16))
    assert not torch.equal(both[0], both[1])  # another order in every forward


def test_control_random_is_one_vector_a_place():
    target, anchor, both = control_target("random")
    assert torch.equal(target[0], target[1])
    assert torch.equal(both[0], both[1])
    assert not torch.allclose(target[0, 0], target[0, 1])
    assert F.cosine_similarity(target, anchor, dim=-1).abs().mean() < 0.5


def test_control_of_unequal_grids_takes_the_same_relative_place():
    model, batch = qwen2_5_vl()
    model.train()
    handle = keepsight.attach(model, keepsight.PReConfig(control="other_image", weight=1.0))
    model(**batch)
    out = model(**batch, output_hidden_states=True)
    mask = batch["input_ids"] == IMAGE
    anchor = out.hidden_states[0][mask].detach().split([4, 6, 4])
    # grids 2 × 2, 2 × 3 and 1 × 4: row and column scaled to the other picture's grid, rounded down
    target = torch.cat([anchor[2][[0, 2, 0, 2]], anchor[0][[0, 0, 1, 2, 2, 3]], anchor[1][[0, 0, 1, 2]]])
    prediction = handle.head(out.hidden_states[2][mask])
    cosine = F.cosine_similarity(prediction, target, dim=-1)
    expected = -torch.stack([part.mean() for part in cosine.split([4, 6, 4])]).mean()
    assert handle.loss.item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_injected_gradient_is_that_of_the_loss(checkpointing):
    model, batch = llava_clip_llama()
    model.train()
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] >= 90, -100)
    twin = copy.deepcopy(model)
    config = keepsight.PReConfig(layer=(2, 3))
    plain = keepsight.attach(twin, config)
    (twin(**batch).loss + plain.loss).backward()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    handle = keepsight.attach(model, config, inject=True)
    model(**batch).loss.backward()
    assert not handle.loss.requires_grad
    assert handle.loss.item() == pytest.approx(plain.loss.item(), abs=1e-7)
    expected = dict(twin.named_parameters())
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert torch.allclose(p.grad, expected[name].grad, atol=1e-7), name
    assert handle.head.up.weight.grad.abs().sum() > 0


def test_an_injected_batch_without_pictures_reaches_the_head_with_zero():
    model, _ = llava_clip_llama()
    model.train()
    handle = keepsight.attach(model, inject=True)
    ids = torch.tensor([[1, 5, 6, 7]])
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    assert all(p.grad is not None and not bool(p.grad.any()) for p in handle.parameters())


def test_peft_wrapped_after_attach_trains_and_saves_the_head(tmp_path):
    peft = pytest.importorskip("peft")
    model, batch = llava_clip_llama()
    handle = keepsight.attach(model)
    wrapped = peft.get_peft_model(model, handle.peft(peft.LoraConfig(target_modules=r".*language_model.*q_proj", r=2)))
    wrapped.train()
    optimizer = torch.optim.AdamW(keepsight.param_groups(wrapped), lr=1e-2)
    before = handle.head.up.weight.detach().clone()
    wrapped(**batch)
    handle.loss.backward()
    handle.assert_alive(optimizer)
    optimizer.step()
    assert not torch.equal(handle.head.up.weight, before)
    wrapped.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "adapter_model.safetensors")
    (head,) = [value for name, value in saved.items() if name.endswith("heads.2.up.weight")]
    assert torch.equal(head, handle.head.up.weight)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layer": ()}, "layer is an empty list"),
        ({"layer": (1, 2), "layer_weights": (1.0,)}, r"layer_weights is \[1.0\] for 2 layers"),
        ({"cascade": True}, "cascade=True needs at least two layers"),
        ({"anchor": "external"}, "anchor 'external' needs a model"),
        ({"anchor_model": "dino"}, "no other anchor takes one"),
        ({"anchor": "dinov2"}, "anchor is 'dinov2'; allowed: 'pre_llm', 'pre_projector'"),
        ({"control": "noise"}, "control is 'noise'; allowed: 'other_image'"),
        ({"granularity": "pixel"}, "granularity is 'pixel'; allowed"),
        ({"distance": "l1"}, "distance is 'l1'; allowed"),
        ({"normalise": "unit"}, "normalise is 'unit'; allowed"),
        ({"distance": "infonce", "granularity": "global"}, "only one vector a picture"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"decay_steps": 0}, "decay_steps is 0"),
        ({"anchor_decay": 1.5}, "anchor_decay is 1.5"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_settings_that_do_not_go_together(config, message):
    with pytest.raises(ValueError, match=message):
        keepsight.PReConfig(**config)


def test_a_layer_named_twice():
    model, _ = llava_clip_llama()
    with pytest.raises(ValueError, match=r"names a layer twice \(indices \[2, 2\]\)"):
        keepsight.attach(model, keepsight.PReConfig(layer=(2, "middle")))
