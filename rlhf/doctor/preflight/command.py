"""Preflight: checks before a long run. `rlhf doctor preflight --config FILE`

Each stage runs it by default once everything is built and before anything is trained (`--preflight false` leaves it out): a
few rows go through the models, data sets, loss and sampler of the run. It draws its own random numbers and leaves weights,
optimiser and global state as they were, so a run ends in the same bytes with it and without.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from rlhf.base.errors import UserError, run_command
from rlhf.config import STAGE_CONFIGS, TrainingConfig, parse_config, read_yaml

USAGE = "usage: rlhf doctor preflight --config FILE [--option value ...], FILE and options of a stage"


def stage_of(file: str, options: Iterable[str]) -> str:
    """Return the stage that a config file is named after, else the one whose options these are.

    Only SFT has a base model, only PPO a reward or a rollout, and pretraining no policy.
    """
    names = set(options)
    if (stage := Path(file).stem) in STAGE_CONFIGS:
        return stage
    if "model_name_or_path" in names:
        return "sft"
    return "ppo" if names & {"reward", "rollout_batch_size"} else "reward" if "policy" in names else "pretrain"


def parse(argv: Sequence[str]) -> tuple[str, TrainingConfig]:
    """Return the stage and its config, from `--config FILE` and `--option value`."""
    files = [argv[i + 1] for i, word in enumerate(argv[:-1]) if word == "--config"]
    if not files:
        raise UserError(USAGE)
    words = [word.removeprefix("--").split("=")[0] for word in argv if word.startswith("--")]
    stage = stage_of(files[-1], [*words, *(name for file in files for name in read_yaml(file))])
    return stage, parse_config(STAGE_CONFIGS[stage], list(argv))


def run(stage: str, config: TrainingConfig) -> None:
    """Build a stage as it would run, check it, and stop before the training; the run's own folder stays untouched.

    Raises:
        UserError: checks failed.
    """
    place = Path(config.output_dir).absolute()
    beside = next(p for p in (place, *place.parents) if p.is_dir())  # on the disk that the checkpoints will be on
    with tempfile.TemporaryDirectory(prefix=".preflight-", dir=beside) as folder:
        rehearsal = dataclasses.replace(config, output_dir=folder, trackers=["none"], resume=False, preflight=True)
        importlib.import_module(f"rlhf.stages.{stage}").run(rehearsal, only_preflight=True)
    print(f"preflight passed: {stage}/{config.name} can start")


def main() -> None:
    """Run the command line."""
    if {"-h", "--help"} & set(sys.argv):
        print(USAGE)
    else:
        run(*parse(sys.argv[1:]))


if __name__ == "__main__":
    run_command(main)
