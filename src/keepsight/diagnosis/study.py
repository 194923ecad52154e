"""The steps of a diagnosis: look at a model, at its null models, and at what only the report needs."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from keepsight.diagnosis.collect.accumulate import Accumulator
from keepsight.diagnosis.collect.batches import Loader
from keepsight.diagnosis.collect.kept import TAKEN, open_kept
from keepsight.diagnosis.collect.passes import measure
from keepsight.diagnosis.data.pictures import Pictures
from keepsight.diagnosis.examples import choose_examples
from keepsight.diagnosis.maps import similarity_maps
from keepsight.diagnosis.nulls import RANDOM, RANDOM_WEIGHTS, as_null, random_weights
from keepsight.diagnosis.pruning import pruning_rows
from keepsight.diagnosis.rows import all_rows, open_lens
from keepsight.diagnosis.summary import too_small
from keepsight.processes import Team
from keepsight.results import Measurement, PerImageBuilder, fingerprint, prompt_hash, versions
from keepsight.results.maps import SimilarityMap
from keepsight.vlm import Vlm
from keepsight.vlm.inference import inference
from keepsight.vlm.pruning import Pruning


@dataclass(frozen=True)
class Look:
    """What a pass over the pictures leaves: rows (none but in the first process), what they came from, the pictures
    in it, and what each of them adds to each number."""

    rows: list[Measurement]
    accumulator: Accumulator
    done: list[int]
    per_image: PerImageBuilder


@dataclass(frozen=True)
class Study:
    """What is asked about which pictures; each method asks the model of the loader that it is given.

    layers: rising; wanted: groups of numbers; how: the settings that what is taken from a model depends on; encoder:
    another checkpoint, whose encoder is the target of fidelity; folder: where features are kept, None for nowhere.
    """

    pictures: Pictures
    layers: list[int]
    wanted: Sequence[str]
    how: dict[str, Any]
    encoder: Vlm | None
    folder: Path | None
    team: Team
    progress: bool

    @property
    def seed(self) -> int:
        return int(self.how["seed"])

    def look(self, loader: Loader, name: str) -> Look:
        """One forward pass and all rows from it; `name`: where below the folder features are kept."""
        vlm, team = loader.vlm, self.team
        kept, taken = None, {group: group in self.wanted for group in TAKEN}
        if self.folder is not None:
            kept = team.together(
                partial(open_kept, self.folder / name, vlm, self.encoder, loader, self.layers, taken, self.how)
            )
            taken = kept.taken
        with tempfile.TemporaryDirectory(prefix="keepsight-") as folder, inference(vlm.model):
            accumulator, done = measure(
                vlm,
                loader,
                self.layers,
                Path(folder),
                exact=self.how["exact"],
                calibration_images=self.how["calibration_images"],
                encoder=(vlm if self.encoder is None else self.encoder) if taken["fidelity"] else None,
                bleeding=taken["bleeding"],
                by_object=taken["objects"],
                progress=self.progress and team.first,
                team=team,
                kept=kept,
            )
            per_image = PerImageBuilder([self.pictures.items[index].name for index in done])
            found = partial(self._rows, loader, accumulator, done, per_image)
            rows = team.together(lambda: found() if team.first else [])
        return Look(rows, accumulator, done, per_image)

    def _rows(
        self, loader: Loader, accumulator: Accumulator, done: list[int], per_image: PerImageBuilder
    ) -> list[Measurement]:
        return all_rows(
            loader.vlm,
            loader,
            accumulator,
            self.wanted,
            self.pictures.labels,
            done,
            loader.vlm.resolve_layer("middle"),
            per_image,
            seed=self.seed,
            has_masks=any(item.mask is not None for item in self.pictures.items),
            unlabelled=self.pictures.unlabelled,
            progress=self.progress,
        )

    def untrained_rows(self, loader: Loader) -> list[Measurement]:
        """Rows of a language model of random weights behind the same encoder and projector."""
        twin = Vlm(random_weights(loader.vlm, self.seed))
        return as_null(self.look(replace(loader, vlm=twin), RANDOM).rows, RANDOM_WEIGHTS)

    def maps(self, loader: Loader, looked: Look) -> dict[int, SimilarityMap | None]:
        """The pictures that a report shows, each with its similarity map where maps are wanted."""
        shown = choose_examples(self.pictures, looked.done)
        if "maps" not in self.wanted:
            return dict.fromkeys(shown)
        with inference(loader.vlm.model):
            read = open_lens(loader.vlm, loader) if "lens" in self.wanted else None
            read = None if isinstance(read, str) else read
            maps = similarity_maps(loader.vlm, loader, shown, self.layers, read=read)
        return dict(zip(shown, maps, strict=True))

    def pruned_rows(self, loader: Loader, looked: Look, prunings: Sequence[Pruning]) -> list[Measurement]:
        """What a probe still reads when visual tokens are pruned on the way."""
        if not prunings:
            return []
        pictures = self.pictures
        with inference(loader.vlm.model):
            return pruning_rows(
                loader.vlm,
                loader,
                prunings,
                pictures.labels,
                looked.done,
                looked.per_image,
                seed=self.seed,
                progress=self.progress,
                unlabelled=pictures.unlabelled,
            )

    def information(self, loader: Loader, looked: Look) -> dict[str, Any]:
        """What run.json tells of the model and of the pictures."""
        vlm, seen, accumulator = loader.vlm, loader.seen, looked.accumulator
        labels = self.pictures.labels if "probes" in self.wanted else {}
        rare = {
            "animated images, first frame taken": len(seen.animated),
            "repeated images": self.pictures.repeated,
            "files in formats that are not read": self.pictures.unread,
            "classes left out of probes": sum(len(too_small(values, looked.done)) for values in labels.values()),
        }
        return {
            "versions": versions(),
            "model": {"name": str(getattr(vlm.config, "name_or_path", "")), "fingerprint": fingerprint(vlm.model)},
            "family": vlm.family,
            "depth": vlm.depth,
            "width": vlm.width,
            "prompt": loader.prompt,
            "prompt_sha256": prompt_hash(loader.prompt),
            "seed": self.seed,
            "counts": {
                "images": len(looked.done),
                "skipped images": len(seen.broken),
                "images with objects": accumulator.images_with_objects,
                "objects": accumulator.objects,
                "skipped objects": accumulator.skipped_objects,
                **{name: count for name, count in rare.items() if count},
            },
            "skipped": [seen.broken[index] for index in sorted(seen.broken)][:20],
        }
