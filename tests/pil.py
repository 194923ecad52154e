"""Image processors that work on PIL pictures; the first releases of transformers 5 do not have `Pil` in their names."""

from typing import Any

import transformers


def _pil(name: str) -> Any:
    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)


BitImageProcessorPil = _pil("BitImageProcessor")
CLIPImageProcessorPil = _pil("CLIPImageProcessor")
Gemma3ImageProcessorPil = _pil("Gemma3ImageProcessor")
GotOcr2ImageProcessorPil = _pil("GotOcr2ImageProcessor")
Idefics2ImageProcessorPil = _pil("Idefics2ImageProcessor")
LlavaNextImageProcessorPil = _pil("LlavaNextImageProcessor")
LlavaOnevisionImageProcessorPil = _pil("LlavaOnevisionImageProcessor")
Qwen2VLImageProcessorPil = _pil("Qwen2VLImageProcessor")
SiglipImageProcessorPil = _pil("SiglipImageProcessor")
SmolVLMImageProcessorPil = _pil("SmolVLMImageProcessor")
