"""What the commands share: the terminal, silence from libraries, the device, the run that a model comes from."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console

# Wide enough for the tables where the output goes to a file.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)


def quiet() -> None:
    """Errors only from transformers: its advice about other image back-ends would drown the results."""
    from transformers import logging

    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


def device_named(name: str) -> str:
    """The device to compute on, refused before the model is loaded if it cannot be used.

    "auto" gives each process of several a GPU of its own, as far as there are.
    """
    import torch

    if name == "auto":
        gpus = torch.cuda.device_count()
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % gpus}" if gpus else "cpu"
    try:
        torch.empty(1, device=name).cpu()
    except (RuntimeError, AssertionError, ImportError) as cause:  # which of them, depends on the back-end
        reason = str(cause).strip().split("\n")[0].rstrip(".")
        raise ValueError(
            f"device is {name!r}, which cannot be used here ({reason}); allowed: 'auto', 'cpu', or a device of this "
            "machine such as 'cuda' or 'cuda:1'."
        ) from cause
    return name


def training_run(model: Path) -> dict[str, Any]:
    """Label, PRe layer and seed of the training run whose `model` this is; empty if it is no run's."""
    from keepsight.results import RunDirectory

    model = model.resolve()  # it may be "."
    try:
        run = RunDirectory.open(model.parent)
    except (OSError, ValueError):  # the model is what was asked for; what lies beside it need not be keepsight's
        return {}
    layer = run.info.get("pre_layer")
    if model.name != "model" or run.kind != "training" or not (layer is None or type(layer) is int):
        return {}
    return {"label": run.label, "pre_layer": layer, "training_seed": run.info.get("seed")}
