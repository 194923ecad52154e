"""Null models, without which a curve over layers cannot be read: what an untrained language model would show.

Permuted labels, permuted images and the place alone are part of the metrics themselves (`fidelity.py`, `similarity.py`,
`probe.py`): they cost next to nothing. The one here costs a second diagnosis.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from keepsight.diagnosis.metrics.fidelity import OTHER, PLACE
from keepsight.diagnosis.metrics.similarity import PERMUTED
from keepsight.diagnosis.probes.probe import SHUFFLED
from keepsight.results import Measurement
from keepsight.vlm import Vlm
from keepsight.vlm.features import before_decoder

RANDOM = "random_weights"
NULLS = (RANDOM,)
OWN_CONTROLS = (SHUFFLED, OTHER, PLACE, PERMUTED)
ONE_LAYER = ("probe_drop", "probe_worst_layer")
RANDOM_WEIGHTS = "random weights"  # in the rows' variant


def wanted_nulls(nulls: str | Iterable[str]) -> tuple[str, ...]:
    """The null models asked for.

    Raises:
        ValueError: one that does not exist.
    """
    given = [nulls] if isinstance(nulls, str) else list(nulls)
    if unknown := [name for name in given if name not in NULLS]:
        raise ValueError(f"nulls holds {unknown[0]!r}; allowed: {', '.join(NULLS)}")
    return tuple(dict.fromkeys(given))


def random_weights(vlm: Vlm, seed: int) -> nn.Module:
    """A copy of the model whose language model has the random weights that its training would start from.

    Vision encoder and projector are shared with the original, not copied; the global random state is left as it was.

    Raises:
        ValueError: a weight of the language model has no initialisation in its family, and would stay trained.
    """
    shared = {id(parameter): parameter for _, parameter in before_decoder(vlm)}
    twin = copy.deepcopy(vlm.base, dict(shared))
    other = Vlm(twin)
    owners = [(other.decoder, vlm.decoder)]
    if (head := twin.get_output_embeddings()) is not None:
        owners.append((head, vlm.lm_head))
    device = next(other.decoder.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        for fresh, _ in owners:
            for parameter in fresh.parameters():
                parameter._is_hf_initialized = False  # else transformers leaves what it loaded alone
            for module in fresh.modules():
                twin._init_weights(module)
    for fresh, trained in owners:
        old = dict(trained.named_parameters())
        for name, parameter in fresh.named_parameters():
            # Vectors are norms and biases, which start as constants, and may have been trained to the same.
            if parameter.ndim > 1 and torch.equal(parameter, old[name]):
                raise ValueError(
                    f"the null model random_weights needs fresh weights, but model family {vlm.family!r} does not say "
                    f"how its weight '{name}' starts; leave random_weights out of nulls"
                )
    return twin


def as_null(rows: Iterable[Measurement], variant: str) -> list[Measurement]:
    """A null model's rows as lines to draw beside the model's own: one a layer, without their own controls."""
    return [
        replace(row, variant=f"{row.variant}, {variant}" if row.variant else variant)
        for row in rows
        if row.layer is not None and row.variant not in OWN_CONTROLS and row.metric not in ONE_LAYER
    ]
