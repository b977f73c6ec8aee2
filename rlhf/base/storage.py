"""Atomic writes: to a file beside the target, synced to the disk, then renamed into place."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from rlhf.base.errors import UserError

STALE_SECONDS = 24 * 3600
"""Age after which a `.partial-*` folder is deleted: its writer was killed, as none pauses for a day."""
_PARTIAL = re.compile(r"\.partial-[0-9a-f]{8}")


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


def copy_plain_files(source: Path, target: Path) -> None:
    """Copy a folder to a new one, except hidden files.

    Raises:
        UserError: it holds a link, a pipe or a device: a copy would contain what they lead to, or never end.
    """
    for path in (source, *source.rglob("*")):
        if not_plain(path):
            raise UserError(f"{path} is a link, a pipe or a device, which no artefact holds; it is not copied")
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(".*"))


def not_plain(path: Path) -> bool:
    """Return True for anything but a file or folder of its own; what is not there counts as plain."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


@contextlib.contextmanager
def partial_folder(parent: Path) -> Iterator[Path]:
    """Context that yields a path for a new folder in `parent`, to be filled and renamed; what is left of it is removed.

    Folders of killed processes are removed, too, once they are `STALE_SECONDS` old.
    """
    for leftover in parent.glob(".partial-*"):
        with contextlib.suppress(FileNotFoundError):  # another process has just renamed it
            if _PARTIAL.fullmatch(leftover.name) and time.time() - leftover.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)
    partial = parent / f".partial-{uuid.uuid4().hex[:8]}"
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
