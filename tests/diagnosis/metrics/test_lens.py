"""The lens against the models' own logits and planted answers."""

import numpy as np
import pytest
import torch
from PIL import Image

from keepsight.diagnosis import diagnose
from keepsight.diagnosis.metrics.lens import NoLensError, readout, silencing, top_and_entropy
from keepsight.vlm import Vlm, capture
from tests.diagnosis.world import LAYERS, states_alone, tiny_llava, write_world
from tests.families import FAMILIES as ALL_FAMILIES
from tests.tiny import FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_at_the_last_layer_the_lens_is_the_models_prediction(name):
    model, batch = FAMILIES[name]()
    vlm = Vlm(model)
    read = readout(vlm, batch)
    with capture(vlm, ["last"]) as taken:
        logits = model(**batch).logits
    expected = logits[vlm.visual_mask(batch["input_ids"])]
    torch.testing.assert_close(read(taken.states[vlm.depth]), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("field", ["final_logit_softcapping", "logit_scale"])
def test_capped_and_scaled_logits_are_found_out(field):
    """PaliGemma caps its logits when its configuration says so; a scale that no model applies is not applied."""
    model, batch = ALL_FAMILIES["PaliGemma"].make()
    model.lm_head.weight.mul_(30)
    vlm = Vlm(model)
    setattr(vlm.decoder.config, field, 2.0)
    setattr(model.config.get_text_config(), field, 2.0)
    read = readout(vlm, batch)
    with capture(vlm, ["last"]) as taken:
        expected = model(**batch).logits[vlm.visual_mask(batch["input_ids"])]
    assert (float(expected.abs().max()) < 2.0) == (field == "final_logit_softcapping")
    torch.testing.assert_close(read(taken.states[vlm.depth]), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_unknown_logits_and_missing_heads_are_named():
    model, batch = FAMILIES["llava-clip-llama"]()
    with pytest.raises(NoLensError, match="has no LM head"):
        readout(Vlm(model.model), batch)
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * torch.linspace(1, 2, args[0].shape[-1]),))
    inner = model.lm_head
    hooked = inner._forward_pre_hooks.copy()
    model.forward = _with(model.forward, inner, hooked)
    inner._forward_pre_hooks.clear()
    with pytest.raises(NoLensError, match="'llava': its logits are not those of its LM head after the final norm"):
        readout(Vlm(model), batch)


def _with(forward, module, hooks):
    """`forward` with these hooks on the module, which has none outside it."""

    def call(**inputs):
        module._forward_pre_hooks.update(hooks)
        try:
            return forward(**inputs)
        finally:
            module._forward_pre_hooks.clear()

    return call


def test_entropy_and_top_token():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [100.0, 0.0, 0.0, 0.0], [0.0, 9.0, 9.0, 0.0]])
    top, entropy, size = top_and_entropy(torch.arange(3)[:, None], lambda rows: logits[rows[:, 0]])
    assert size == 4
    assert top[1] == 0
    assert entropy.tolist() == pytest.approx([1.0, 0.0, 0.5], abs=1e-2)


def test_silencing_lists_on_one_half_and_scores_on_the_other():
    """Image 0 and 1 list; 2 and 3 score. Token 7 is the most frequent, then 5 and 9 tie: the lower id is taken."""
    image = np.array([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3])
    top = np.array([7, 7, 5, 9, 7, 5, 9, 1, 7, 9, 9, 5, 9, 9])
    share, scored, listed = silencing(top, image, np.array([True, True, False, False]), 2)
    assert listed == [7, 5]
    assert (share.value, scored) == (2 / 6, 2)
    # linearised ratio: images hold 2 of 4 and 0 of 2
    residual = np.array([2 - 4 / 3, 0 - 2 / 3]) / 3
    half = 12.706204736 * residual.std(ddof=1) / np.sqrt(2)
    assert share.high - share.value == pytest.approx(half, rel=1e-6)
    nothing, _, _ = silencing(top[:8], image[:8], np.array([True, True]), 2)
    assert nothing.value is None
    assert "too few images" in nothing.note


def test_memorised_tokens_do_not_silence():
    """Each image says one word of its own: the list of one half tells nothing of the other."""
    image = np.repeat(np.arange(40), 8)
    share, _, _ = silencing(image + 100, image, np.arange(40) % 2 == 0, 20)
    assert share.value == 0.0


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("lens"), per_class=4)[0]


def test_a_head_that_always_says_the_same_is_silent(world):
    """One word's row of the head is the final norm's bias direction: at the last layers every token says it."""
    model, processor = tiny_llava()
    with torch.no_grad():
        model.model.language_model.layers[2].register_forward_hook(
            lambda module, args, output: output + 50.0 * torch.nn.functional.one_hot(torch.tensor(3), output.shape[-1])
        )
        model.lm_head.weight[42] = 0.0
        model.lm_head.weight[42, 3] = 2.0
    result = diagnose(model, processor, world, metrics=["lens"], progress=False)
    wanted = ("silencing", "lens_entropy")
    rows = {(r.metric, r.layer): r for r in result.rows if r.tokens == "all" and r.metric in wanted}
    assert {layer for _, layer in rows} == set(range(LAYERS + 1))
    assert [rows["silencing", layer].value for layer in (3, 4)] == [1.0, 1.0]
    assert rows["silencing", 0].value < 0.9
    assert rows["lens_entropy", 3].value < 0.01
    assert rows["lens_entropy", 0].value > 0.8
    word = processor.tokenizer.decode([42])
    assert rows["silencing", 3].note == f"256 tokens; 1 of 100 listed, most frequent: {word!r} 100 %"
    assert rows["silencing", 3].n == 6


def test_exact_looks_at_every_token(world):
    """Twelve pictures of 64 patches: three times what the default looks at; in blocks as at once."""
    model, processor = tiny_llava()
    options = {"metrics": ["lens"], "layers": [2], "progress": False}
    rows = {row.metric: row for row in diagnose(model, processor, world, exact=True, **options).rows}
    assert rows["silencing"].note.startswith("768 tokens; ")
    norm, head = model.model.language_model.norm, model.lm_head
    means = []
    with torch.no_grad():
        for path in sorted(world.rglob("*.png")):
            logits = head(norm(states_alone(model, processor, Image.open(path).convert("RGB"))[2]))
            means.append(torch.distributions.Categorical(logits=logits).entropy().mean() / np.log(logits.shape[1]))
    assert rows["lens_entropy"].value == pytest.approx(float(torch.stack(means).mean()), abs=1e-5)
    assert rows["lens_entropy"].n == 12
    default = diagnose(model, processor, world, **options).rows
    assert next(row.note for row in default if row.metric == "lens_entropy") == "256 tokens"


@torch.no_grad()
def test_maps_keep_what_each_patch_would_say(world):
    """At every layer of every shown picture, against the head on the model's own hidden states."""
    model, processor = tiny_llava()
    result = diagnose(model, processor, world, metrics=["lens", "maps"], progress=False)
    norm, head = model.model.language_model.norm, model.lm_head
    for example in result.examples[:2]:
        found = example.map
        states = states_alone(model, processor, Image.open(world / example.name).convert("RGB"))
        for layer in range(LAYERS + 1):
            top = head(norm(states[layer])).argmax(dim=1).tolist()
            assert [found.word(layer, i) for i in range(len(top))] == [processor.tokenizer.decode([t]) for t in top]
        assert len(set(found.words.tolist())) > 1
    without = diagnose(model, processor, world, metrics=["maps"], progress=False)
    assert without.examples[0].map.word(0, 0) is None
