"""`rlhf report RUN [RUN ...]`: one HTML page about a run, half a run or a stage, or about several."""

from __future__ import annotations

from pathlib import Path

from rlhf.base.cli import Parser
from rlhf.base.errors import UserError, run_command
from rlhf.report.compare_page import write_comparison
from rlhf.report.run_page import write_report


def main() -> None:
    """Write the page of one run, or the page that compares runs."""
    parser = Parser(description="Reports of one run or of several.")
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="folder that a run or one of its stages wrote"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="compare the runs on one page, written here")
    parser.add_argument(
        "--registry",
        type=Path,
        metavar="DIR",
        help="where the stages are that a run was made from; default: its option registry",
    )
    parser.add_argument(
        "--force", action="store_true", help="compare runs with different prompts or reward models, and mark the page"
    )
    arguments = parser.parse_args()
    if arguments.output is None and len(arguments.runs) == 1:
        print(write_report(arguments.runs[0], arguments.registry))
        return
    if arguments.output is None:
        raise UserError("several runs need a file for their page: -o FILE, e.g. -o comparison.html")
    print(write_comparison(arguments.runs, arguments.output, registry=arguments.registry, force=arguments.force))


if __name__ == "__main__":
    run_command(main)
