"""A saved W&B workspace in which runs are compared: `rlhf tracking dashboard --project NAME`

It has panels for every metric over axes that mean the same in each run, the reward model's report card, the reward-KL frontier,
and the samples. Runs are grouped by pipeline and stage.
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
from rlhf.run import metrics
from rlhf.run.metrics import EPISODES, Metric
from rlhf.run.wandb import has_wandb_key

_CARD_TABLES = ("card/accuracies", "card/probes", "card/flags")


def workspace(entity: str, project: str, name: str, groups: Sequence[str] = ()) -> Any:
    """Return the workspace, a `wandb_workspaces.workspaces.Workspace`; nothing is sent.

    Args:
        groups: show the runs of these pipelines only; default: all.
    """
    import wandb_workspaces.expr as expr
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    axes = metrics.axes()

    def lines(shown: Sequence[Metric]) -> list[Any]:
        return [wr.LinePlot(title=m.name, x=axes[f"{m.family}/*"], y=[m.name]) for m in shown]

    def table(key: str) -> Any:
        return wr.WeavePanelSummaryTable(table_name=key)

    first, health = metrics.shown("outcome"), metrics.shown("health")
    card = [m for m in metrics.of_stage("reward") if m.family == "card"]
    open_sections = {
        "Outcome": [*lines(first), wr.RunComparer(diff_only="split")],
        "Frontier": [_frontier(wr), table("frontier/score_table")],
        "Reward report card": [*(wr.ScalarChart(metric=m.name, title=m.name) for m in card), *map(table, _CARD_TABLES)],
        "Health": lines(health),
        "Samples": [table("ppo/samples")],
    }
    others = {
        "Pretraining": metrics.of_stage("pretrain"),
        "SFT": metrics.of_stage("sft"),
        "Reward model": metrics.of_stage("reward"),
        "PPO": metrics.of_stage("ppo"),
    }
    elsewhere = [*first, *health, *card]
    sections = [ws.Section(name=title, panels=panels, is_open=True) for title, panels in open_sections.items()]
    sections += [
        ws.Section(name=title, panels=lines([m for m in own if m not in elsewhere]), is_open=False)
        for title, own in others.items()
    ]
    filters = expr.And(expr.Metric("Group").isin(list(groups))) if groups else ""
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=sections,
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
    """Return a plot of each run's last score over its last KL."""
    score, kl = (wr.SummaryMetric(name) for name in ("objective/score", "objective/kl_full"))
    return wr.ScatterPlot(title="Score over KL, last update", x=kl, y=score)


def main(argv: Sequence[str] | None = None) -> None:
    """Save the workspace that the command line describes, on the W&B server or in a file."""
    parser = Parser(description="Compare runs in W&B.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="dashboard")
    command = commands.add_parser("dashboard", help="save a workspace that compares runs")
    command.add_argument("--project", default="rlhf", help="W&B project; default: rlhf")
    command.add_argument("--entity", default=os.environ.get("WANDB_ENTITY"), help="user or team; default: WANDB_ENTITY")
    command.add_argument("--name", default="Runs compared", help="name of the workspace")
    command.add_argument("--group", nargs="*", default=[], metavar="GROUP", help="only runs of these pipelines")
    command.add_argument(
        "--output", type=Path, metavar="FILE", help="write the workspace here, as JSON, and send nothing"
    )
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if arguments.output is None and not has_wandb_key():
        raise UserError("no W&B key, and workspaces are stored on its server; run `wandb login`, or give --output FILE")
    if not arguments.entity:
        raise UserError("give the owner of the project: --entity NAME, a W&B user or team")
    content = workspace(arguments.entity, arguments.project, arguments.name, arguments.group)
    if arguments.output is None:
        print(content.save().url)
        return
    text = json.dumps(decode(content._to_model().model_dump_json(by_alias=True)), indent=1)
    arguments.output.write_text(text, encoding="utf-8")
    print(arguments.output)


if __name__ == "__main__":
    run_command(main)
