"""Files that are either whole or not there.

Everything is written to a temporary file in the target's own folder, flushed to the disk and then renamed, so
that a full disk or a killed process never leaves half a file under the final name.
"""

import errno
import json
import os
import re
import secrets
from pathlib import Path
from typing import Any

HALF = re.compile(r"\..+\.[0-9a-f]{8}\.part")  # name of a file while `write_file` writes it


class StorageError(OSError):
    """A result could not be written; the text names the path and says what to do. `errno` is the system's."""


_ADVICE = {
    errno.ENOSPC: "the disk is full: free some space, or choose an output folder on another disk",
    errno.EDQUOT: "the disk quota is used up: free some space, or choose an output folder on another disk",
    errno.EFBIG: "the file-size limit is reached: raise it (ulimit -f), or choose another output folder",
    errno.EACCES: "the folder may not be written to: change its permissions, or choose another output folder",
    errno.EPERM: "the folder may not be written to: change its permissions, or choose another output folder",
    errno.EROFS: "the file system is read-only: choose another output folder",
    errno.ENOENT: "the folder does not exist: create it, or choose another output folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder: choose another output folder",
    errno.EISDIR: "a folder is in the way: choose another name",
}

_OUT_OF_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def storage_error(path: Path, cause: OSError) -> StorageError:
    """The clear form of a failed write to `path`."""
    reason = _ADVICE.get(cause.errno or 0, f"{cause.strerror or cause}: choose another output folder")
    error = StorageError(f"cannot write '{path}': {reason}. No part of this file was kept.")
    error.errno = cause.errno
    return error


def disk_error(path: Path, cause: Exception) -> StorageError | None:
    """The clear form of an error that says that the disk took no more, whatever library met it; None for another."""
    if isinstance(cause, StorageError):
        return cause
    if isinstance(cause, OSError) and cause.errno in _OUT_OF_ROOM:
        return storage_error(path, cause)
    for number in _OUT_OF_ROOM:
        if f"os error {number}" in str(cause):  # safetensors keeps the number in the text only
            return storage_error(path, OSError(number, os.strerror(number)))
    # torch.save keeps none at all; where closing the file fails too, its text only tells two places in the file.
    text = str(cause)
    cut = "PytorchStreamWriter failed" in text or ("inline_container" in text and "unexpected pos" in text)
    if isinstance(cause, RuntimeError) and cut:
        return storage_error(path, OSError(errno.EIO, f"{os.strerror(errno.EIO)}; the disk may be full"))
    return None


def write_file(path: str | Path, content: str | bytes) -> Path:
    """Write `content` to `path` in one step, text as UTF-8.

    A file that was there stays until the new one is whole.

    Raises:
        StorageError: if the disk is full, the folder is missing or may not be written to.
    """
    path = Path(path)
    payload = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with temporary.open("xb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as cause:
        raise storage_error(path, cause) from cause
    finally:
        temporary.unlink(missing_ok=True)
    return path


def make_folder(path: str | Path) -> Path:
    """Create `path` and its parents where they are missing.

    Raises:
        StorageError: if that is not possible.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        if cause.errno == errno.EEXIST:  # a file of that name
            cause = NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        raise storage_error(path, cause) from cause
    return path


def to_json(value: Any) -> str:
    """Indented JSON of plain values; numbers that are not finite are refused."""
    try:
        return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except TypeError as error:
        raise TypeError(f"run.json takes plain values (text, numbers, lists, dictionaries): {error}") from error
