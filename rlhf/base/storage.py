"""Writing so that a crash leaves the old or the new, never half of it: beside, to the disk, then renamed into place."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError


def sync(*paths: Path) -> None:
    """Waits until the disk holds these files and folders: after a power cut a renamed folder must not be one of empty files."""
    for path in paths:
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError:
            if not path.is_dir():  # some systems and network drives have no such thing for folders
                raise


def write_text(file: Path, text: str) -> None:
    """Puts a text in place of the file's content, if any."""
    partial = file.with_name(f".partial-{file.name}")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(file)
    sync(file.parent)


def is_failure(error: BaseException) -> bool:
    """Whether the system refused to write or read. safetensors wraps this in its own type; a bare OSError is a library's."""
    if isinstance(error, SafetensorError):
        return "I/O error" in str(error)
    return isinstance(error, OSError) and error.errno is not None


def reason(error: BaseException) -> str:
    """What the system said, in a line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def free(folder: Path) -> str:
    """`1.2 GB free`, of the disk that the folder is or would be on; a drive that is gone cannot be asked."""
    try:
        existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        return f"{shutil.disk_usage(existing).free / 1e9:.2f} GB free"
    except OSError as error:
        return f"its free space is unknown: {reason(error)}"


def sha256_file(path: Path | str) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
