"""`python -m rlhf.doctor RUN`: what was wrong with a run; exit code 0 for nothing, 1 for findings, 2 for a user's error."""

from __future__ import annotations

import sys

from rlhf.doctor import diagnosis
from rlhf.errors import run_command


def main() -> None:
    """Command line."""
    sys.exit(diagnosis.main(sys.argv[1:]))


if __name__ == "__main__":
    run_command(main)
