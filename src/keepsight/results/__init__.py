"""Measurements and the folders that hold them. Depends on nothing else in the package."""

from keepsight.results.measurement import Measurement, read_rows, write_rows
from keepsight.results.provenance import command_line, fingerprint, prompt_hash, versions
from keepsight.results.run import RUN_FILE, Example, LoadedRun, RunDirectory
from keepsight.results.staging import staged_folder
from keepsight.results.storage import StorageError, make_folder, write_file

__all__ = [
    "RUN_FILE",
    "Example",
    "LoadedRun",
    "Measurement",
    "RunDirectory",
    "StorageError",
    "command_line",
    "fingerprint",
    "make_folder",
    "prompt_hash",
    "read_rows",
    "staged_folder",
    "versions",
    "write_file",
    "write_rows",
]
