from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlavaConfig, LlavaNextConfig

from keepsight.vlm import Vlm
from tests.tiny import FAMILIES, IMAGE, TEXT, TOKENS, VISION, build, llava_clip_llama, smolvlm


@pytest.mark.parametrize("family", FAMILIES)
def test_every_visual_token_finds_its_picture(family):
    model, batch = FAMILIES[family]()
    vlm = Vlm(model)
    assert (vlm.depth, vlm.width) == (4, 32)
    tokens = vlm.image_tokens(batch)
    assert tokens.n_images == 3
    assert tokens.counts().tolist() == TOKENS[family]
    assert tokens.image.tolist() == [i for i, n in enumerate(TOKENS[family]) for _ in range(n)]
    assert torch.equal(batch["input_ids"][tokens.batch_row, tokens.position], torch.full_like(tokens.image, IMAGE))
    assert tokens.batch_row.tolist() == [0] * (TOKENS[family][0] + TOKENS[family][1]) + [1] * TOKENS[family][2]
    for number, grids in enumerate(tokens.grids):
        own = tokens.image == number
        assert sum(rows * columns for rows, columns in grids) == int(own.sum())
        expected = [(t, r, c) for t, (rows, columns) in enumerate(grids) for r in range(rows) for c in range(columns)]
        got = zip(tokens.tile[own].tolist(), tokens.row[own].tolist(), tokens.column[own].tolist(), strict=True)
        assert list(got) == expected


def test_tiles_of_one_picture_end_in_their_thumbnail():
    model, batch = smolvlm()
    tokens = Vlm(model).image_tokens(batch)
    assert tokens.grids == (((2, 2),) * 3, ((2, 2),), ((2, 2),))
    assert tokens.thumbnail.tolist() == [False] * 8 + [True] * 4 + [False] * 8


def test_layers_by_name_and_number():
    vlm = Vlm(llava_clip_llama()[0])
    assert [vlm.resolve_layer(x) for x in (0, 3, "3", "middle", "last")] == [0, 3, 3, 2, 4]
    for bad in (5, -1, "end", True, 1.5):
        with pytest.raises(
            ValueError, match=r"does not exist in this 'llava' model: allowed are 0 to 4 .*'middle' \(= 2\)"
        ):
            vlm.resolve_layer(bad)


def test_a_text_model_has_no_image_tokens():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**TEXT))
    with pytest.raises(ValueError, match="'llama' has no image tokens"):
        Vlm(model)


@pytest.mark.parametrize(
    ("family", "message"),
    [("mllama", "'mllama' is not supported: .*cross-attention"), ("florence2", "'florence2' is not supported: .*BART")],
)
def test_families_out_of_scope_say_why(family, message):
    model = torch.nn.Module()
    model.config = SimpleNamespace(model_type=family)
    with pytest.raises(ValueError, match=message):
        Vlm(model)


def test_newline_tiles_are_an_error_that_names_what_is_missing():
    config = LlavaNextConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config={**VISION, "model_type": "clip_vision_model"},
        image_token_index=IMAGE,
    )
    vlm = Vlm(build(config, 0))
    ids = torch.tensor([[1, IMAGE, IMAGE, 2]])
    with pytest.raises(ValueError, match="'llava_next': its tiles are separated by learned newline tokens"):
        vlm.image_tokens({"input_ids": ids, "pixel_values": torch.zeros(1, 2, 3, 16, 16)})


def test_grids_that_are_not_square_are_an_error():
    vlm = Vlm(llava_clip_llama()[0])
    ids = torch.tensor([[1, IMAGE, IMAGE, 2]])
    with pytest.raises(ValueError, match="makes 2 tokens a picture, which is no square grid"):
        vlm.image_tokens({"input_ids": ids, "pixel_values": torch.zeros(1, 3, 16, 16)})


def test_pictures_without_pixels_are_an_error():
    vlm = Vlm(llava_clip_llama()[0])
    ids = torch.tensor([[1, IMAGE, IMAGE, 2]])
    with pytest.raises(ValueError, match="2 image tokens but no 'pixel_values' tensor"):
        vlm.image_tokens({"input_ids": ids})


def test_cut_off_pictures_are_an_error():
    model, batch = llava_clip_llama()
    with pytest.raises(ValueError, match="do not divide among 3 pictures"):
        Vlm(model).image_tokens({**batch, "input_ids": batch["input_ids"][:, :20]})
    # Two whole pictures' worth of tokens for two pictures, but split 24 + 8 over the rows.
    ids = torch.full((2, 24), IMAGE)
    ids[1, 8:] = 5
    with pytest.raises(ValueError, match="a run of 24 image tokens in row 0 is no multiple of the 16"):
        Vlm(model).image_tokens({"input_ids": ids, "pixel_values": torch.zeros(2, 3, 16, 16)})


def test_qwen_grids_must_fit_the_text():
    model, batch = FAMILIES["qwen2.5-vl"]()
    with pytest.raises(ValueError, match=r"10 image tokens in the text, but .* make 14"):
        Vlm(model).image_tokens({**batch, "input_ids": batch["input_ids"][:1]})


def test_lm_head_and_final_norm_give_the_logits():
    model, batch = llava_clip_llama()
    vlm = Vlm(model)
    with torch.no_grad():
        out = model(**batch, output_hidden_states=True)
        assert torch.equal(vlm.lm_head(out.hidden_states[-1]), out.logits)
    with pytest.raises(ValueError, match="LlavaModel has no LM head"):
        _ = Vlm(model.model).lm_head


def test_the_bare_core_can_be_viewed():
    model, _ = llava_clip_llama()
    assert Vlm(model.model).core is model.model
    assert isinstance(model.config, LlavaConfig)
