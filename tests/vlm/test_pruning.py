"""Pruned visual tokens: equal to a forward in which they are really gone."""

import pytest
import torch

from keepsight.vlm import Vlm
from keepsight.vlm.pruning import Pruning, pruned
from tests.tiny import llava

IMAGE = 99


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    found = llava(patch=4).eval()
    with torch.no_grad():
        for parameter in found.model.language_model.parameters():
            parameter.mul_(3)  # attention that differs between tokens
    return found


def batch(model, n: int = 2):
    tokens = Vlm(model).config.text_config
    generator = torch.Generator().manual_seed(1)
    ids = torch.tensor([[0, 1, *[IMAGE] * 16, 5, 6, 7], [1, *[IMAGE] * 16, 8, 5, 9, 4]])[:n]
    mask = (ids != 0).long()
    pixels = torch.rand(n, 3, 16, 16, generator=generator)
    assert tokens.vocab_size > 99
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def without(model, inputs, layer: int, kept: torch.Tensor) -> torch.Tensor:
    """Logits of the last token of one sample, the dropped tokens taken out of the sequence after `layer`."""
    language = model.model.language_model
    seen = inputs["attention_mask"].bool()[0]
    states = {}
    handle = language.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: states.update(x=(args[0] if args else kwargs["hidden_states"]), **kwargs),
        with_kwargs=True,
    )
    model(**inputs)
    handle.remove()
    x, positions = states["x"][:, seen], states["position_ids"][:, seen]
    kept = kept[seen]
    for index, block in enumerate(language.layers):
        if index == layer:
            x, positions = x[:, kept], positions[:, kept]
        n = x.shape[1]
        mask = torch.full((n, n), torch.finfo(x.dtype).min).triu(1)[None, None]
        rotary = language.rotary_emb(x, positions)
        out = block(x, attention_mask=mask, position_ids=positions, position_embeddings=rotary, use_cache=False)
        x = out if isinstance(out, torch.Tensor) else out[0]
    return model.lm_head(language.norm(x))[:, -1]


@pytest.mark.parametrize("by", ["attention", "random", "uniform"])
@pytest.mark.parametrize("layer", [1, 3])
def test_equals_taking_them_out(model, by, layer):
    inputs = batch(model)
    vlm = Vlm(model)
    with torch.no_grad():
        plain = model(**inputs).logits
        with pruned(vlm, Pruning(layer, 0.3, by)) as state:
            logits = model(**inputs).logits
        again = model(**inputs).logits
        for row in range(2):
            one = {name: value[row : row + 1] for name, value in inputs.items()}
            expected = without(model, one, layer, ~state.hidden[row])
            torch.testing.assert_close(logits[row : row + 1, -1], expected, atol=2e-5, rtol=1e-4)
    assert (logits[:, -1] - plain[:, -1]).abs().max() > 1e-3
    assert torch.equal(plain, again), "nothing is left behind"
    assert state.hidden.sum(dim=1).tolist() == [16 - 5] * 2  # 0.3 · 16 = 4.8, rounded up
    assert not (state.hidden & ~state.visual).any()


def test_attention_keeps_what_the_last_token_looks_at(model):
    inputs = batch(model, 1)
    vlm = Vlm(model)
    config = vlm.decoder.config
    before, config._attn_implementation = config._attn_implementation, "eager"
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
        config._attn_implementation = before
        with pruned(vlm, Pruning(2, 0.25)) as state:
            model(**inputs)
    looked_at = attentions[1][0, :, -1].mean(dim=0)
    visual = state.visual[0].nonzero()[:, 0]
    best = visual[looked_at[visual].topk(4).indices]
    assert set(best.tolist()) == set((state.visual & ~state.hidden)[0].nonzero()[:, 0].tolist())


def test_uniform_and_random_by_hand(model):
    inputs = batch(model)
    with torch.no_grad():
        with pruned(Vlm(model), Pruning(0, 0.25, "uniform")) as state:
            model(**inputs)
        kept = (state.visual & ~state.hidden)[1].nonzero()[:, 0] - 1
        assert kept.tolist() == [2, 6, 10, 14]
        drawn = []
        for seed in (0, 0, 1):
            with pruned(Vlm(model), Pruning(0, 0.5, "random", seed)) as state:
                model(**inputs)
            drawn.append(state.hidden[1, 1:17].tolist())
            assert state.hidden[0, 2:18].tolist() == drawn[-1], "the same in every sample, whatever the batch"
    assert drawn[0] == drawn[1] != drawn[2]


def test_all_and_nothing(model):
    inputs = batch(model)
    with torch.no_grad():
        plain = model(**inputs).logits
        with pruned(Vlm(model), Pruning(1, 1.0)) as state:
            whole = model(**inputs).logits
        assert not state.hidden.any()
        torch.testing.assert_close(whole[:, -1], plain[:, -1], atol=2e-5, rtol=1e-4)
        with pruned(Vlm(model), Pruning(0, 0.0, "uniform")) as state:
            blind = model(**inputs).logits
            other = model(**{**inputs, "pixel_values": inputs["pixel_values"].flip(0) * 0.5}).logits
        assert torch.equal(state.hidden, state.visual)
        torch.testing.assert_close(blind[:, -1], other[:, -1], atol=2e-5, rtol=1e-4)


def test_answers_are_written_without_them(model):
    """With the cache: the dropped tokens stay hidden from every token of the answer."""
    inputs = batch(model, 1)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with torch.no_grad(), pruned(Vlm(model), Pruning(0, 0.0, "uniform")):
        cached = model.generate(**inputs, use_cache=True, **settings)
        dark = model.generate(**{**inputs, "pixel_values": -inputs["pixel_values"]}, use_cache=True, **settings)
        assert torch.equal(cached, dark)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"layer": 0, "keep": 0.5}, "layer is 0; allowed: 1 or more with by='attention'"),
        ({"layer": 1, "keep": 1.5}, "keep is 1.5; allowed: a share of the visual tokens, 0 to 1"),
        ({"layer": 1, "keep": 0.5, "by": "norm"}, "by is 'norm'; allowed: 'attention', 'random', 'uniform'"),
    ],
)
def test_settings_that_mean_nothing(settings, said):
    with pytest.raises(ValueError, match=said):
        Pruning(**settings)


def test_layers_that_do_not_exist(model):
    depth = Vlm(model).depth
    with pytest.raises(ValueError, match="does not exist"), pruned(Vlm(model), Pruning(depth + 1, 0.5)):
        pass
    with (
        pytest.raises(ValueError, match="the last one: nothing comes after it"),
        pruned(Vlm(model), Pruning(depth, 0.5)),
    ):
        pass
