"""Loading: safetensors only, pictures only where films are not possible, and errors that say what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import BertConfig, LlamaConfig

from keepsight.training.conversations import Conversation
from keepsight.training.encode import Encoder
from keepsight.vlm.load import LoadError, load_model, load_processor, model_folder
from tests.tiny import llava
from tests.tiny_processors import make_internvl, make_llava, make_qwen, make_smolvlm, make_tokenizer, save_llava, turns

FILM = {"video_processor_type": "Qwen2VLVideoProcessor", "patch_size": 4, "merge_size": 2}


def test_loads_what_was_saved(tmp_path: Path) -> None:
    model, processor = load_model(save_llava(tmp_path))
    expected = llava(patch=8).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert not model.training
    assert type(processor).__name__ == "LlavaProcessor"
    half, _ = load_model(tmp_path, dtype="bfloat16")
    assert half.dtype == torch.bfloat16


def test_a_training_runs_folder_stands_for_its_model(tmp_path: Path) -> None:
    save_llava(tmp_path / "model")
    assert model_folder(tmp_path) == str(tmp_path / "model")
    assert model_folder(tmp_path / "model") == str(tmp_path / "model")


@pytest.mark.parametrize("path", ["model", "./owner/name", "/no/such", "a/b/c", "tests/none"])
def test_paths_that_are_not_there(path: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"the model '{path}' does not exist; .* hub id such as"):
        model_folder(path)


def test_a_hub_id_is_left_alone() -> None:
    assert model_folder("llava-hf/llava-1.5-7b-hf") == "llava-hf/llava-1.5-7b-hf"


def test_what_is_no_image_text_model(tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(LoadError, match="is a 'bert' model, not an image-text-to-text model"):
        load_model(tmp_path / "bert")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        LoadError, match=r"there is no config.json\); give .* finished `keepsight train` run .*, or a hub id"
    ):
        load_model(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(LoadError, match="its configuration cannot be read"):
        load_model(tmp_path / "empty")
    LlamaConfig().save_pretrained(tmp_path / "llama")
    with pytest.raises(LoadError, match="is a 'llama' model"):
        load_model(tmp_path / "llama")


def test_pickled_weights_are_not_opened(tmp_path: Path) -> None:
    save_llava(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(llava(patch=8).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(LoadError, match="no safetensors weights"):
        load_model(tmp_path)


def test_a_model_without_processor(tmp_path: Path) -> None:
    llava(patch=8).save_pretrained(tmp_path)
    with pytest.raises(LoadError, match="processor"):
        load_model(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(LoadError, match="processor"):
        load_model(tmp_path)


def save_with_film(processor: Any, folder: Path, film: dict[str, Any] = FILM) -> None:
    """A processor as its authors save it, film settings included; built here without them."""
    processor.save_pretrained(folder)
    (folder / "video_preprocessor_config.json").write_text(json.dumps(film), encoding="utf-8")


@pytest.fixture
def without_torchvision() -> None:
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    pytest.skip("torchvision is installed: the whole processor loads")


@pytest.mark.usefixtures("without_torchvision")
@pytest.mark.parametrize("make", [make_qwen, make_internvl, make_smolvlm])
def test_families_that_take_films_too_load_for_pictures(make: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", object())
    made = make()
    save_with_film(made, tmp_path, {"video_processor_type": type(made).__name__.replace("Processor", "VideoProcessor")})
    loaded, picture = load_processor(tmp_path), Image.new("RGB", (32, 16))
    prompt = made.apply_chat_template(turns([None, "what ?"]), add_generation_prompt=True)
    ours, theirs = (one(text=[prompt], images=[[picture]], return_tensors="pt") for one in (loaded, made))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.usefixtures("without_torchvision")
def test_what_else_a_family_needs_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    save_with_film(make_smolvlm(), tmp_path, {"video_processor_type": "SmolVLMVideoProcessor"})
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", None)
    with pytest.raises(LoadError, match=r"its processor cannot be loaded \(Package `num2words` is required"):
        load_processor(tmp_path)


def test_the_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    """As transformers wraps the reason."""

    def fails(*args: Any, **kwargs: Any) -> None:
        try:
            raise ModuleNotFoundError("No module named 'torchvision'")
        except ModuleNotFoundError as cause:
            raise ModuleNotFoundError("Could not import module 'SmolVLMProcessor'.") from cause

    monkeypatch.setattr("keepsight.vlm.load.AutoProcessor.from_pretrained", fails)
    with pytest.raises(LoadError, match=r"its processor cannot be loaded \(No module named 'torchvision'\)"):
        load_processor(tmp_path)


@pytest.mark.usefixtures("without_torchvision")
def test_qwen_without_torchvision_takes_pictures_and_keeps_the_film_settings(tmp_path: Path) -> None:
    save_with_film(make_qwen(), tmp_path)
    processor = load_processor(tmp_path)
    assert type(processor).__name__ == "Qwen2_5_VLProcessor"
    encoder = Encoder(processor)
    assert set(encoder.markers.values()) == {"<|vision_start|>", "<|image_pad|>", "<|vision_end|>"}
    messages = turns([None, "what ?"], ["red"], ["and", None], ["blue circle"])
    pictures = (("wide", Image.new("RGB", (32, 16))), ("square", Image.new("RGB", (16, 16))))
    encoded = encoder(Conversation("", messages, pictures))
    labels = encoded.sequence["labels"]
    assert processor.tokenizer.convert_ids_to_tokens(labels[labels != -100]) == [
        "red",
        "<eos>",
        "blue",
        "circle",
        "<eos>",
    ]
    assert encoded.media["image_grid_thw"].tolist() == [[1, 4, 8], [1, 4, 4]]
    assert int((encoded.sequence["input_ids"] == processor.image_token_id).sum()) == 8 + 4
    processor.save_pretrained(tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "video_preprocessor_config.json").read_text()) == FILM
    assert load_processor(tmp_path / "copy").chat_template == processor.chat_template


def test_llava_processor_alone(tmp_path: Path) -> None:
    make_llava().save_pretrained(tmp_path)
    assert load_processor(tmp_path).image_token == "<image>"


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    """They would be random, and every number with them."""
    from safetensors.torch import load_file, save_file

    folder = save_llava(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "layers.3.mlp" not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoadError, match=r"lacks 3 weights of LlavaForConditionalGeneration.*layers\.3\.mlp.*complete"):
        load_model(folder)
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(LoadError, match="cut off or damaged"):
        load_model(folder)
