"""A run in memory; what the report reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from keepsight.results.answers import AnswerRecord
from keepsight.results.examples import Example
from keepsight.results.measurement import Measurement
from keepsight.results.per_image import PerImage
from keepsight.results.points import Point
from keepsight.results.thumbnails import Thumbnails


@dataclass(frozen=True)
class LoadedRun:
    """A run with everything that its folder holds for the report."""

    label: str
    rows: Sequence[Measurement]
    info: Mapping[str, Any] = field(default_factory=dict)  # the content of run.json
    config: str = ""  # YAML
    examples: Sequence[Example] = ()
    per_image: PerImage | None = None
    answers: Sequence[AnswerRecord] = ()
    thumbnails: Thumbnails | None = None  # of the pictures that the answers are about
    points: Sequence[Point] = ()  # of an attribution's trainings

    @property
    def seeds(self) -> list[int]:
        """The seeds behind the numbers: `seeds` of run.json (none if they are not known), else those of the rows, else
        its `seed`."""
        listed = self.info.get("seeds")
        if listed is None:
            listed = {row.seed for row in self.rows if row.seed is not None}
            if not listed and self.info.get("seed") is not None:
                listed = [self.info["seed"]]
        return sorted(listed)
