"""`rlhf migrate FILE`: a config of TRL, LLaMA-Factory or ms-swift becomes one of our stages."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from rlhf.base.cli import Parser
from rlhf.base.errors import UserError, run_command
from rlhf.config import STAGE_CONFIGS
from rlhf.migration.conversion import Converted, as_yaml, convert, left_lines
from rlhf.migration.reading import PROJECTS, read_config
from rlhf.migration.rules import Project


def build_parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser(
        description="Turn a config of TRL (PPO of 0.7 to 1.12, SFT and reward models), LLaMA-Factory or ms-swift into one of "
        "rlhf: each option is taken over, or named with the reason why not (docs/migrating.md). Nothing in the file is run."
    )
    parser.add_argument(
        "file", type=Path, nargs="?", metavar="FILE", help="shell script with the command, YAML, JSON, or Python script"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="folder for STAGE.yaml; default: migrated-NAME, by FILE"
    )
    parser.add_argument("--stage", choices=("sft", "reward", "ppo"), help="stage of a file that does not say it")
    parser.add_argument("--project", choices=PROJECTS, help="project of a file that does not show it")
    parser.add_argument("--table", action="store_true", help="print what becomes what, as Markdown; no FILE is read")
    parser.add_argument(
        "--own", nargs="+", default=(), metavar="NAME", help="options of your own script, to be left out"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    arguments = build_parser().parse_args(argv)
    if arguments.table:
        print(option_table())
        return
    if arguments.file is None:
        raise UserError("give the FILE to migrate: a shell script, YAML, JSON or Python (see rlhf migrate --help)")
    project, stage, options = read_config(arguments.file, arguments.stage, arguments.project, arguments.own)
    name = arguments.file.stem
    converted = convert(project, stage, options, name)
    folder = arguments.output or Path(f"migrated-{name}")
    target = folder / f"{stage}.yaml"
    if target.exists():
        raise UserError(f"{target} exists; give another --output, or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    target.write_text(as_yaml(converted, arguments.file.name), encoding="utf-8")
    print_result(converted, target)


def print_result(converted: Converted, target: Path) -> None:
    """Print what became of the options, and the next commands."""
    print(f"{target}: {len(converted.lines)} options from a config of {converted.project.name}")
    for title, lines in (
        ("not taken over", list(left_lines(converted.left))),
        ("to be given", [f"{line.option}: {line.origin}" for line in converted.missing]),
        ("to be mended", [converted.problem] if converted.problem else []),
        (
            "first",
            [command for line in converted.lines for command in re.findall("rlhf registry import .+", line.origin)],
        ),
    ):
        if lines:
            print(f"{title}:")
            print("\n".join(f"  {line}" for line in lines))
    print(f"then: rlhf {converted.stage} --config {shlex.quote(str(target))}")


def option_table() -> str:
    """Return a Markdown table of our options and those of each project that become them, for all stages together."""
    lines = ["| here | " + " | ".join(project.name for project in PROJECTS.values()) + " |", "|---" * 5 + "|"]
    for option in dict.fromkeys(name for kind in STAGE_CONFIGS.values() for name in kind.__dataclass_fields__):
        cells = [", ".join(f"`{name}`" for name in sorted(names_of(project, option))) for project in PROJECTS.values()]
        if any(cells):
            lines.append(f"| `{option}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def names_of(project: Project, option: str) -> set[str]:
    """Return the options of a project that one of ours is made from, in any stage."""
    rules = (item for kind in project.stages.values() for item in kind.rules.items())
    return {name for name, rule in rules if option in rule.option.split(", ")}


if __name__ == "__main__":
    run_command(main)
