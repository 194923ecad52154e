"""The converted parts compute what their sources compute, and make a working LLaVA."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from keepsight.vlm.assemble import assemble
from tests.real.fetch import fetch

pytestmark = pytest.mark.real


def waves(side: int) -> torch.Tensor:
    """[1, 3, side, side]: a smooth input that anybody can make again."""
    y, x = torch.meshgrid(torch.arange(float(side)), torch.arange(float(side)), indexing="ij")
    return torch.stack([torch.sin(x / 20), torch.cos(y / 30), torch.sin((x + y) / 25)])[None]


@torch.no_grad()
def test_the_vision_model_gives_the_values_of_its_onnx_graph():
    # Expected: onnxruntime 1.32.0 on the fetched graph, input waves(224), the outputs of /backbone/layernorm/Add_1 and
    # /backbone/encoder/layer.8/Add_1. The largest difference over all values was 1.9e-5 and 3.6e-6.
    out = AutoModel.from_pretrained(fetch().vision).eval()(waves(224), output_hidden_states=True)
    last, ninth = out.last_hidden_state[0], out.hidden_states[9][0]
    expected = {
        (0, "last"): [-3.305289, 0.27768484, 1.1659559, -2.7058764],
        (1, "last"): [-3.0372303, -0.7791826, -0.9932452, -2.5927515],
        (256, "last"): [-3.03157, 1.2088504, -0.2665528, -2.4770231],
        (0, "ninth"): [-0.1792535, 0.10392939, -0.0141142, 0.16716158],
        (100, "ninth"): [-0.13430163, 0.48361707, -0.12463639, -0.19963412],
    }
    for (token, layer), values in expected.items():
        found = (last if layer == "last" else ninth)[token, :4]
        torch.testing.assert_close(found, torch.tensor(values), atol=2e-4, rtol=1e-4)
    assert last.std().item() == pytest.approx(2.1324384, abs=1e-3)


@torch.no_grad()
def test_the_language_model_answers_and_predicts_english():
    folder = fetch().language
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (30, 576)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    text = "The sun rises in the east and sets in the west, and in the evening the birds return to their nests."
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert model(input_ids=ids, labels=ids).loss.item() < 3.5  # a wrong weight layout gives 8 and more
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    assert model(input_ids=shuffled, labels=shuffled).loss.item() > 5


@torch.no_grad()
def test_the_assembled_model_keeps_its_parts_and_starts_at_the_text_norm():
    parts = fetch()
    model, processor = assemble(parts.vision, parts.language, vision_feature_layer=-3, image_size=112)
    for source, inside in (
        (AutoModel.from_pretrained(parts.vision), model.model.vision_tower),
        (AutoModelForCausalLM.from_pretrained(parts.language).model, model.model.language_model),
    ):
        for name, value in source.state_dict().items():
            assert torch.equal(inside.state_dict()[name][: len(value)], value), name
    photographs = [Image.open(path).convert("RGB") for path in sorted(parts.photographs.iterdir())]
    pixels = processor.image_processor(photographs, return_tensors="pt")["pixel_values"]
    visual = torch.stack(list(model.get_image_features(pixels).pooler_output))
    text = model.get_input_embeddings().weight.norm(dim=1).mean()
    assert visual.shape == (len(photographs), 64, 576)
    assert (visual.norm(dim=-1).mean() / text).item() == pytest.approx(1.0, abs=0.3)
    asked = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}],
        add_generation_prompt=True,
    )
    assert asked.endswith("<|im_start|>user\n<image>\nWhat is this?<|im_end|>\n<|im_start|>assistant\n")
    batch = processor(images=photographs[:1], text=asked, return_tensors="pt")
    assert torch.isfinite(model(**batch).logits).all()
