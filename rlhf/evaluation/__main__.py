"""`rlhf evaluate --models sft/A ppo/B --dataset DATA`; its output is described in `rlhf.evaluation.compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf.base import screen
from rlhf.base.errors import run_command
from rlhf.config import EvaluationConfig, parse_config
from rlhf.evaluation.compare import run

#: Figures shown on the terminal, with their number format; the rest is in the files.
SHOWN = {
    "score": "+.2f",
    "kl_full": ".2f",
    "entropy": ".2f",
    "length": ".1f",
    "stop_rate": ".0%",
    "distinct_2": ".3f",
    "base_perplexity": ".1f",
}


def print_evaluation(result: dict[str, Any]) -> None:
    """Print the main figures, warnings first."""
    from rich.table import Column, Table

    console = screen.console(highlight=False)
    for mark in [*result["marks"], *(f"{m['name']}: {mark}" for m in result["models"] for mark in m["marks"])]:
        console.print(f"! {mark}", markup=False)
    checks = [name for name in result["models"][0]["figures"] if name.startswith("check/")]
    shown = {**SHOWN, **{f"gold/{name}": "+.2f" for name in result["gold"]}, **dict.fromkeys(checks, ".3f")}
    table = Table(Column("model", no_wrap=True), *shown, show_edge=False, pad_edge=False)
    for model in result["models"]:
        cells = {name: model["figures"][name] for name in shown}
        table.add_row(model["name"], *("" if c is None else f"{c['value']:{shown[name]}}" for name, c in cells.items()))
    console.print(table)
    if result["win_rates"]:
        console.print(_win_rates(result))
    if best := result["frontier"]["recommended"]:
        console.print(
            f"recommended by {best['gold']}: {best['model']} at KL {best['kl']:.2f}, {best['gain']['value']:+.3f}",
            markup=False,
        )
    console.print(
        "perplexity on plain text: "
        + ", ".join(f"{name} {figure['value']:.2f}" for name, figure in result["tax"]["texts"]["models"].items()),
        markup=False,
    )


def _win_rates(result: dict[str, Any]) -> Any:
    """Return the table of win rates."""
    from rich.table import Column, Table

    against = Column(f"against {result['baseline']}", no_wrap=True)
    table = Table(against, "judge", "wins", "95%", "p", "at equal length", show_edge=False, pad_edge=False)
    for line in result["win_rates"]:
        between = "" if line["low"] is None else f"{line['low']:.0%} to {line['high']:.0%}"
        p, controlled = line["sign_test"]["p"], line["length_controlled"]
        table.add_row(
            line["model"],
            line["judge"],
            "" if line["value"] is None else f"{line['value']:.1%}",
            between,
            "" if p is None else f"{p:.2g}",
            "" if controlled is None else f"{controlled['value']:.1%}",
        )
    return table


def evaluate(config: EvaluationConfig) -> str:
    """Compare policies, print the main figures, and return the file with all of them."""
    print_evaluation(run(config))
    file = str(Path(config.output_dir) / "evaluation.json")
    print(f"evaluation: {file}", flush=True)
    return file


def main() -> None:
    """Run the command line."""
    evaluate(parse_config(EvaluationConfig))


if __name__ == "__main__":
    run_command(main)
