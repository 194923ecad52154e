"""`keepsight demo`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from jsonargparse import ArgumentParser

from keepsight.settings import add_fields, build, normalise


@dataclass(frozen=True)
class DemoConfig:
    """The demonstration on the testbed.

    Attributes:
        full: train longer.
        out: the folder for both runs and the report.
        seed: of data, training and splits.
        steps: optimizer steps of the second stage; null = as `full` says.
        language: the tiny language model, "llama" or "qwen2".
        overwrite: replace the demonstration that the folder holds.
    """

    full: bool = False
    out: str = "runs/demo"
    seed: int = 0
    steps: int | None = None
    language: Literal["llama", "qwen2"] = "llama"
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps is {self.steps}; allowed: 1 or more.")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; allowed: 0 or more.")


def parse(arguments: Sequence[str]) -> DemoConfig:
    """The command's settings."""
    parser = ArgumentParser(
        prog="keepsight demo",
        usage="keepsight demo [--full] [--out DIR] [--seed N] [--steps N] [--language llama|qwen2] [--overwrite]",
        description="Train the tiny testbed model without and with PRe, diagnose both, write one report.",
    )
    add_fields(parser, DemoConfig)
    if arguments and not arguments[0].startswith("-"):
        parser.error(f"demo takes options only; got '{arguments[0]}' (a folder is given with --out DIR)")
    return build(DemoConfig, parser.parse_args(normalise(arguments, DemoConfig)))


def main(arguments: Sequence[str]) -> None:
    """Run the demonstration."""
    config = parse(arguments)
    from keepsight.commands.console import console, quiet

    quiet()
    from keepsight.testbed.demo import run

    run(**asdict(config), console=console)
