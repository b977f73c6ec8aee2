"""Atomic writes: to a file beside the target, synced to the disk, then renamed into place."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError


def sync(*paths: Path) -> None:
    """Wait until files and folders are on the disk; otherwise a power cut can leave a renamed folder with empty files."""
    for path in paths:
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError:
            if not path.is_dir():  # some systems and network drives cannot sync folders
                raise


def write_text(file: Path, text: str) -> None:
    """Write a text to a file, atomically replacing its content."""
    partial = file.with_name(f".partial-{file.name}")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(file)
    sync(file.parent)


def is_failure(error: BaseException) -> bool:
    """Return True if the system refused to write or read.

    safetensors wraps such errors in its own type; an OSError without a number comes from a library.
    """
    if isinstance(error, SafetensorError):
        return "I/O error" in str(error)
    return isinstance(error, OSError) and error.errno is not None


def reason(error: BaseException) -> str:
    """Return the system's reason for an error, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def free(folder: Path) -> str:
    """Return `1.20 GB free` for the disk of a folder, which need not exist; drives can be gone, too."""
    try:
        existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        return f"{shutil.disk_usage(existing).free / 1e9:.2f} GB free"
    except OSError as error:
        return f"its free space is unknown: {reason(error)}"


def sha256_file(path: Path | str) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
