"""Measurements and the folders that hold them. Depends on nothing else in the package."""

from keepsight.results.answers import AnswerRecord
from keepsight.results.examples import Example
from keepsight.results.frame import frame
from keepsight.results.layout import RUN_FILE
from keepsight.results.loaded import LoadedRun
from keepsight.results.maps import SimilarityMap
from keepsight.results.measurement import Key, Measurement, read_rows, write_rows
from keepsight.results.per_image import PerImage, PerImageBuilder, merged
from keepsight.results.points import Point
from keepsight.results.provenance import command_line, fingerprint, prompt_hash, versions
from keepsight.results.run import RunDirectory
from keepsight.results.staging import staged_folder
from keepsight.results.storage import StorageError, make_folder, write_file

__all__ = [
    "RUN_FILE",
    "AnswerRecord",
    "Example",
    "Key",
    "LoadedRun",
    "Measurement",
    "PerImage",
    "PerImageBuilder",
    "Point",
    "RunDirectory",
    "SimilarityMap",
    "StorageError",
    "command_line",
    "fingerprint",
    "frame",
    "make_folder",
    "merged",
    "prompt_hash",
    "read_rows",
    "staged_folder",
    "versions",
    "write_file",
    "write_rows",
]
