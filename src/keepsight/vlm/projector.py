"""Initial weights of an assembled model's projector (ours; LLaVA leaves them at N(0, 0.02)).

Why: encoders differ in the scale of their hidden states by two orders of magnitude, and text embeddings by
one. With fixed-scale weights the first visual tokens reach the language model 10 to 100 times longer than any
token it has seen, and the projector spends its first hundreds of steps on nothing but scale. So each layer is
rescaled on pictures (layer-sequential unit variance, Mishkin & Matas 2016, arXiv:1511.06422): unit variance
before the GELU, then an output of the text embeddings' mean norm.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector


def noise_pictures(count: int, size: int, generator: torch.Generator) -> list[Image.Image]:
    """`count` colour pictures of `size` × `size` pixels with the 1/f amplitude spectrum of photographs.

    Field (1987) measured that spectrum on natural scenes; it makes an encoder's features nearer to those of
    photographs than white noise does, and needs no file.
    """
    frequency = torch.fft.fftfreq(size)[:, None].hypot(torch.fft.fftfreq(size)[None, :])
    frequency[0, 0] = float("inf")  # no constant part: the mean grey is set below
    white = torch.randn(count, 3, size, size, generator=generator)
    pink = torch.fft.ifft2(torch.fft.fft2(white) / frequency).real
    pink = pink / pink.std(dim=(1, 2, 3), keepdim=True)
    pixels = (pink * 50 + 120).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(np.ascontiguousarray(picture)) for picture in pixels.numpy()]


def mean_embedding_norm(embedding: nn.Module, rows: int, chunk: int = 8192) -> float:
    """Mean Euclidean norm of the first `rows` text embeddings, as the language model's layers receive them.

    The module is called rather than its weight read, because some families scale inside it.
    """
    device = next(embedding.parameters()).device
    total = 0.0
    with torch.no_grad():
        for start in range(0, rows, chunk):
            ids = torch.arange(start, min(start + chunk, rows), device=device)
            total += embedding(ids).float().norm(dim=-1).double().sum().item()
    return total / rows


@torch.no_grad()
def initialise_projector(
    projector: LlavaMultiModalProjector, features: Tensor, target_norm: float, generator: torch.Generator
) -> None:
    """Fill `projector.linear_1` and `.linear_2` from `generator` and scale them on `features` [T, D_vision].

    Afterwards the pre-activations of `features` have unit root mean square and the outputs a mean norm of
    `target_norm`; biases are zero. Arithmetic is float32 on the CPU; the weights keep their type and device.
    """
    x = features.float().cpu()
    linear_1, linear_2 = projector.linear_1, projector.linear_2
    first = torch.randn(linear_1.weight.shape, generator=generator)
    first /= (x @ first.T).square().mean().sqrt()
    hidden = projector.act(x @ first.T)
    second = torch.randn(linear_2.weight.shape, generator=generator)
    second *= target_norm / (hidden @ second.T).norm(dim=-1).mean()
    for linear, weight in ((linear_1, first), (linear_2, second)):
        linear.weight.copy_(weight)
        if linear.bias is not None:
            linear.bias.zero_()
