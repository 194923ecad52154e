"""What a number came from: versions, the command, and a fingerprint of the weights."""

import hashlib
import platform
import shlex
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SAMPLED_ELEMENTS = 4096  # of each tensor: training moves them all, and a 7B model takes under a second


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide the numbers; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("keepsight", "torch", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def command_line() -> str:
    """The command that is running, ready to paste, without the folder of the program."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def prompt_hash(prompt: str) -> str:
    """SHA-256 of a prompt's UTF-8 text, in hexadecimal."""
    return hashlib.sha256(prompt.encode("utf-8")).hexdigest()


def fingerprint(model: "torch.nn.Module | Mapping[str, torch.Tensor]") -> str:
    """16 hexadecimal digits that tell one set of weights from another (ours), of a model or its state dict.

    SHA-256 over names, shapes, types and about 4,096 evenly spaced elements of every tensor of the state dict:
    equal weights give equal digits on any device, and a training step changes them. It is no protection against
    forgery.
    """
    import torch

    digest = hashlib.sha256()
    state = model.state_dict() if isinstance(model, torch.nn.Module) else model
    for name, tensor in sorted(state.items()):
        if tensor.is_meta and isinstance(model, torch.nn.Module):
            tensor = _elsewhere(model, name)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().reshape(-1)
        if flat.numel():
            stride = max(1, flat.numel() // SAMPLED_ELEMENTS)
            sample = flat[::stride].cpu().contiguous()
            digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _elsewhere(model: "torch.nn.Module", name: str) -> "torch.Tensor":
    """A weight that accelerate keeps in memory or on disk until its module runs (`device_map`)."""
    owner, _, leaf = name.rpartition(".")
    hook = getattr(model.get_submodule(owner), "_hf_hook", None)
    for each in getattr(hook, "hooks", [hook]):
        if getattr(each, "weights_map", None) is not None:
            found: torch.Tensor = each.weights_map[leaf]
            return found
    raise ValueError(f"the weight '{name}' is on no device, so the model cannot be told from others; load it in full")
