"""Data -> SFT -> reward model -> PPO -> report, in one command: `python -m rlhf.pipeline --config FOLDER`

The folder holds `data.yaml` (optional), `sft.yaml`, `reward.yaml` and `ppo.yaml`. A stage whose result is registered with the
same recipe (options, data, parents) is skipped, so the command can be repeated after an interruption.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rlhf.config import PPOConfig, RewardConfig, SFTConfig, build, read_yaml
from rlhf.errors import UserError, did_you_mean, run_command


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see python -m rlhf.pipeline --help)")


def run(folder: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """Runs the chain; returns the content of `results.json`.

    Args:
        folder: holds the stages' YAML files.
        overrides: options that go to every stage that has them (registry, output_dir, seed, device, ...).
    """
    from rlhf.report import print_results, write_report
    from rlhf.stages import ppo, reward, sft

    started = time.perf_counter()
    overrides = {**overrides, **_prepare_data(folder, overrides)}
    artifacts = {}
    for stage, config_type, module in (
        ("sft", SFTConfig, sft),
        ("reward", RewardConfig, reward),
        ("ppo", PPOConfig, ppo),
    ):
        config = _stage_config(folder / f"{stage}.yaml", config_type, overrides)
        artifacts[stage] = module.run(config, reuse=True)  # type: ignore[attr-defined]
        gc.collect()
    output = Path(config.output_dir)
    results = _results(artifacts, config.seed, time.perf_counter() - started)
    output.mkdir(parents=True, exist_ok=True)
    partial = output / ".results.json"
    partial.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    partial.replace(output / "results.json")
    print_results(results)
    print(f"report: {write_report(output)}")
    return results


def _prepare_data(folder: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """Prepares the data that `data.yaml` names, and points the stages to it."""
    file = folder / "data.yaml"
    if not file.is_file():
        return {}
    from rlhf.data_prep import DataConfig, prepare

    values = read_yaml(file)
    if "output_dir" in overrides:
        values["output_dir"] = str(Path(overrides["output_dir"]) / "data")
    return {"dataset": str(prepare(build(DataConfig, values, str(file))))}


def _stage_config(file: Path, config_type: Any, overrides: dict[str, Any]) -> Any:
    fields = config_type.__dataclass_fields__
    return build(config_type, {**read_yaml(file), **{k: v for k, v in overrides.items() if k in fields}}, str(file))


def _results(artifacts: dict[str, Any], seed: int, seconds: float) -> dict[str, Any]:
    """The figures of the chain, all of them out of the manifests."""
    from rlhf.tracking import peak_rss_gb

    figures = {stage: dict(artifact.manifest.metrics) for stage, artifact in artifacts.items()}
    phases = [{"stage": stage, **phase} for stage, f in figures.items() for phase in f.pop("phases")]
    figures["reward"]["vader_accuracy"] = figures["reward"].pop("gold_accuracy")
    return {
        **figures,
        "total_seconds": round(seconds, 1),
        "peak_rss_gb": round(max([peak_rss_gb(), *(p["peak_rss_gb"] for p in phases)]), 2),
        "artifacts": {s: {"reference": a.reference, "hash": a.hash} for s, a in artifacts.items()},
        "phases": phases,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        },
        "seed": seed,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def parse(argv: Sequence[str] | None = None) -> tuple[Path, dict[str, Any]]:
    """The config folder, and `--option value` pairs for every stage that has the option."""
    parser = _Parser(prog="python -m rlhf.pipeline", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--config", required=True, type=Path, help="folder with sft.yaml, reward.yaml, ppo.yaml, data.yaml"
    )
    arguments, rest = parser.parse_known_args(argv)
    if not arguments.config.is_dir():
        siblings = [str(p) for p in arguments.config.parent.glob("*")] if arguments.config.parent.is_dir() else []
        raise UserError(f"no config folder {arguments.config}{did_you_mean(str(arguments.config), siblings)}")
    known = {name for kind in (SFTConfig, RewardConfig, PPOConfig) for name in kind.__dataclass_fields__}
    overrides: dict[str, Any] = {}
    words = iter(rest)
    for word in words:
        name, _, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in known:
            raise UserError(f"unknown option {word}{did_you_mean(name, known)}")
        overrides[name] = value or next(words, None)
        if overrides[name] is None:
            raise UserError(f"{word} needs a value")
    return arguments.config, overrides


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    run(*parse(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    run_command(main)
