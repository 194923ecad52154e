"""The random-weight language model: everything below it is shared, everything in it is fresh."""

import pytest
import torch

from keepsight.diagnosis import diagnose
from keepsight.diagnosis.nulls import random_weights
from keepsight.report.metrics import control_of
from keepsight.vlm import Vlm
from keepsight.vlm.features import before_decoder
from tests.diagnosis.world import LAYERS, tiny_llava, write_world
from tests.tiny import FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
def test_only_the_language_model_is_fresh(name):
    model, batch = FAMILIES[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)  # as if trained: norms and biases too
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    vlm, state = Vlm(model), torch.get_rng_state()
    twin = random_weights(vlm, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    below = {name for name, _ in before_decoder(vlm)}
    for name, parameter in twin.base_model.named_parameters():
        original = model.base_model.get_parameter(name)
        assert (parameter is original) == (name in below), name
        assert torch.equal(parameter, original) == (name in below), name
    norm = next(p for n, p in Vlm(twin).decoder.named_parameters() if n.endswith("input_layernorm.weight"))
    assert norm.unique().numel() == 1
    again = random_weights(vlm, 3)
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), again.parameters(), strict=True))
    with torch.no_grad():
        assert not torch.equal(twin(**batch).logits, model(**batch).logits)


def test_tied_embeddings_stay_tied():
    model, _ = FAMILIES["gemma3"]()
    twin = random_weights(Vlm(model), 0)
    assert (twin.lm_head.weight is twin.get_input_embeddings().weight) == (
        model.lm_head.weight is model.get_input_embeddings().weight
    )


def test_a_weight_that_would_stay_trained_is_named(monkeypatch):
    model, _ = FAMILIES["llava-clip-llama"]()
    monkeypatch.setattr(type(model), "_init_weights", lambda self, module: None)
    with pytest.raises(ValueError, match=r"'llava' does not say how its weight 'embed_tokens.weight' starts; leave"):
        random_weights(Vlm(model), 0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("nulls"), per_class=4)


@pytest.mark.slow
def test_rows_beside_the_models_own(world, tmp_path):
    model, processor = tiny_llava()
    with torch.no_grad():  # a language model that adds nothing: every layer is its input
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    result = diagnose(model, processor, world[0], masks=world[1], nulls=["random_weights"], progress=False)
    rows = {(r.metric, r.variant, r.layer): r for r in result.rows if r.tokens == "all"}
    for layer in range(LAYERS + 1):
        own = rows["fidelity", "", layer].value
        null = rows["fidelity", "random weights", layer].value
        assert own == pytest.approx(rows["fidelity", "", 0].value, abs=1e-6)
        assert null == pytest.approx(own, abs=1e-6) if layer == 0 else null != pytest.approx(own, abs=1e-6)
        assert rows["gap", "centred, random weights", layer].n == 12
    variants = {r.variant for r in result.rows if control_of(r.variant) is not None and "random" in r.variant}
    assert variants == {
        "random weights",
        *(f"{name}, random weights" for name in ("raw", "centred", "covariance", "correlation")),
    }
    assert "random weights" in result.report(tmp_path / "report.html").read_text()
    with pytest.raises(ValueError, match="nulls holds 'noise'; allowed: random_weights"):
        diagnose(model, processor, world[0], nulls=["noise"], progress=False)


def test_what_a_control_belongs_to():
    assert control_of("random weights") == ""
    assert control_of("centred, random weights") == "centred"
    assert control_of("position only") == ""
    assert control_of("centred") is None
