"""An external encoder as the anchor: its own pixels, its features where the visual tokens look."""

import copy

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    AutoModel,
    BitImageProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)
from transformers.integrations import deepspeed

import keepsight
from keepsight.pre import DeadLossError
from keepsight.pre.external import PIXELS, POINTS, ExternalEncoder
from keepsight.vlm.chat import render_prompt
from keepsight.vlm.geometry import token_centres
from tests.tiny import IMAGE, llava_clip_llama, smolvlm
from tests.tiny_processors import make_llava, make_smolvlm

MEAN, DEVIATION = [0.2, 0.4, 0.6], [0.5, 0.25, 0.125]  # nobody else's
SIDE, PATCH, WIDTH = 12, 3, 24


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """A tiny DINOv2 with its processor, saved; trained at 12 pixels in patches of 3."""
    torch.manual_seed(5)
    config = Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=PATCH, mlp_ratio=2
    )
    folder = tmp_path_factory.mktemp("dino")
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessor(
        size={"shortest_edge": 14}, crop_size={"height": SIDE, "width": SIDE}, image_mean=MEAN, image_std=DEVIATION
    ).save_pretrained(folder)
    return folder


SHAPE = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
TEXT_HALF = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
# Kind → how a tiny one is made, tokens before the patches, and where in what AutoModel loads the encoder is.
ENCODERS = {
    "dinov2": (
        lambda: Dinov2Model(
            Dinov2Config(
                hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=PATCH
            )
        ),
        1,
        "",
    ),
    "clip": (lambda: CLIPVisionModel(CLIPVisionConfig(**SHAPE)), 1, ""),
    "clip-with-text": (
        lambda: CLIPModel(CLIPConfig(vision_config=SHAPE, text_config=TEXT_HALF, projection_dim=8)),
        1,
        "vision_model",
    ),
    "siglip": (lambda: SiglipVisionModel(SiglipVisionConfig(**SHAPE)), 0, ""),
    "siglip-with-text": (
        lambda: SiglipModel(SiglipConfig(vision_config=SHAPE, text_config=TEXT_HALF)),
        0,
        "vision_model",
    ),
    "vit": (lambda: ViTModel(ViTConfig(**SHAPE)), 1, ""),
    "vit-classifier": (lambda: ViTForImageClassification(ViTConfig(**SHAPE)), 1, ""),  # has no pooler to load
}


LLAVA = make_llava(side=16, patch=4)


def centres_of(processor, model, width: int, height: int) -> torch.Tensor:
    return token_centres(processor, keepsight.vlm.Vlm(model), width, height, render_prompt(processor, ""))


def picture(seed: int, width: int = 16, height: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_centres_of_a_plain_square_grid():
    model, _ = llava_clip_llama()
    centres = centres_of(LLAVA, model, 16, 16)
    grid = (torch.arange(4) + 0.5) / 4
    expected = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), dim=-1).view(16, 2)
    assert torch.allclose(centres, expected, atol=0.01)


def test_centres_follow_the_crop():
    model, _ = llava_clip_llama()
    centres = centres_of(LLAVA, model, 32, 16)
    grid = (torch.arange(4) + 0.5) / 4  # the crop keeps the middle half of the width
    expected = torch.stack(torch.meshgrid(0.25 + grid / 2, grid, indexing="xy"), dim=-1).view(16, 2)
    assert torch.allclose(centres, expected, atol=0.01)


def test_centres_of_tiles_and_their_thumbnail():
    model, _ = smolvlm()
    centres = centres_of(make_smolvlm(), model, 32, 16)  # two tiles side by side, 2 × 2 tokens each, then the whole
    x, y = centres[:, 0].view(3, 2, 2), centres[:, 1].view(3, 2, 2)
    assert x[0, 0].tolist() == pytest.approx([0.125, 0.375], abs=0.01)
    assert x[1, 0].tolist() == pytest.approx([0.625, 0.875], abs=0.01)
    assert x[2, 0].tolist() == pytest.approx([0.25, 0.75], abs=0.03)
    assert y[0, :, 0].tolist() == pytest.approx([0.25, 0.75], abs=0.01)


def test_pixels_are_the_encoders_own(dino):
    external = ExternalEncoder(str(dino))
    model, _ = llava_clip_llama()
    image = picture(0, SIDE, SIDE)
    batch = external.prepare([image], LLAVA, keepsight.vlm.Vlm(model))
    expected = (np.asarray(image) / 255 - MEAN) / DEVIATION
    assert torch.allclose(batch[PIXELS][0], torch.tensor(expected).permute(2, 0, 1).float(), atol=1e-5)
    assert batch[POINTS].shape == (16, 2)


@pytest.mark.parametrize("kind", ENCODERS)
def test_loss_is_the_cosine_to_the_features_at_the_same_place(kind, tmp_path):
    """The 4 × 4 grid of tokens meets the encoder's 4 × 4 patches exactly, so nothing is interpolated."""
    make, before, inside = ENCODERS[kind]
    torch.manual_seed(5)
    make().save_pretrained(tmp_path)
    square = {"height": SIDE, "width": SIDE}
    if kind == "dinov2":
        settings = {"size": {"shortest_edge": 14}, "crop_size": square}
        BitImageProcessor(**settings, image_mean=MEAN, image_std=DEVIATION).save_pretrained(tmp_path)
    else:
        ViTImageProcessor(size=square, image_mean=MEAN, image_std=DEVIATION).save_pretrained(tmp_path)
    model, batch = llava_clip_llama()
    model.train()
    state = torch.get_rng_state()
    handle = keepsight.attach(model, keepsight.PReConfig(anchor="external", anchor_model=str(tmp_path), weight=1.0))
    assert torch.equal(torch.get_rng_state(), state)  # λ = 0 and λ > 0 must draw the same afterwards
    targets, observer = [], handle._forward.observers[2]
    look = observer.look
    observer.look = lambda prediction, target, *args, **kw: (
        targets.append(target) or look(prediction, target, *args, **kw)
    )
    images = [picture(i) for i in range(3)]
    extra = handle.prepare(images, LLAVA)
    out = model(**batch, **extra, output_hidden_states=True)
    plain = AutoModel.from_pretrained(tmp_path).eval().get_submodule(inside)
    with torch.no_grad():
        own = plain(pixel_values=extra[PIXELS], output_hidden_states=True).hidden_states[-1][:, before:]
    (target,) = targets
    target = target.view(3, 16, WIDTH)
    # The centres come from eight-bit colours, of which a patch is 64 wide, so a little of the next patch is in it.
    off = (target - own).norm() / (own.roll(1, dims=1) - own).norm()
    assert off < 0.05
    prediction = handle.head(out.hidden_states[2][batch["input_ids"] == IMAGE]).view(3, 16, WIDTH)
    expected = -F.cosine_similarity(prediction, target, dim=-1).mean()
    assert handle.loss.item() == pytest.approx(expected.item(), abs=1e-6)
    handle.loss.backward()
    assert not any(p.requires_grad for p in handle._forward.source.external.model.parameters())
    assert not any(str(tmp_path) in name or "external" in name for name in model.state_dict())


def test_pictures_that_do_not_fit_or_are_missing(dino):
    model, batch = llava_clip_llama()
    model.train()
    handle = keepsight.attach(model, keepsight.PReConfig(anchor="external", anchor_model=str(dino)))
    with pytest.raises(ValueError, match=r"needs the pictures themselves: add `batch \|= handle.prepare"):
        model(**batch)
    extra = handle.prepare([picture(0)], LLAVA)
    with pytest.raises(ValueError, match="holds 3 pictures with 48 visual tokens, but 1 pictures with 16"):
        model(**batch, **extra)
    ids = torch.tensor([[1, 5, 6]])
    model(input_ids=ids, attention_mask=torch.ones_like(ids))  # no picture, no need
    assert handle.loss.item() == 0.0


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_deep_copy_takes_its_own_pictures(dino, wrapped):
    """The hook that takes them off the batch is on the outermost module, which is copied before all within it."""
    model, batch = llava_clip_llama()
    model.train()
    config = keepsight.PReConfig(anchor="external", anchor_model=str(dino))
    handle = keepsight.attach(model, config)
    outer = model
    if wrapped:
        outer = peft.get_peft_model(model, handle.peft(peft.LoraConfig(target_modules=["q_proj"], lora_dropout=0.0)))
    processor = make_llava()
    pictures = [Image.new("RGB", (16, 16), color) for color in ("red", "green", "blue")]
    batch |= handle.prepare(pictures, processor)
    twin = copy.deepcopy(outer)
    own = keepsight.handle_of(twin)
    twin(**batch)
    assert (own.tokens, handle.tokens) == (48, 0)
    outer(**batch)
    assert torch.equal(own.loss, handle.loss)
    own.detach()
    outer(**batch)
    assert handle.tokens == 48


def test_an_encoder_whose_weights_are_missing_is_refused(dino, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in dino.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "layer.1." not in k}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"lacks the weights of .*partly random"):
        ExternalEncoder(str(tmp_path))


@pytest.mark.parametrize("layer", [3, 99, -4])
def test_a_layer_that_the_encoder_does_not_have_is_refused_at_attach(dino, layer):
    model, _ = llava_clip_llama()
    said = rf"anchor_layer is {layer} and anchor_model '.*' \(dinov2\), which gives 3 hidden states: .* 2, or from -3"
    with pytest.raises(ValueError, match=said):
        keepsight.attach(model, keepsight.PReConfig(anchor="external", anchor_model=str(dino), anchor_layer=layer))
    assert keepsight.handle_of(model) is None
    for end in (-3, 2):
        assert ExternalEncoder(str(dino), end).width == WIDTH


def test_an_encoder_without_a_token_for_each_patch_is_refused_at_attach(tmp_path):
    """Swin merges four patches into one token from stage to stage, and widens them."""
    config = SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4)
    SwinModel(config).save_pretrained(tmp_path)
    BitImageProcessor(crop_size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    model, _ = llava_clip_llama()
    said = r"anchor_model '.*' \(swin\), whose hidden state there has shape \(1, 16, 16\).* each of the 8 × 8 patches"
    with pytest.raises(ValueError, match=said):
        keepsight.attach(model, keepsight.PReConfig(anchor="external", anchor_model=str(tmp_path)))
    assert ExternalEncoder(str(tmp_path), 0).width == 8  # before the first merge there is one, narrower than the last


def test_a_picture_size_that_the_encoder_does_not_take_is_refused_at_attach(tmp_path):
    CLIPVisionModel(CLIPVisionConfig(**SHAPE)).save_pretrained(tmp_path)
    BitImageProcessor(crop_size={"height": 2 * SIDE, "width": 2 * SIDE}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\(clip_vision_model\), which does not take a picture of 24 × 24"):
        ExternalEncoder(str(tmp_path))


def test_loading_leaves_the_weights_as_they_are_in_the_file(dino):
    """A target encoder that is initialised again after loading is random, and nobody notices."""
    from safetensors.torch import load_file

    external = ExternalEncoder(str(dino))
    stored = load_file(dino / "model.safetensors")

    def content(tensors):  # names in the file are an older version's
        return sorted((tuple(value.shape), value.double().sum().item()) for value in tensors)

    assert content(external.model.state_dict().values()) == content(stored.values())


def test_weights_that_change_under_way_are_noticed(dino):
    model, _ = llava_clip_llama()
    handle = keepsight.attach(model, keepsight.PReConfig(anchor="external", anchor_model=str(dino)))
    handle._alive = True
    handle.on_train_end(None, None, None)
    with torch.no_grad():
        for p in handle._forward.source.external.model.parameters():
            p.normal_()
    with pytest.raises(DeadLossError, match=r"the external anchor .* changed during training"):
        handle.on_train_end(None, None, None)


def test_an_external_encoder_is_whole_where_zero3_loads_models_in_shards(dino):
    """As `TrainingArguments` with ZeRO-3's settings leave it; the model's own loading stays as it is."""

    class Settings:
        def is_zero3(self) -> bool:
            return True

    model, _ = llava_clip_llama()
    settings = Settings()  # transformers holds them weakly
    deepspeed.set_hf_deepspeed_config(settings)
    try:
        handle = keepsight.attach(model, keepsight.PReConfig(anchor="external", anchor_model=str(dino)))
        assert deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()
    assert all(p.numel() for p in handle._forward.source.external.model.parameters())
