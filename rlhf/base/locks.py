"""Locks between processes, held while their holder lives: the system frees them, however it ends."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from rlhf.base.errors import UserError
from rlhf.base.json_files import read_object_or_none
from rlhf.base.redaction import redact

PATIENCE = 2.0
"""Seconds of waiting after which the user is told what is waited for."""


@contextlib.contextmanager
def exclusive(file: Path, name: str, *, wait: float = 600.0) -> Iterator[None]:
    """Context that at most one process is in at a time, for each lock file; its folder must exist.

    Args:
        name: what is locked, in messages.
        wait: seconds until it gives up.

    Raises:
        UserError: another process held the lock all the time; the message names that process.
    """
    lock, holder = FileLock(file), file.with_name(f"{file.name}.holder")
    try:
        lock.acquire(timeout=min(wait, PATIENCE))
    except Timeout:
        if wait > PATIENCE:
            print(
                f"{name} is in use by {_describe(holder)}; waiting for it, {wait:.0f} s at most",
                file=sys.stderr,
                flush=True,
            )
        try:
            lock.acquire(timeout=max(wait - PATIENCE, 0))
        except Timeout:
            raise UserError(
                f"{name} is in use by {_describe(holder)}; wait until that process has ended or stop it, then run again"
            ) from None
    try:
        with contextlib.suppress(OSError):  # a full disk: the lock holds, only the message to others has less to say
            holder.write_text(json.dumps(_this_process()), encoding="utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):
            holder.unlink(missing_ok=True)
        lock.release()


def _this_process() -> dict[str, str | int]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": redact(shlex.join(sys.argv))[:200],
    }


def _describe(holder: Path) -> str:
    record = read_object_or_none(holder) or {}
    if not isinstance(record.get("pid"), int):
        return "another process"
    return f"process {record['pid']} on {record.get('host')} since {record.get('since')} ({record.get('command')})"
