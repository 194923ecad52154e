"""What a probe still reads, from the tokens that are kept, when visual tokens are pruned on the way. Ours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from keepsight.diagnosis.collect.batches import Loader
from keepsight.diagnosis.collect.passes import device_of, forward
from keepsight.diagnosis.probes.probe import SHUFFLED, Probe, fit_probes, share_row
from keepsight.diagnosis.progress import tracked
from keepsight.diagnosis.summary import too_few, too_small
from keepsight.results import Measurement, PerImage, PerImageBuilder
from keepsight.results.intervals import mean_interval
from keepsight.results.measurement import Key
from keepsight.vlm import Vlm
from keepsight.vlm.pruning import Pruning, pruned


def check_prunings(vlm: Vlm, prunings: Iterable[Pruning]) -> tuple[Pruning, ...]:
    """Those asked for, each once.

    Raises:
        ValueError: one that keeps nothing, of which a probe could read nothing; a layer that does not exist; or two
            that rows could not tell apart, such as draws of several seeds.
    """
    given = tuple(dict.fromkeys(prunings))
    names = [str(pruning) for pruning in given]
    for pruning in given:
        if names.count(str(pruning)) > 1:
            raise ValueError(
                f"two prunings are called '{pruning}', so their rows could not be told apart; give one of them, and "
                "the other (another seed, or a share that is nearly the same) to a diagnosis of its own"
            )
        if pruning.keep == 0:
            raise ValueError("a pruning keeps no visual token, so there is nothing to probe; give keep above 0")
        with pruned(vlm, pruning):
            pass
    return given


def pruning_rows(
    vlm: Vlm,
    loader: Loader,
    prunings: Sequence[Pruning],
    labels: Mapping[str, Sequence[str | None]],
    done: Sequence[int],
    per_image: PerImageBuilder,
    *,
    seed: int,
    progress: bool = False,
    unlabelled: str = "no labels were given",
) -> list[Measurement]:
    """Rows `probe_accuracy_pruned` and `pruning_loss`: a forward over the pictures for each pruning, whole prompt.

    The probe's protocol and its split of the pictures are those of `probe_accuracy`; its input is the mean over the
    kept tokens of a picture, at the middle and the last layer where these lie above the pruning. `variant` tells the
    pruning, as "attention, 25% after layer 2". What it cost is the difference to `probe_accuracy` there, in pairs over
    the test pictures. Without label sets no forward is run, and one row says why.

    per_image: holds what each picture adds to `probe_accuracy`, and takes what it adds to these rows.
    """
    if not labels:
        return [Measurement("probe_accuracy_pruned", None, seed=seed, note=unlabelled)]
    whole = replace(loader, whole=True)
    rows: list[Measurement] = []
    unpruned = per_image.finish()
    for pruning in tracked(prunings, "pruned", progress):
        layers = [layer for layer in (vlm.resolve_layer("middle"), vlm.depth) if layer > pruning.layer]
        pooled = _pooled(vlm, whole, pruning, layers, done)
        for target, values in labels.items():
            left_out = too_small(values, done)
            chosen = [i for i, at in enumerate(done) if values[at] is not None and values[at] not in left_out]
            names = [str(values[done[i]]) for i in chosen]
            if too_few(names):
                continue  # `probe_accuracy` says why
            features = {layer: pooled[layer][chosen] for layer in layers}
            probe = fit_probes(features.__getitem__, layers, names, seed=seed, device=device_of(vlm))
            test = np.array(chosen)[probe.test]
            for row, contributions in _rows(probe, unpruned, test, {"target": target, "seed": seed}, str(pruning)):
                rows.append(row)
                if contributions is not None:
                    per_image.add(row.key, contributions, test)
    return rows


def _rows(
    probe: Probe, unpruned: PerImage, test: np.ndarray, common: dict[str, Any], pruning: str
) -> Iterator[tuple[Measurement, np.ndarray | None]]:
    """Of each layer the accuracy, that of the control, and what the pruning cost; with what each test picture adds."""
    for layer, right, control in zip(probe.layers, probe.correct, probe.shuffled, strict=True):
        fields = {"layer": layer, **common}
        yield share_row("probe_accuracy_pruned", right, variant=pruning, **fields), right
        yield share_row("probe_accuracy_pruned", control, variant=f"{pruning}, {SHUFFLED}", **fields), control
        fields["variant"] = pruning
        whole = Key("probe_accuracy", common["target"], layer=layer)
        if whole not in unpruned:
            probed = any(key.metric == whole.metric for key in unpruned.keys)
            note = f"layer {layer} was not captured without pruning" if probed else "probes were not asked for"
            yield Measurement("pruning_loss", None, note=note, **fields), None
            continue
        lost = unpruned.of(whole)[test] - right
        yield Measurement("pruning_loss", **mean_interval(lost).fields, n=len(lost), **fields), lost


def _pooled(vlm: Vlm, loader: Loader, pruning: Pruning, layers: list[int], done: Sequence[int]) -> dict[int, Tensor]:
    """{layer: [n, d]}, mean over the kept visual tokens of each picture."""
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    with pruned(vlm, pruning) as state:
        for decoded in loader.batches(list(done), masks=False):
            image, index = decoded.batch.image, vlm.visual_index(decoded.inputs)

            def sink(layer: int, tokens: Tensor, image: Tensor = image, index: Tensor = index) -> None:
                assert state.hidden is not None
                kept = ~state.hidden.flatten()[index.to(state.hidden.device)]
                owner = image.to(tokens.device)[kept]
                sums = tokens.new_zeros(int(image.max()) + 1, tokens.shape[1], dtype=torch.float32)
                sums.index_add_(0, owner, tokens[kept].float())
                found[layer].append((sums / torch.bincount(owner, minlength=len(sums))[:, None]).cpu())

            forward(vlm, decoded, layers, sink)
    return {layer: torch.cat(blocks) for layer, blocks in found.items()}
