"""What the commands share: the terminal, and silence from libraries."""

import sys
import warnings

from rich.console import Console

# Wide enough for the tables where the output goes to a file.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)


def quiet() -> None:
    """Errors only from transformers: its advice about other image back-ends would drown the results."""
    from transformers import logging

    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
