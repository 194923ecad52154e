"""What `diagnose` returns: rows, what made them, and a few of the pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keepsight.results import Example, LoadedRun, Measurement, RunDirectory


@dataclass(frozen=True)
class Diagnosis:
    """The numbers of one model on one set of pictures.

    rows: the measurements; info: what made them (label, model, depth, prompt, seed, counts, …); config: the arguments;
    examples: a few of the pictures, for the report.
    """

    rows: list[Measurement]
    info: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)

    def table(self) -> Any:
        """A rich table of the rows."""
        from keepsight.report import table

        return table(self.rows)

    def report(self, path: str | Path) -> Path:
        """Write one HTML file."""
        from keepsight.report import build

        return build([LoadedRun(self.info["label"], self.rows, self.info, "", self.examples)], Path(path))

    def save(self, run_directory: str | Path, *, overwrite: bool = False) -> RunDirectory:
        """Write rows, run metadata, configuration and example pictures.

        Raises:
            FileExistsError: the folder holds a run already and `overwrite` is off.
            StorageError: it cannot be written.
        """
        model = self.info["model"]
        kept = ("depth", "width", "pre_layer", "prompt", "seed", "counts", "targets", "command", "family", "skipped")
        known = {name: self.info[name] for name in kept if name in self.info}
        run = RunDirectory.create(
            run_directory,
            label=self.info["label"],
            model=model["name"],
            fingerprint=model["fingerprint"],
            overwrite=overwrite,
            **known,
        )
        run.write_rows(self.rows)
        run.write_config(self.config)
        run.write_examples(self.examples)
        return run
