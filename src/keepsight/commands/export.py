"""`keepsight export RUN OUT`."""

import argparse
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> None:
    """Export, and say what lies where."""
    parser = argparse.ArgumentParser(
        prog="keepsight export",
        description="Write what a `keepsight train` run trained to OUT: a checkpoint for plain transformers, without a "
        "trace of PRe's head, and a model card (README.md).",
    )
    parser.add_argument("run", metavar="RUN", help="the run's folder")
    parser.add_argument("out", metavar="OUT", help="a new or empty folder; it is filled whole or not at all")
    parser.add_argument(
        "--lora",
        choices=("merged", "adapter"),
        default="merged",
        help="of a run with LoRA: merged into the weights (the default), or the adapter alone, in PEFT's format",
    )
    parser.add_argument("--unfinished", action="store_true", help="of a run that has not ended, its newest checkpoint")
    values = parser.parse_args(list(arguments) or ["--help"])
    from keepsight.commands.console import console, quiet

    quiet()
    from keepsight.training.export import export

    out = export(values.run, values.out, form=values.lora, unfinished=values.unfinished)
    what = "adapter" if values.lora == "adapter" else "model and processor"
    console.print(f"{what}: {out}", markup=False)
    console.print(f"model card: {out / 'README.md'} (say there what it is for, and under which licence)", markup=False)
