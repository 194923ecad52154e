"""What the arguments of `diagnose` must be, checked before any picture is run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from keepsight.diagnosis.probes.probe import stratified_split
from keepsight.vlm import Vlm


def check_settings(processor: Any, prompt: str, batch_size: int, seed: int) -> None:
    """Raises ValueError for a batch size, seed or prompt that cannot be used."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")
    if seed < 0:
        raise ValueError(f"seed is {seed}; allowed: 0 or more")
    for token in ("image_token", "boi_token"):
        if (placeholder := getattr(processor, token, None)) and placeholder in prompt:
            raise ValueError(
                f"the prompt {prompt[:60]!r} holds the image placeholder {placeholder!r}; give the text alone, the "
                "picture is put before it"
            )


def chosen_layers(vlm: Vlm, layers: str | Iterable[int | str]) -> list[int]:
    """The indices of the layers asked for, rising.

    Raises:
        ValueError: none, or one that the model has not.
    """
    if layers == "all":
        return list(range(vlm.depth + 1))
    listed = [layers] if isinstance(layers, (str, int)) else list(layers)
    if not listed:
        raise ValueError('layers is empty; give "all" or at least one layer')
    return sorted({vlm.resolve_layer(layer) for layer in listed})


def initial_encoder(initial: nn.Module | None, vlm: Vlm) -> Vlm | None:
    """The checkpoint whose encoder's output is the target of fidelity.

    Raises:
        ValueError: it is of another family than the model.
    """
    if initial is None:
        return None
    found = Vlm(initial)
    if found.family != vlm.family:
        raise ValueError(f"initial is of family {found.family!r}, the model of {vlm.family!r}; they must be the same")
    return found


def check_labels(target: str, values: Sequence[str | None], *, selected: bool) -> None:
    """Fail before the forward pass, not after it; `selected`: classes or a limit left pictures out."""
    try:
        stratified_split([value for value in values if value is not None], 0)
    except ValueError as error:
        what = f"label set '{target}'" + ", of the pictures that classes and limit leave" * selected
        others = "or measure what needs no classes (--metrics structure,spectrum,fidelity,lens,maps)"
        raise ValueError(f"{what}: {error}; {others}") from error
