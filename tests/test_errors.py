"""How commands end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("flush", [True, False])  # in the middle of the output, or by the interpreter at the end
def test_output_that_nobody_reads_any_more(tmp_path: Path, flush: bool) -> None:
    """`| head -1` ended in "error: Broken pipe", or in the interpreter's own complaint."""
    (tmp_path / "command.py").write_text(
        "import sys\nfrom rlhf.base.errors import run_command\n"
        f"def main():\n    sys.stdin.read()\n    print('second', flush={flush})\n"
        "run_command(main)\n"
    )
    command = subprocess.Popen(
        [sys.executable, str(tmp_path / "command.py")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert command.stdin and command.stdout and command.stderr
    command.stdout.close()
    command.stdin.close()
    assert (command.stderr.read(), command.wait()) == (b"", 141)
    command.stderr.close()
