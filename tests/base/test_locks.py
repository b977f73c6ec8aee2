"""Locks between processes: one holder, who is named, and who frees it however it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf.base import locks
from rlhf.base.errors import UserError
from rlhf.base.locks import exclusive

HOLD = """
import sys, time
from pathlib import Path
from rlhf.base.locks import exclusive
with exclusive(Path(sys.argv[1]), "the shelf"):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / ".lock"


@pytest.fixture
def holder(file: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock for so many seconds."""
    command = [sys.executable, "-c", HOLD, str(file), str(request.param)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.parametrize("holder", [60], indirect=True)
def test_the_second_is_refused_and_told_which_process_holds_it(file: Path, holder: subprocess.Popen[str]) -> None:
    """Catches: two processes inside at once, and a message that leaves the user to search for the other one."""
    start = time.monotonic()
    message = rf"^the shelf is in use by process {holder.pid} on .+ since 20.+\(.*\); wait"
    with pytest.raises(UserError, match=message), exclusive(file, "the shelf", wait=0.2):
        raise AssertionError("inside beside another process")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("holder", [60], indirect=True)
def test_waiting_is_said_and_ends(
    file: Path, holder: subprocess.Popen[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: a command that hangs without a word, and one that waits for ever."""
    monkeypatch.setattr(locks, "PATIENCE", 0.1)
    with pytest.raises(UserError, match="in use"), exclusive(file, "the shelf", wait=0.5):
        pass
    assert f"the shelf is in use by process {holder.pid}" in capsys.readouterr().err


@pytest.mark.parametrize("holder", [0.5], indirect=True)
def test_whoever_waits_long_enough_gets_it(file: Path, holder: subprocess.Popen[str]) -> None:
    """Catches: a lock that is given up although its holder has left it."""
    with exclusive(file, "the shelf", wait=30):
        assert holder.wait(10) == 0


@pytest.mark.parametrize("holder", [60], indirect=True)
def test_a_killed_holder_frees_it(file: Path, holder: subprocess.Popen[str]) -> None:
    """Catches: a lock file that outlives its process, so that a user has to find and delete it."""
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with exclusive(file, "the shelf", wait=5):
        pass


def test_it_can_be_held_again_after_an_error(file: Path) -> None:
    """Catches: a lock kept by an exception."""
    with pytest.raises(ZeroDivisionError), exclusive(file, "the shelf", wait=0):
        raise ZeroDivisionError
    with exclusive(file, "the shelf", wait=0):
        pass


def test_a_holder_that_cannot_be_read_is_another_process(file: Path) -> None:
    """Catches: a traceback while the message about a busy lock is made."""
    with exclusive(file, "the shelf", wait=0):
        (file.parent / ".lock.holder").write_text("half a li")
        with pytest.raises(UserError, match="in use by another process"), exclusive(file, "the shelf", wait=0):
            pass
