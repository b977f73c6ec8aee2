"""`rlhf doctor RUN`: diagnosis of a run; exit code 0 for no findings, 1 for findings, 2 for a user's error.

`rlhf doctor FILE` is the same for the log of another project's run, `rlhf doctor preflight --config FILE` checks a run
before it starts, `rlhf doctor options --config FILE` explains its unusual options, `rlhf doctor audit RUN` recomputes a sample
of what a run computed, and `rlhf doctor investigate RUN` experiments with its models.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from rlhf.base.errors import UserError, did_you_mean, run_command
from rlhf.doctor import diagnosis
from rlhf.doctor.foreign import command as foreign
from rlhf.doctor.foreign import reading

PREFLIGHT, OPTIONS, AUDIT, INVESTIGATE = "preflight", "options", "audit", "investigate"


def main() -> None:
    """Run the command line."""
    words = sys.argv[1:]
    if words[:1] == [PREFLIGHT]:
        from rlhf.doctor.preflight import command  # imports torch

        sys.argv = [f"{sys.argv[0]} {PREFLIGHT}", *words[1:]]
        command.main()
        return
    if words[:1] == [OPTIONS]:
        from rlhf.doctor.review import command as options

        sys.exit(options.main(words[1:]))
    if words[:1] == [AUDIT]:
        from rlhf.doctor.audit import command as audit  # imports torch

        sys.exit(audit.main(words[1:]))
    if words[:1] == [INVESTIGATE]:  # builds models as the stages do, so it lies among them
        sys.argv = [f"{sys.argv[0]} {INVESTIGATE}", *words[1:]]
        importlib.import_module(f"rlhf.stages.{INVESTIGATE}.command").main()
        return
    if words and reading.is_foreign(Path(words[0])):
        sys.exit(foreign.main(words))
    if (
        words
        and not Path(words[0]).exists()
        and (near := did_you_mean(words[0], [PREFLIGHT, OPTIONS, AUDIT, INVESTIGATE]))
    ):
        raise UserError(f"no run '{words[0]}'{near}")
    sys.exit(diagnosis.main(words))


if __name__ == "__main__":
    run_command(main)
