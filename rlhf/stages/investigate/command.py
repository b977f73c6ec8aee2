"""`rlhf doctor investigate RUN`: experiments with the models of a run."""

from __future__ import annotations

import sys

from rlhf.base.cli import Parser
from rlhf.base.errors import run_command

MINUTES = 5.0


def main() -> None:
    """Run the command line; exit code 0 if no cause was confirmed, else 1."""
    parser = Parser(
        description="Run small experiments with the models of a run, to tell apart causes that look alike in its log.",
        epilog="The experiments are listed in docs/doctor.md.",
    )
    parser.add_argument(
        "run", help="folder of a run or of one of its stages, or an artefact: ppo/NAME, ppo/NAME@VERSION"
    )
    parser.add_argument("--registry", help="folder of the model registry; default: that of the run")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="most time; what does not fit is named")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="run these experiments, and no others")
    arguments = parser.parse_args()
    from rlhf.stages.investigate import examine  # imports torch

    sys.exit(int(any(statement.is_finding for statement in examine.examine(arguments))))


if __name__ == "__main__":
    run_command(main)
