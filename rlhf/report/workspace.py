"""A saved W&B workspace and a W&B Report in which runs are compared: `rlhf tracking dashboard --project NAME`

The workspace has panels for every metric over axes that mean the same in each run, the reward model's report card, the reward-KL
frontier, and the samples; runs are grouped by pipeline and stage. The Report, `rlhf tracking report`, holds the few that decide,
with a sentence each, as a draft to write in.
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
from rlhf.run.metrics import EPISODES, METRICS, Metric
from rlhf.run.wandb import has_wandb_key

#: Columns of the run table: held-out figures first, by which runs are sorted.
_COLUMNS = (
    *(f"summary:summary/{name}" for name in ("gold_after", "score_after", "kl", "length_after")),
    *(f"config:{name}" for name in ("learning_rate", "kl_coef")),
)
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
        "Frontier": [*_frontiers(wr), table("frontier/score_table")],
        "Reward report card": [*(wr.ScalarChart(metric=m.name, title=m.name) for m in card), *map(table, _CARD_TABLES)],
        "Health": lines(health),
        "Samples": [table("ppo/comparison"), table("ppo/samples")],
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
            filters=filters, groupby=[expr.Metric("Group"), expr.Metric("JobType")], pinned_columns=list(_COLUMNS)
        ),
    )


def _frontiers(wr: Any) -> list[Any]:
    """Return plots of each run's held-out judge and score over its held-out KL, after the training."""
    kl = wr.SummaryMetric("summary/kl")
    return [
        wr.ScatterPlot(title=f"{title} over KL, held-out prompts", x=kl, y=wr.SummaryMetric(f"summary/{name}"))
        for name, title in (("gold_after", "Independent judge"), ("score_after", "Score"))
    ]


def report(entity: str, project: str, name: str, groups: Sequence[str] = ()) -> Any:
    """Return the Report, a `wandb_workspaces.reports.v2.Report`; the arguments are those of `workspace`."""
    import wandb_workspaces.expr as expr
    import wandb_workspaces.reports.v2 as wr

    filters: Any = [expr.Metric("JobType") == "ppo"]
    if groups:
        filters.append(expr.Metric("Group").isin(list(groups)))
    runs = wr.Runset(name="PPO", filters=filters, pinned_columns=list(_COLUMNS))

    def grid(*panels: Any) -> Any:
        return wr.PanelGrid(runsets=[runs], panels=list(panels))

    def lines(*names: str) -> list[Any]:
        return [wr.LinePlot(title=METRICS[name].title or METRICS[name].label, x=EPISODES, y=[name]) for name in names]

    blocks = [
        wr.TableOfContents(),
        wr.H1("Which run is better"),
        wr.P(
            "Held-out answers after the training. The score is what PPO is trained on, so a high one proves little: prefer "
            "the run with the higher judge at the same or a lower KL."
        ),
        grid(*_frontiers(wr), wr.RunComparer(diff_only="split")),
        wr.H1("While it trained"),
        wr.P("Where the judge turns down while the score still rises, the reward is being gamed: stop there."),
        grid(*lines("eval/gold", "eval/score", "eval/kl", "objective/score", "objective/kl_full", "response/length")),
        wr.H1("Answers"),
        wr.P("SFT and PPO on the same prompts; the table is empty unless the runs had log_texts."),
        grid(wr.WeavePanelSummaryTable(table_name="ppo/comparison")),
        wr.H1("Health"),
        grid(*lines(*(metric.name for metric in metrics.shown("health")))),
    ]
    return wr.Report(entity=entity, project=project, title=name, blocks=blocks, width="fluid")


def main(argv: Sequence[str] | None = None) -> None:
    """Save the workspace or Report that the command line describes, on the W&B server or in a file."""
    parser = Parser(description="Compare runs in W&B.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="dashboard|report")
    for word, summary, title in (
        ("dashboard", "save a workspace that compares runs", "Runs compared"),
        ("report", "save a draft of a W&B Report about PPO runs", "PPO runs compared"),
    ):
        command = commands.add_parser(word, help=summary)
        command.add_argument("--project", default="rlhf", help="W&B project; default: rlhf")
        command.add_argument(
            "--entity", default=os.environ.get("WANDB_ENTITY"), help="user or team; default: WANDB_ENTITY"
        )
        command.add_argument("--name", default=title, help="title of the page")
        command.add_argument("--group", nargs="*", default=[], metavar="GROUP", help="only runs of these pipelines")
        command.add_argument("--output", type=Path, metavar="FILE", help="write it here, as JSON, and send nothing")
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if arguments.output is None and not has_wandb_key():
        raise UserError("no W&B key, and pages are stored on its server; run `wandb login`, or give --output FILE")
    if not arguments.entity:
        raise UserError("give the owner of the project: --entity NAME, a W&B user or team")
    make = workspace if arguments.command == "dashboard" else report
    page = make(arguments.entity, arguments.project, arguments.name, arguments.group)
    if arguments.output is None:
        page.save()
        print(page.url)
        return
    text = json.dumps(decode(page._to_model().model_dump_json(by_alias=True)), indent=1)
    arguments.output.write_text(text, encoding="utf-8")
    print(arguments.output)


if __name__ == "__main__":
    run_command(main)
