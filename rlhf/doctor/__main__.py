"""`rlhf doctor RUN`: diagnosis of a run; exit code 0 for no findings, 1 for findings, 2 for a user's error.

`rlhf doctor preflight --config FILE`: checks of a run before it starts.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rlhf.base.errors import UserError, did_you_mean, run_command
from rlhf.doctor import diagnosis

PREFLIGHT = "preflight"


def main() -> None:
    """Run the command line."""
    words = sys.argv[1:]
    if words[:1] == [PREFLIGHT]:
        from rlhf.doctor.preflight import command  # imports torch

        sys.argv = [f"{sys.argv[0]} {PREFLIGHT}", *words[1:]]
        command.main()
        return
    if words and not Path(words[0]).exists() and (near := did_you_mean(words[0], [PREFLIGHT])):
        raise UserError(f"no run '{words[0]}'{near}")
    sys.exit(diagnosis.main(words))


if __name__ == "__main__":
    run_command(main)
