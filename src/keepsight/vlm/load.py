"""The one place where a whole model and its processor are read from disk or from the hub."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from keepsight.errors import reason
from keepsight.vlm.view import Vlm

_FILM_FILE = "video_preprocessor_config.json"


class LoadError(ValueError):
    """A model that cannot be loaded; the text says why and what to do."""


def load_model(
    path: str | Path,
    *,
    trust_remote_code: bool = False,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
) -> tuple[Any, Any]:
    """An image-text-to-text model, in eval mode, and its processor.

    Args:
        path: a directory in transformers format, the folder of a `keepsight train` run, a folder with a PEFT adapter
            (merged into the model that it names), or a hub id.
        trust_remote_code: run code that comes with the checkpoint. Off unless its author is known.
        dtype: of the weights; "auto" keeps the checkpoint's.
        device_map: handed to transformers; None loads on the CPU.

    Weights are read from safetensors only: other formats can run code when they are opened.

    Raises:
        FileNotFoundError: if a local path does not exist.
        LoadError: if it is no image-text-to-text model, has no safetensors weights or lacks some of them, or no usable
            processor.
        ValueError: from `Vlm`, if the family has no visual tokens to follow.
    """
    place = model_folder(path)
    if base := _adapted(place):
        model, processor = load_model(base, trust_remote_code=trust_remote_code, dtype=dtype, device_map=device_map)
        return with_adapter(model, place), processor
    if Path(place).is_dir() and not (Path(place) / "config.json").is_file():
        raise LoadError(
            f"'{place}' cannot be used: its configuration cannot be read (there is no config.json); give a "
            "directory in transformers format, the folder of a finished `keepsight train` run (--resume goes on with "
            "one that has not), or a hub id."
        )
    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as cause:
        raise LoadError(_hint(place, "its configuration cannot be read", cause)) from cause
    if type(config) not in AutoModelForImageTextToText._model_mapping and not trust_remote_code:
        raise LoadError(
            f"'{place}' is a {config.model_type!r} model, not an image-text-to-text model. keepsight needs one that "
            "AutoModelForImageTextToText knows, such as LLaVA, Qwen2.5-VL, InternVL, Gemma 3 or SmolVLM; to build one "
            "from an encoder and a language model, use `keepsight.vlm.assemble`."
        )
    loaded: Any
    try:
        loaded = AutoModelForImageTextToText.from_pretrained(
            place,
            dtype=dtype,
            device_map=device_map,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except SafetensorError as cause:
        raise LoadError(_hint(place, "its weights file (.safetensors) is cut off or damaged", cause)) from cause
    except OSError as cause:
        raise LoadError(_hint(place, "it has no safetensors weights that can be read", cause)) from cause
    model, report = loaded
    absent = sorted(report["missing_keys"]) + [str(key) for key in report["mismatched_keys"]]
    if absent:
        raise LoadError(
            f"'{place}' lacks {len(absent)} weights of {type(model).__name__}, or has them in another shape (first: "
            f"{absent[0]}); they would be random, and so every number. Use a complete checkpoint."
        )
    Vlm(model)
    return model.eval(), load_processor(place, trust_remote_code=trust_remote_code)


def with_adapter(model: Any, folder: str | Path) -> Any:
    """The model with a PEFT adapter merged into its weights, in place.

    Raises:
        LoadError: PEFT is missing, or the folder holds no adapter that fits the model.
    """
    try:
        import peft
    except ImportError as cause:
        raise LoadError(f"'{folder}' is an adapter, which needs PEFT: pip install \"keepsight[train]\"") from cause
    if not (Path(folder) / "adapter_model.safetensors").is_file():
        raise LoadError(f"'{folder}' holds no adapter: its adapter_model.safetensors is missing.")
    try:
        return peft.PeftModel.from_pretrained(model, str(folder), use_safetensors=True).merge_and_unload().eval()
    except (OSError, ValueError, RuntimeError, KeyError) as cause:
        raise LoadError(_hint(str(folder), f"it does not fit this {type(model).__name__}", cause)) from cause


def _adapted(place: str) -> str:
    """The model that an adapter's folder stands on; "" for a folder that is none."""
    file = Path(place) / "adapter_config.json"
    if not file.is_file() or (Path(place) / "config.json").is_file():
        return ""
    base = json.loads(file.read_text("utf-8")).get("base_model_name_or_path")
    if not base:
        raise LoadError(f"'{file}' does not name the model it stands on; add base_model_name_or_path to it.")
    return str(base)


def load_processor(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The processor beside a model; of families that also take films, for pictures only where torchvision is missing.

    Raises:
        LoadError: if there is none, or it lacks an image processor, a tokenizer or a chat template.
    """
    place = model_folder(path)
    try:
        processor = AutoProcessor.from_pretrained(place, trust_remote_code=trust_remote_code)
    except (ImportError, OSError, ValueError, AttributeError) as cause:
        if "torchvision" not in str(cause).lower() and "video processor" not in str(cause):
            raise LoadError(_hint(place, "its processor cannot be loaded", cause)) from cause
        processor = _pictures_only(place, cause)
    missing = [name for name in ("image_processor", "tokenizer") if not hasattr(processor, name)]
    if missing:
        raise LoadError(
            f"'{place}' has a {type(processor).__name__} without {' and '.join(missing)}; the files of the whole "
            "processor (preprocessor_config.json, tokenizer.json, …) must lie beside the weights."
        )
    return processor


def model_folder(path: str | Path) -> str:
    """Where the model lies: of a run's folder its `model`, else the path itself.

    Raises:
        FileNotFoundError: if it looks like a local path and is not there.
    """
    folder = Path(path)
    if (folder / "model" / "config.json").is_file() and not (folder / "config.json").is_file():
        return str(folder / "model")
    # A hub id is owner/name; a path whose first folder is here is none.
    hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)) and not Path(folder.parts[0]).exists()
    if not folder.exists() and not hub_id:
        raise FileNotFoundError(
            f"the model '{path}' does not exist; give a directory in transformers format or a hub id such as "
            "'llava-hf/llava-1.5-7b-hf'."
        )
    return str(path)


def _pictures_only(place: str, cause: Exception) -> Any:
    """A processor without its film part, which needs torchvision and which keepsight never uses.

    Saving it writes the film part's settings back, so that the copy loads wherever the original does.
    """
    files = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json", _FILM_FILE)
    read = {name: json.loads(file.read_text("utf-8")) for name in files if (file := Path(place) / name).is_file()}
    names = [settings["processor_class"] for settings in read.values() if settings.get("processor_class")]
    family = getattr(transformers, names[-1], None) if names else None
    if family is None or "video_processor" not in family.get_attributes():
        raise LoadError(_hint(place, "its processor cannot be loaded", cause)) from cause
    kept = [name for name in family.get_attributes() if name != "video_processor"]
    film = read.get(_FILM_FILE) or read.get("processor_config.json", {}).get("video_processor")

    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        written = family.save_pretrained(self, save_directory, *args, **kwargs)
        if film is not None:
            (Path(save_directory) / _FILM_FILE).write_text(json.dumps(film, indent=2), encoding="utf-8")
        return written

    def from_args_and_dict(cls: Any, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        settings = {**processor_dict, "video_processor": None}  # some families (SmolVLM) demand the argument
        return family.from_args_and_dict.__func__(cls, args, settings, **kwargs)

    body = {
        "get_attributes": classmethod(lambda cls: kept),
        "from_args_and_dict": classmethod(from_args_and_dict),
        "save_pretrained": save_pretrained,
        "video_processor": SimpleNamespace(num_frames=None, fps=None),  # some families read these for any input
    }
    reduced: Any = type(family.__name__, (family,), body)
    try:
        return reduced.from_pretrained(place)
    except ImportError as missing:  # what else the family needs, such as SmolVLM's num2words
        raise LoadError(_hint(place, "its processor cannot be loaded", missing)) from missing


def _hint(place: str, what: str, cause: Exception) -> str:
    while isinstance(cause, ImportError) and isinstance(cause.__cause__, ImportError):  # which package is missing
        cause = cause.__cause__
    return f"'{place}' cannot be used: {what} ({reason(cause)})."
