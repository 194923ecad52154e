"""Turn the fetched weights into plain safetensors directories that transformers loads.

SmolLM2 comes as a quantised GGUF file: transformers dequantises it, and the values are stored as they come out,
in float32. The vision transformer comes as an ONNX graph, in which the matrices of the linear layers lost their
names; the path of the node that multiplies by them gives the names back.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    GenerationConfig,
)

POSITION_OF_CLS, POSITION_OF_PATCHES = "onnx::Concat_1957", "onnx::Reshape_1962"
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def language_model(gguf: Path, out: Path) -> None:
    """SmolLM2-135M-Instruct: `gguf` → weights, tokenizer and chat template in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):  # the weights are plain from here on
        del config.quantization_config
    config.dtype = torch.float32
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(loaded.state_dict(), strict=True)
    plain.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    plain.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


def vision_model(graph_file: Path, out: Path) -> None:
    """The ViT-S/14 of `graph_file` (its backbone, not the saliency decoder) → `Dinov2Model` in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, patch_size=14, image_size=518, mlp_ratio=4
    )
    config.architectures = ["Dinov2Model"]
    config.save_pretrained(out)
    state = backbone_weights(onnx.load(graph_file).graph)
    state["embeddings.mask_token"] = torch.zeros(1, config.hidden_size)  # only used in masked pretraining
    # The graph has the names of published DINOv2 checkpoints; transformers maps them to its own when it loads.
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    _, info = Dinov2Model.from_pretrained(out, output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"]:
        raise RuntimeError(f"{graph_file.name} does not fill a Dinov2Model: {info}")
    BitImageProcessorPil(
        size={"shortest_edge": 224},
        crop_size={"height": 224, "width": 224},
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
    ).save_pretrained(out)


def backbone_weights(graph: onnx.GraphProto) -> dict[str, torch.Tensor]:
    """Named weights of the backbone: initialisers that kept their names, and the operands of its MatMul nodes."""
    values = {entry.name: np.array(numpy_helper.to_array(entry)) for entry in graph.initializer}
    state = {
        name.removeprefix("backbone."): torch.from_numpy(value)
        for name, value in values.items()
        if name.startswith("backbone.")
    }
    for node in graph.node:
        path = re.fullmatch(r"/backbone/(encoder/.+)/MatMul", node.name)
        if path and node.input[1] in values:  # attention's own products have no constant operand
            name = path[1].replace("/", ".") + ".weight"
            state[name] = torch.from_numpy(values[node.input[1]]).T.contiguous()  # ONNX keeps [in, out]
    positions = [torch.from_numpy(values[name]) for name in (POSITION_OF_CLS, POSITION_OF_PATCHES)]
    state["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    return state
