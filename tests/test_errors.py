"""How commands end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.base.cli import Parser
from rlhf.base.errors import UserError


@pytest.mark.parametrize("flush", [True, False])  # in the middle of the output, or by the interpreter at the end
def test_output_that_nobody_reads_any_more(tmp_path: Path, flush: bool) -> None:
    """`| head -1` ended in "error: Broken pipe", or in the interpreter's own complaint."""
    (tmp_path / "command.py").write_text(
        "import sys\nfrom rlhf.base.errors import run_command\n"
        f"def main():\n    sys.stdin.read()\n    print('second ' * 10_000, flush={flush})\n    print('third', flush={flush})\n"
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


def test_parser_raises_in_one_line() -> None:
    """argparse prints the whole usage, and takes --out for --output."""
    parser = Parser(prog="rlhf report")
    parser.add_subparsers().add_parser("one").add_argument("--output")
    for words in (["one", "--out", "x"], ["two"], ["--none"]):
        with pytest.raises(
            UserError, match=rf"{words[-2] if len(words) > 2 else words[-1]}.*\(see rlhf report.* --help\)"
        ):
            parser.parse_args(words)


def test_parser_names_the_command(tmp_path: Path) -> None:
    """`python -m rlhf.registry` called itself `__main__.py`."""
    done = subprocess.run(
        [sys.executable, "-m", "rlhf.registry", "--none"], capture_output=True, text=True, timeout=60, cwd=tmp_path,
        env={"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.endswith("(see python -m rlhf.registry --help)\n")
