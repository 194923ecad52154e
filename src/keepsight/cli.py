"""The command line: `keepsight COMMAND …`. Each command loads what it needs only when it is called."""

import argparse
import errno
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from keepsight import __version__

# Command → what its help says. The module keepsight.commands.<command> has `main(arguments)`, which returns an exit
# status, or None for 0.
COMMANDS = {
    "demo": "train the tiny testbed model without and with PRe, diagnose both, write one report (minutes, offline)",
    "diagnose": "measure what is left of pictures at every layer of a model; rows, report and configuration",
    "evaluate": "ask a model questions about pictures and score its answers, with intervals; goes on after a kill",
    "attribute": "set skill against what the layers still tell, over a training: one r a run, intervals over seeds",
    "compare": "put runs side by side: differences in pairs, one report, an exit status for pipelines",
    "train": "train a model in LLaVA's two stages from a recipe, with PRe or without",
    "export": "write what a training run trained as a plain transformers checkpoint (or adapter) with a model card",
}
PACKAGE = Path(__file__).resolve().parent
USER_ERRORS = (ValueError, OSError, ImportError, RuntimeError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 where a condition of compare is met, 2 for an error that the user
    can mend, 130 when interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    try:
        if not given or given[0].startswith("-"):
            _parser().parse_args(given or ["--help"])
        elif given[0] not in COMMANDS:
            _parser().error(f"there is no command '{given[0]}'; allowed: {', '.join(COMMANDS)}")
        else:
            status = import_module(f"keepsight.commands.{given[0]}").main(given[1:]) or 0
            if "torch" in sys.modules:
                import_module("keepsight.processes").part()
            return status
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if debug or not is_user_error(error):
            raise
        print(f"keepsight: {_message(error)}", file=sys.stderr)
        return 2
    return 0


def is_user_error(error: Exception) -> bool:
    """Whether an error is about something to mend: raised by keepsight's own code, a full disk, damaged weights.

    A ValueError from the inside of a library is a bug of ours, and keeps its traceback.
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    if _damaged_weights(error):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    ours = bool(frames) and PACKAGE in Path(frames[-1].filename).resolve().parents
    return ours and isinstance(error, USER_ERRORS)


def _damaged_weights(error: Exception) -> bool:
    library = sys.modules.get("safetensors")  # where it was never loaded, it raised nothing
    return library is not None and isinstance(error, library.SafetensorError)


def _message(error: Exception) -> str:
    if _damaged_weights(error):
        return f"a weights file (.safetensors) of the model is cut off or damaged ({error}); download or save it again."
    return str(error)


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="keepsight",
        usage="keepsight COMMAND [options]",
        description="See how much of a picture survives inside a multimodal LLM, and train the model to keep it.",
        epilog=f"commands:\n{listed}\n\nkeepsight COMMAND --help tells more. --debug shows the traceback of an error.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"keepsight {__version__}")
    return parser
