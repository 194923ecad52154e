"""What the commands share: the terminal, and silence from libraries."""

import warnings

from rich.console import Console

console = Console(highlight=False)


def quiet() -> None:
    """Errors only from transformers: its advice about other image back-ends would drown the results."""
    from transformers import logging

    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
