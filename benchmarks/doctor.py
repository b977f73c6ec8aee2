"""Does a doctor find what is wrong, and leave alone what is not? `python benchmarks/doctor.py`

Known faults, faults held out and clean runs (`faults/`) are made in `--folder`, where finished ones are found again, so it can be
run in parts (`--only NAME ...`), and by several processes (`--jobs`). For each run: what refused it, what the live checks
said, and what the diagnosis says afterwards. The folder of a run keeps its logs, statements, right answer and verdict.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import common
import yaml
from faults import rivals
from faults.cases import Case, cases
from faults.run import Bench, findings
from faults.score import GROUPS, judge, summarise, tables, write_tables
from faults.tuned import OVEROPTIMISED


def main() -> None:
    """Make the runs of the command line, and judge all that there are."""
    given = arguments()
    every = cases()
    if given.list:
        print("\n".join(f"{case.name}  ({case.group}, {case.stage})" for case in every))
        return
    chosen = [case for case in every if not given.only or case.name in given.only or case.group in given.only]
    options = {name: yaml.safe_load(value) for name, _, value in (word.partition("=") for word in given.set)}
    bench = Bench(given.folder, updates=given.updates, pretraining=given.pretraining, options=options)
    if given.make_only:
        make(bench, chosen, given.investigate)
        return
    left = [case for case in chosen if bench.result(case) is None or given.investigate]
    for seed in dict.fromkeys(case.hash_seed for case in left):
        command = [sys.executable, str(Path(__file__)), *sys.argv[1:], "--make_only"]
        environment = {**os.environ, "PYTHONHASHSEED": str(seed), "OMP_NUM_THREADS": "1"}
        workers = [subprocess.Popen(command, env=environment) for _ in range(given.jobs)]
        if failed := [worker.returncode for worker in workers if worker.wait()]:
            sys.exit(failed[0])
    made = [case for case in every if bench.result(case) is not None]
    if given.again:
        for case in made:
            bench.diagnose_again(case)
    rows = [row for case in made if (row := bench.result(case)) is not None]
    rows += [finished(folder, group="clean") for folder in given.finished]
    rows += [finished(folder, group="tuned") for folder in given.overoptimised]
    summary = {"machine": common.machine("cpu"), "updates": given.updates, **summarise(rows)}
    if given.rivals:
        summary["rivals"] = rivals.score(rows, given.folder / "runs", given.rivals)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(summary, indent=1) + "\n")
    if given.page is not None:
        write_tables(given.page, summary)
    print(tables(summary))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help=f"these runs or groups (clean, {', '.join(GROUPS)})"
    )
    parser.add_argument("--list", action="store_true", help="list the runs and stop")
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs/faults"), help="where the runs go, and are found again"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes that make runs")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="OPTION=VALUE", help="options of all stages, YAML values"
    )
    parser.add_argument("--updates", type=int, default=30, help="updates of a PPO run")
    parser.add_argument("--pretraining", type=int, default=600, help="updates of the base models")
    parser.add_argument(
        "--investigate",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="experiments for so long on each run that is unclear",
    )
    parser.add_argument("--again", action="store_true", help="diagnose finished runs again")
    parser.add_argument(
        "--finished", nargs="+", default=[], type=Path, metavar="RUN", help="sound runs that were made elsewhere"
    )
    parser.add_argument(
        "--overoptimised", nargs="+", default=[], type=Path, metavar="RUN", help="runs of configs/demo_overoptimised"
    )
    parser.add_argument("--rivals", type=Path, metavar="FOLDER", help="other tools, installed there (README.md)")
    parser.add_argument("--page", type=Path, help="page that gets the tables, between its marks")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "faults.json")
    parser.add_argument("--make_only", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    known = {name for case in cases() for name in (case.name, case.group)}
    if unknown := [name for name in given.only if name not in known]:
        parser.error(f"no run {', '.join(unknown)}; --list shows the names")
    return given


def make(bench: Bench, chosen: Iterable[Case], seconds: float) -> None:
    """Make the runs of this process's hash seed, and investigate them for so many seconds each."""
    for case in chosen:
        if str(case.hash_seed) != os.environ.get("PYTHONHASHSEED"):
            continue
        if bench.result(case) is None and (row := bench.run(case)) is not None:
            print(f"{case.name}: {judge(row)['named']} ({row['seconds']:.0f} s)", flush=True)
        if seconds and bench.result(case) is not None:
            bench.investigate(case, seconds)


def finished(folder: Path, *, group: str) -> dict[str, object]:
    """Return the row of a run that was made elsewhere; all of its stages count as one run."""
    fault = OVEROPTIMISED if group == "tuned" else None
    case = Case(name=fault.name if fault else folder.name, group=group, size="demo", seed=0, stage="ppo", fault=fault)
    return {**case.answer(), "refused": None, "live": [], "findings": findings(folder), "seconds": 0.0}


if __name__ == "__main__":
    common.start(main, {})
