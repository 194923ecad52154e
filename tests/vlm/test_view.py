from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlavaConfig

from keepsight.vlm import Vlm
from keepsight.vlm.features import on_token_grid
from keepsight.vlm.geometry import token_pixels
from keepsight.vlm.grids import image_tokens
from tests.families import aya_vision, idefics2, llama4, llava_next, llava_onevision, ovis2
from tests.tiny import FAMILIES, IMAGE, TEXT, TOKENS, llava_clip_llama, sequences, smolvlm


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


def test_newline_tiles_need_the_pictures_sizes():
    model, batch = llava_next()
    batch.pop("image_sizes")
    with pytest.raises(ValueError, match="'llava_next': the batch holds image tokens but no 'image_sizes'"):
        Vlm(model).image_tokens(batch)


def test_newline_tiles_cut_off_are_an_error():
    model, batch = llava_next()
    with pytest.raises(ValueError, match=r"128 image tokens in the text, but .* make 162: .* cut by a max_length"):
        Vlm(model).image_tokens({**batch, "input_ids": batch["input_ids"][:, :90]})


def test_several_pictures_in_one_sample_of_llava_onevision_are_not_tiled():
    model, batch = llava_onevision()
    one = [IMAGE] * 17  # the whole, and a newline
    batch |= sequences([1, *one, 5, *one, 6], [1, *[IMAGE] * 40, 9])
    batch["batch_num_images"] = torch.tensor([2, 1])
    vlm = Vlm(model)
    with torch.no_grad():
        model(**batch)  # the model counts as we do
    tokens = vlm.image_tokens(batch)
    assert tokens.grids == (((4, 4),), ((4, 4),), ((4, 4), (8, 2)))
    assert tokens.counts().tolist() == [16, 16, 32]
    assert tokens.position[:32].tolist() == [*range(1, 17), *range(19, 35)]
    assert tokens.thumbnail.tolist() == [False] * 32 + [True] * 16 + [False] * 16


def test_a_resamplers_queries_have_no_grid():
    model, batch = idefics2()
    vlm = Vlm(model)
    tokens = vlm.image_tokens(batch)
    assert tokens.grids == (((1, 4),),) * 3
    assert tokens.column.tolist() == [0, 1, 2, 3] * 3
    with pytest.raises(ValueError, match="'idefics2': its visual tokens come out of a resampler"):
        token_pixels(vlm, batch)
    with pytest.raises(ValueError, match="'idefics2': its projector holds a resampler"):
        on_token_grid(vlm, torch.zeros(3, 16, 32), tokens, batch)
    ids = batch["input_ids"].clone()
    ids[:, 2] = 5
    with pytest.raises(ValueError, match=r"pictures of \[3, 4\] image tokens, but the resampler"):
        vlm.image_tokens({**batch, "input_ids": ids})


@pytest.mark.parametrize("family", [aya_vision, llama4, ovis2])
def test_tiles_cut_off_are_an_error(family):
    model, batch = family()
    with pytest.raises(ValueError, match=r"tiles in pixel_values, but \d runs of image tokens .* cut by a max_length"):
        Vlm(model).image_tokens({name: value[:1] if name == "input_ids" else value for name, value in batch.items()})


def test_tiles_that_would_pass_for_pictures_are_an_error():
    config = SimpleNamespace(model_type="cohere2_vision")
    batch = {"input_ids": torch.full((1, 32), IMAGE), "pixel_values": torch.zeros(2, 3, 16, 16)}
    with pytest.raises(ValueError, match="'cohere2_vision': which tiles make a picture is missing"):
        image_tokens(config, batch["input_ids"] == IMAGE, batch)


def test_the_whole_of_tiles_comes_last_or_first():
    model, batch = aya_vision()
    assert Vlm(model).image_tokens(batch).thumbnail.tolist() == [False] * 8 + [True] * 4 + [False] * 8
    model, batch = ovis2()
    assert Vlm(model).image_tokens(batch).thumbnail.tolist() == [True] * 4 + [False] * 16 + [False] * 8


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
