"""What `diagnose` returns: rows, what made them, and a few of the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keepsight.results import Example, LoadedRun, Measurement, PerImage, RunDirectory, frame


@dataclass(frozen=True)
class Diagnosis:
    """The numbers of one model on one set of pictures.

    rows: the measurements; info: what made them (label, model, depth, prompt, seed, counts, …); config: the arguments;
    examples: a few of the pictures, for the report; per_image: what each picture adds to each number.
    """

    rows: list[Measurement]
    info: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)
    per_image: PerImage | None = None

    def table(self) -> Any:
        """A rich table of the rows."""
        from keepsight.report import table

        return table(self.rows)

    def report(self, path: str | Path) -> Path:
        """Write one HTML file."""
        from keepsight.report import build

        return build([self._loaded()], Path(path))

    def figures(
        self, *, metrics: Sequence[str] | None = None, variant: str | None = None, tokens: str = "all"
    ) -> dict[str, Any]:
        """The report's curves as Matplotlib figures: metric, or "metric, target", → `matplotlib.figure.Figure`.

        Args:
            metrics: only these.
            variant, tokens: such as "raw" and "without sinks", where a metric has them.

        Raises:
            ImportError: Matplotlib is not installed.
            ValueError: a metric of `metrics` has no curve.
        """
        from keepsight.report import figures

        return figures([self._loaded()], metrics=metrics, variant=variant, tokens=tokens)

    def frame(self) -> Any:
        """The rows as a pandas DataFrame.

        Raises:
            ImportError: pandas is not installed.
        """
        return frame(self.rows)

    def _loaded(self) -> LoadedRun:
        return LoadedRun(self.info["label"], self.rows, self.info, "", self.examples, self.per_image)

    def save(
        self, run_directory: str | Path, *, overwrite: bool = False, config: Any = None, report: bool = False
    ) -> RunDirectory:
        """Write rows, run metadata, configuration and example pictures: all of them or, where one fails, none.

        Args:
            overwrite: replace the diagnosis that the folder holds; it stays whole until the new one is.
            config: written to config.yaml in place of the arguments, a dataclass or a mapping.
            report: write report.html as well.

        Raises:
            FileExistsError: the folder holds a run already and `overwrite` is off, or a training's run.
            StorageError: it cannot be written.
        """
        model = self.info["model"]
        kept = (
            "depth",
            "width",
            "pre_layer",
            "prompt",
            "seed",
            "counts",
            "targets",
            "command",
            "family",
            "skipped",
            "training_seed",
        )
        known = {name: self.info[name] for name in kept if name in self.info}
        with RunDirectory.staged(
            run_directory,
            kind="diagnosis",
            label=self.info["label"],
            model=model["name"],
            fingerprint=model["fingerprint"],
            overwrite=overwrite,
            **known,
        ) as run:
            run.write_rows(self.rows)
            run.write_config(self.config if config is None else config)
            run.write_examples(self.examples)
            if self.per_image is not None:
                run.write_per_image(self.per_image)
            if report:
                from keepsight.report import build

                build([run], run.path / "report.html")
        return run
