"""lmms-eval: any transformers model that keepsight loads as one of its models, and its tasks as runs of ours.

    lmms-eval eval --model keepsight --model_args pretrained=runs/pre,prune_keep=0.25 --tasks gqa
    keepsight evaluate runs/pre --tasks paper --out runs/pre-answers

lmms-eval is optional; nothing here imports it until it is asked for.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

INSTALL = 'pip install "keepsight[eval]"'


def manifest() -> Any:
    """What the entry point `lmms_eval.models` gives lmms-eval: the model "keepsight", asked by chat messages, or by
    text and pictures with its `--force_simple`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    place = "keepsight.evaluation.harness.model"
    return ModelManifest("keepsight", simple_class_path=f"{place}.Simple", chat_class_path=f"{place}.Chat")


def missing() -> str:
    """Why lmms-eval cannot be used here, or ""."""
    if find_spec("lmms_eval") is None:
        return f"lmms-eval is not installed: {INSTALL}"
    try:
        import lmms_eval.evaluator  # noqa: F401
    except Exception as cause:  # whatever one of its many dependencies raises
        return (
            f"lmms-eval cannot be imported ({type(cause).__name__}: {str(cause).strip().splitlines()[-1]}): {INSTALL}"
        )
    return ""
