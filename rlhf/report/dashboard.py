"""A saved W&B workspace in which runs are compared: `python -m rlhf.tracking dashboard --project NAME`

Panels for every metric of the three stages over axes that mean the same in each run, the reward model's report card, the
reward-KL frontier, the figures that tell a run's health, and the samples; runs grouped by pipeline and stage.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.base.cli import Parser
from rlhf.base.errors import UserError, run_command
from rlhf.base.json_files import decode
from rlhf.run.metrics import METRICS
from rlhf.run.tracker import EPISODES, UPDATES
from rlhf.run.wandb_link import has_wandb_key

#: What is looked at first, and what tells whether a run is healthy; the rest stands under the name of its family.
FIRST = ("objective/score", "objective/kl", "objective/rlhf_reward", "response/length")
HEALTH = (
    "objective/kl_full",
    "objective/entropy",
    "objective/score_std",
    "response/stop_rate",
    "response/distinct_2",
    "ppo/clipfrac",
    "ppo/ratio_max",
    "ppo/first_ratio_error",
    "ppo/explained_variance",
    "rollout/logprob_gap",
)
SUPERVISED = {
    "SFT": ("sft/loss", "sft/eval_loss", "sft/token_accuracy", "sft/grad_norm", "sft/lr"),
    "Reward model": ("reward/loss", "reward/eval_loss", "reward/accuracy", "reward/eval_accuracy", "reward/margin"),
}
CARD = ("card/accuracy", "card/accuracy_held_out_raters", "card/human_ceiling")
TABLES = ("card/accuracies", "card/probes", "card/flags")


def workspace(entity: str, project: str, name: str, groups: Sequence[str] = ()) -> Any:
    """The workspace, a `wandb_workspaces.workspaces.Workspace`; nothing is sent.

    Args:
        groups: show the runs of these pipelines only; default: all.
    """
    import wandb_workspaces.expr as expr
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    def lines(metrics: Sequence[str], axis: str) -> list[Any]:
        return [wr.LinePlot(title=metric, x=axis, y=[metric]) for metric in metrics]

    def table(key: str) -> Any:
        return wr.WeavePanelSummaryTable(table_name=key)

    rest = [metric for metric in METRICS if metric not in (*FIRST, *HEALTH)]
    sections = [
        ("Outcome", [*lines(FIRST, EPISODES), wr.RunComparer(diff_only="split")]),
        ("Frontier", [_frontier(wr), table("frontier/score_table")]),
        ("Reward report card", [*(wr.ScalarChart(metric=m, title=m) for m in CARD), *map(table, TABLES)]),
        ("Health", lines(HEALTH, EPISODES)),
        ("Samples", [table("ppo/samples")]),
        *((title, lines(metrics, UPDATES)) for title, metrics in SUPERVISED.items()),
        ("PPO", lines(rest, EPISODES)),
    ]
    opened = ("Outcome", "Frontier", "Reward report card", "Health", "Samples")
    filters = expr.And(expr.Metric("Group").isin(list(groups))) if groups else ""
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[ws.Section(name=title, panels=panels, is_open=title in opened) for title, panels in sections],
        settings=ws.WorkspaceSettings(x_axis=EPISODES),
        runset_settings=ws.RunsetSettings(
            filters=filters,
            groupby=[expr.Metric("Group"), expr.Metric("JobType")],
            pinned_columns=[
                "summary:objective/score",
                "summary:objective/kl",
                "config:learning_rate",
                "config:kl_coef",
            ],
        ),
    )


def _frontier(wr: Any) -> Any:
    """The last score of each run over its last KL."""
    score, kl = (wr.SummaryMetric(name) for name in ("objective/score", "objective/kl_full"))
    return wr.ScatterPlot(title="Score over KL, last update", x=kl, y=score)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = Parser(description="Compare runs in W&B.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="dashboard")
    command = commands.add_parser("dashboard", help="save a workspace that compares runs")
    command.add_argument("--project", default="rlhf", help="W&B project; default: rlhf")
    command.add_argument("--entity", default=os.environ.get("WANDB_ENTITY"), help="user or team; default: WANDB_ENTITY")
    command.add_argument("--name", default="Runs compared", help="of the workspace")
    command.add_argument("--group", nargs="*", default=[], metavar="GROUP", help="only runs of these pipelines")
    command.add_argument(
        "--output", type=Path, metavar="FILE", help="write the workspace here, as JSON, and send nothing"
    )
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if arguments.output is None and not has_wandb_key():
        raise UserError(
            "a workspace is kept by the W&B server, and there is no key; run `wandb login`, or give --output FILE"
        )
    if not arguments.entity:
        raise UserError("say whose project it is: --entity NAME, a W&B user or team")
    made = workspace(arguments.entity, arguments.project, arguments.name, arguments.group)
    if arguments.output is not None:
        arguments.output.write_text(
            json.dumps(decode(made._to_model().model_dump_json(by_alias=True)), indent=1), encoding="utf-8"
        )
        print(arguments.output)
        return
    print(made.save().url)


if __name__ == "__main__":
    run_command(main)
