"""assemble(): parts go in bit for bit, plain transformers loads the result, errors say what to do."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from keepsight.vlm.assemble import assemble
from keepsight.vlm.chat import image_chat_template
from keepsight.vlm.projector import noise_pictures

SIDE, PATCH = 28, 7
PATCHES = (SIDE // PATCH) ** 2
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": SIDE,
    "patch_size": PATCH,
}
LM = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WORDS = ["<unk>", "<s>", "</s>", "USER", "ASSISTANT", ":", "a", "red", "circle", "what", "is", "it", "?", ">", "<"]


def words_tokenizer(*, pad: bool = False, template: str | None = None) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over WORDS."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    if pad:
        tokenizer.pad_token = "</s>"
    tokenizer.chat_template = template
    return tokenizer


def square(cls, **more):
    return cls(
        size={"height": SIDE, "width": SIDE} if cls is SiglipImageProcessorPil else {"shortest_edge": SIDE},
        **({} if cls is SiglipImageProcessorPil else {"crop_size": {"height": SIDE, "width": SIDE}}),
        **more,
    )


def parts(family: str):
    torch.manual_seed(3)
    if family == "clip+llama":
        vision, processor = CLIPVisionModel(CLIPVisionConfig(**VIT)), square(CLIPImageProcessorPil)
        language = LlamaForCausalLM(LlamaConfig(**LM, vocab_size=len(WORDS)))
    elif family == "siglip+qwen2":
        vision, processor = SiglipVisionModel(SiglipVisionConfig(**VIT)), square(SiglipImageProcessorPil)
        language = Qwen2ForCausalLM(Qwen2Config(**LM, vocab_size=64, tie_word_embeddings=True))
    elif family == "dinov2+llama":
        vision, processor = Dinov2Model(Dinov2Config(**VIT, mlp_ratio=2)), square(BitImageProcessorPil)
        language = LlamaForCausalLM(LlamaConfig(**LM, vocab_size=len(WORDS), tie_word_embeddings=True))
    else:
        raise KeyError(family)
    return vision.eval(), processor, language.eval()


FAMILIES = ["clip+llama", "siglip+qwen2", "dinov2+llama"]


def build(family: str, **options):
    vision, image_processor, language = parts(family)
    tokenizer = options.pop("tokenizer", None) or words_tokenizer()
    return assemble(vision, language, tokenizer=tokenizer, image_processor=image_processor, **options)


def ask(processor, text="what is it ?", pictures=None):
    pictures = pictures or noise_pictures(1, SIDE, torch.Generator().manual_seed(9))
    parts_ = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": text}]
    prompt = processor.apply_chat_template([{"role": "user", "content": parts_}], add_generation_prompt=True)
    return processor(images=pictures, text=prompt, return_tensors="pt")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_weights_go_in_bit_for_bit(family):
    vision, _, language = parts(family)
    model, _ = build(family)
    inside = model.model.vision_tower.state_dict()
    assert inside.keys() == vision.state_dict().keys()
    assert all(torch.equal(inside[key], value) for key, value in vision.state_dict().items())
    old, decoder = language.model.state_dict(), model.model.language_model.state_dict()
    assert decoder.keys() == old.keys()
    rows = old["embed_tokens.weight"].shape[0]
    for key, value in old.items():
        assert torch.equal(decoder[key][:rows] if key == "embed_tokens.weight" else decoder[key], value), key
    assert torch.equal(model.lm_head.weight[:rows], language.lm_head.weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_loads_it_back_with_nothing_missing(family, tmp_path):
    model, processor = build(family)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    theirs = loaded.state_dict()
    assert theirs.keys() == model.state_dict().keys()
    assert all(torch.equal(theirs[key], value) for key, value in model.state_dict().items())

    reloaded = AutoProcessor.from_pretrained(tmp_path)
    batch, again = ask(processor), ask(reloaded)
    assert torch.equal(batch["input_ids"], again["input_ids"])
    assert torch.equal(batch["pixel_values"], again["pixel_values"])
    assert (batch["input_ids"] == model.config.image_token_id).sum() == PATCHES == model.config.image_seq_length
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, loaded.eval()(**again).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_visual_tokens_start_at_the_text_embeddings_norm(family):
    vision, image_processor, language = parts(family)
    # An encoder of another scale must not matter: without the calibration the ratio follows this factor.
    for parameter in list(vision.parameters())[-12:]:
        parameter.data *= 3
    model, processor = assemble(
        vision, language, tokenizer=words_tokenizer(), image_processor=image_processor, vision_feature_layer=-1
    )
    text = language.get_input_embeddings().weight.norm(dim=1).mean()
    pictures = noise_pictures(6, 64, torch.Generator().manual_seed(77))  # others than those of the calibration
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        visual = torch.cat(list(model.get_image_features(pixels).pooler_output)).norm(dim=-1).mean()
    assert (visual / text).item() == pytest.approx(1.0, abs=0.15)


def test_the_seed_decides_the_projector_and_the_global_generator_is_untouched():
    def projector(seed):
        model, _ = build("dinov2+llama", seed=seed)
        return model.model.multi_modal_projector.linear_2.weight

    torch.manual_seed(5)
    before = torch.get_rng_state()
    vision, image_processor, language = parts("dinov2+llama")
    torch.set_rng_state(before)
    assemble(vision, language, tokenizer=words_tokenizer(), image_processor=image_processor)
    assert torch.equal(torch.get_rng_state(), before)
    first = projector(1)
    torch.rand(3)  # another global state
    assert torch.equal(first, projector(1))
    assert not torch.equal(first, projector(2))


def test_given_models_and_tokenizer_are_left_as_they_were():
    vision, image_processor, language = parts("clip+llama")
    before = {key: value.clone() for key, value in language.state_dict().items()}
    tokenizer = words_tokenizer()
    model, _ = assemble(vision, language, tokenizer=tokenizer, image_processor=image_processor)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert language.state_dict().keys() == before.keys()
    assert all(torch.equal(language.state_dict()[key], value) for key, value in before.items())
    assert len(tokenizer) == len(WORDS)
    assert language.config.vocab_size == len(WORDS)
    assert vision.embeddings.patch_embedding.weight.abs().sum() > 0


def test_added_tokens_and_tied_weights():
    model, processor = build("dinov2+llama")  # 15 words, tied: <image> and <pad> make 17 rows
    image, pad = processor.tokenizer.convert_tokens_to_ids(["<image>", "<pad>"])
    assert (image, pad) == (15, 16)
    assert model.config.image_token_id == image
    assert model.config.text_config.pad_token_id == model.generation_config.pad_token_id == pad
    assert model.config.text_config.vocab_size == model.lm_head.weight.shape[0] == 17
    table = model.get_input_embeddings().weight
    assert table is model.lm_head.weight
    torch.testing.assert_close(table[15], table[:15].mean(dim=0))

    model, _ = build("clip+llama")  # untied stays untied
    assert model.get_input_embeddings().weight is not model.lm_head.weight

    model, processor = build("siglip+qwen2", tokenizer=words_tokenizer(pad=True))  # 64 rows: room for one more token
    assert model.get_input_embeddings().weight.shape[0] == 64
    assert processor.tokenizer.pad_token == "</s>"


def test_strategy_follows_the_cls_token_and_a_contradiction_is_refused():
    assert build("clip+llama")[0].config.vision_feature_select_strategy == "default"
    assert build("dinov2+llama")[0].config.vision_feature_select_strategy == "default"
    assert build("siglip+qwen2")[0].config.vision_feature_select_strategy == "full"
    model, processor = build("clip+llama", vision_feature_select_strategy="full")
    assert (ask(processor)["input_ids"] == model.config.image_token_id).sum() == PATCHES + 1
    model(**ask(processor))
    with pytest.raises(ValueError, match=r"'default' drops the first token, but encoder 'siglip_vision_model' has no"):
        build("siglip+qwen2", vision_feature_select_strategy="default")
    with pytest.raises(ValueError, match=r"strategy 'cls': allowed are 'default', 'full' or None"):
        build("clip+llama", vision_feature_select_strategy="cls")


def test_only_the_vision_tower_of_a_two_tower_checkpoint_is_loaded(tmp_path):
    torch.manual_seed(0)
    text = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 99,
    }
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=VIT))
    clip.save_pretrained(tmp_path / "clip")
    square(CLIPImageProcessorPil).save_pretrained(tmp_path / "clip")
    _, _, language = parts("clip+llama")
    language.save_pretrained(tmp_path / "llama")
    words_tokenizer().save_pretrained(tmp_path / "llama")
    model, processor = assemble(tmp_path / "clip", tmp_path / "llama")
    tower = model.model.vision_tower
    assert isinstance(tower, CLIPVisionModel)
    expected = clip.vision_model.state_dict()
    assert tower.state_dict().keys() == expected.keys()
    assert all(torch.equal(tower.state_dict()[key], value) for key, value in expected.items())
    assert not any("text_model" in name for name, _ in model.named_parameters())
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    assert torch.equal(model.lm_head.weight[: len(WORDS)], reference.lm_head.weight)
    assert model(**ask(processor)).logits.shape[-1] == len(WORDS) + 2


def test_image_size_for_an_encoder_that_interpolates_and_one_that_does_not():
    model, processor = build("dinov2+llama", image_size=42)
    assert (ask(processor)["input_ids"] == model.config.image_token_id).sum() == 36 == model.config.image_seq_length
    model(**ask(processor))
    with pytest.raises(ValueError, match=r"refuses pictures of 42×42 pixels .* own size is 28; leave image_size"):
        build("clip+llama", image_size=42)


def test_a_resize_larger_than_the_crop_keeps_its_ratio():
    vision, _, language = parts("dinov2+llama")
    processor = BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": SIDE, "width": SIDE})
    _, assembled = assemble(vision, language, tokenizer=words_tokenizer(), image_processor=processor, image_size=56)
    assert dict(assembled.image_processor.size)["shortest_edge"] == 64
    assert assembled.image_processor(Image.new("RGB", (90, 70)), return_tensors="pt")["pixel_values"].shape[-2:] == (
        56,
        56,
    )


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def conversation(first):
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": first},
        {"role": "assistant", "content": [{"type": "text", "text": "a red circle"}]},
        {"role": "user", "content": "what is it ?"},
    ]


def test_chat_template_puts_pictures_first_and_keeps_the_models_own():
    _, processor = build("clip+llama", tokenizer=words_tokenizer(template=CHATML))
    parts_ = [{"type": "text", "text": "what is it ?"}, {"type": "image"}, {"type": "image"}]
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\n<image>\nwhat is it ?<|im_end|>\n"
        "<|im_start|>assistant\na red circle<|im_end|>\n<|im_start|>user\nwhat is it ?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert processor.apply_chat_template(conversation(parts_), add_generation_prompt=True) == expected
    text = "<image>\n<image>\nwhat is it ?"  # a string with its own placeholders passes unchanged
    assert processor.apply_chat_template(conversation(text), add_generation_prompt=True) == expected
    with pytest.raises(Exception, match='type video; this model takes "image" and "text"'):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])


def test_fallback_template_marks_the_answers():
    _, processor = build("clip+llama")
    assert processor.chat_template == image_chat_template(None)
    messages = conversation([{"type": "image"}, {"type": "text", "text": "what is it ?"}])
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == (
        "Be brief.\nUSER: <image>\nwhat is it ?\nASSISTANT: a red circle</s>\nUSER: what is it ?\nASSISTANT: "
    )
    tokens = processor.tokenizer.apply_chat_template(
        messages,
        chat_template=processor.chat_template,
        return_assistant_tokens_mask=True,
        return_dict=True,
        tokenize=True,
    )
    answer = [i for i, on in zip(tokens["input_ids"], tokens["assistant_masks"], strict=True) if on]
    assert processor.tokenizer.decode(answer) == "a red circle </s>"


def test_refusals_name_the_part_and_the_next_step(tmp_path):
    vision, image_processor, language = parts("clip+llama")
    tokenizer = words_tokenizer()
    given = {"tokenizer": tokenizer, "image_processor": image_processor}
    with pytest.raises(ValueError, match=r"loaded CLIPVisionModel without image_processor: pass image_processor"):
        assemble(vision, language, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"loaded LlamaForCausalLM without tokenizer: pass tokenizer"):
        assemble(vision, language, image_processor=image_processor)
    with pytest.raises(ValueError, match=r"vision_feature_layer 4 does not exist: .* 3 layers, so -4 to 3"):
        assemble(vision, language, vision_feature_layer=4, **given)
    registers = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**VIT, num_register_tokens=4, mlp_ratio=2))
    with pytest.raises(ValueError, match=r"gives 21 tokens for 16 patches; .* \(no registers\)"):
        assemble(registers, language, tokenizer=tokenizer, image_processor=square(BitImageProcessorPil))
    granite = GraniteForCausalLM(GraniteConfig(**LM, vocab_size=len(WORDS), logits_scaling=8.0))
    with pytest.raises(ValueError, match=r"'granite' gives other logits inside LLaVA .* Llama-, Qwen2-"):
        assemble(vision, granite, **given)
    phi = PhiForCausalLM(PhiConfig(**LM, vocab_size=len(WORDS)))
    with pytest.raises(ValueError, match=r"'phi' has a bias in its output layer"):
        assemble(vision, phi, **given)


def test_a_checkpoint_with_a_weight_missing_is_refused(tmp_path):
    vision, image_processor, language = parts("clip+llama")
    state = vision.state_dict()
    state.pop("encoder.layers.1.mlp.fc1.weight")
    vision.save_pretrained(tmp_path, state_dict=state)
    image_processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks 1 weights of CLIPVisionModel \(first: .*layers.1.mlp.fc1.weight\)"):
        assemble(tmp_path, language, tokenizer=words_tokenizer())


def test_pickled_weights_are_refused(tmp_path):
    vision, image_processor, language = parts("clip+llama")
    vision.config.save_pretrained(tmp_path)
    torch.save(vision.state_dict(), tmp_path / "pytorch_model.bin")
    image_processor.save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        assemble(tmp_path, language, tokenizer=words_tokenizer())


def test_half_precision_keeps_the_rotary_frequencies():
    model, processor = build("clip+llama", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    batch = ask(processor)
    batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    assert torch.isfinite(model(**batch).logits).all()
