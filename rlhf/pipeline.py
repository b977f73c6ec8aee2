"""Data -> SFT -> reward model -> PPO -> report, in one command: `python -m rlhf.pipeline --config FOLDER`

The folder holds `sft.yaml`, `reward.yaml` and `ppo.yaml`, and may hold `data.yaml` and, for a base model of one's own,
`pretrain.yaml`. A stage whose result is registered with the
same recipe (options, data, parents) is skipped, so the command can be repeated after an interruption.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib
import json
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

from rlhf.base import storage
from rlhf.base.cli import Parser
from rlhf.base.errors import UserError, did_you_mean, run_command
from rlhf.config import (
    PPOConfig,
    PretrainConfig,
    RewardConfig,
    SFTConfig,
    TrainingLength,
    build,
    read_yaml,
    reward_kind,
)
from rlhf.doctor.health.findings import actions

STAGES: dict[str, Any] = {"pretrain": PretrainConfig, "sft": SFTConfig, "reward": RewardConfig, "ppo": PPOConfig}
#: Options that the stages share by name, and that mean another thing in pretraining: on the command line they are the others'.
NOT_OF_PRETRAINING = {
    "dataset",
    "chat_template",
    "quantization",
    *("optim", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("lr_scheduler_type", "warmup_steps", "save_steps"),
    *(option.name for option in dataclasses.fields(TrainingLength)),
}


def run(folder: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """Runs the chain; returns the content of `results.json`.

    Args:
        folder: holds the stages' YAML files.
        overrides: options that go to every stage that has them (registry, output_dir, seed, device, ...), but for
            `NOT_OF_PRETRAINING`.
    """
    from rlhf.registry import MANIFEST, Registry
    from rlhf.report.run_page import print_results, write_report

    started = time.perf_counter()
    data = _prepare_data(folder, overrides)
    configs = _stage_configs(folder, {**overrides, **data})
    group = configs["ppo"].wandb_group or configs["ppo"].name
    artifacts: dict[str, Any] = {}
    for stage, config in configs.items():
        # A stage builds on the very versions made here, even where a newer one of the name is registered.
        made: dict[str, Any] = {"policy": artifacts["sft"].reference} if "sft" in artifacts else {}
        if stage == "sft" and "pretrain" in artifacts:
            made["model_name_or_path"] = artifacts["pretrain"].reference
        made["wandb_group"] = config.wandb_group or group
        if "reward" in artifacts:  # in place of the name; rewards that are no artefacts stay
            exact = artifacts["reward"].reference
            made["reward"] = [exact if reward_kind(reward) == "adapter" else reward for reward in config.reward]
        reference = _run_stage(stage, dataclasses.replace(config, **made))
        artifacts[stage] = Registry(config.registry).read(reference)
        folder = Path(config.output_dir) / stage
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(artifacts[stage].path / MANIFEST, folder)  # also of a stage that was skipped
    output = Path(configs["ppo"].output_dir)
    results = _results(artifacts, configs["ppo"].seed, time.perf_counter() - started)
    output.mkdir(parents=True, exist_ok=True)
    storage.write_text(output / "results.json", json.dumps(results, indent=2) + "\n")
    print_results(results)
    print(f"report: {write_report(output)}")
    return results


def _run_stage(stage: str, config: Any) -> str:
    """Runs a stage in a process of its own, so that the next one starts with all memory free; returns what it registered.

    Ctrl-C and SIGTERM are passed on: the stage finishes its update and saves, and this process waits for it and ends as a
    single stage would. A stage whose pipeline is gone (kill -9, a closed terminal) does the same.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_stage_process, args=(stage, config, sender))
    with _started(process) as signals:
        sender.close()
        try:
            reference = str(receiver.recv())
        except EOFError:
            reference = ""  # it has ended without a result, and said why
        process.join()
    if signals:
        sys.exit(128 + signals[0])
    if process.exitcode is not None and process.exitcode < 0:
        raise UserError(
            f"the {stage} stage was killed by signal {-process.exitcode} (9: often by the system, for want of memory); "
            "what it saved is intact, go on with --resume true"
        )
    if not reference:
        sys.exit(process.exitcode)
    return reference


@contextlib.contextmanager
def _started(process: BaseProcess) -> Iterator[list[int]]:
    """Starts the process; inside, SIGINT and SIGTERM are passed on to it, both as SIGTERM. Yields the list of those that came."""
    signals: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        process.terminate()

    # Inherited: while it imports, a Ctrl-C on the terminal must reach it through here alone. A SIGTERM that comes before there
    # is somebody to pass it on to ends this process, and so the other.
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.SIGTERM: signal.signal(signal.SIGTERM, signal.SIG_DFL),
    }
    try:
        process.start()
        for number in before:
            signal.signal(number, pass_on)
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stage_process(stage: str, config: Any, sender: Connection) -> None:
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # from here on as well
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def work() -> None:
        sender.send(str(importlib.import_module(f"rlhf.stages.{stage}").run(config, reuse=True).reference))

    try:
        run_command(work)
    except Exception:
        sys.excepthook(*sys.exc_info())  # multiprocessing has a printer of its own
        sys.exit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _prepare_data(folder: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """Prepares the data that `data.yaml` names, and points the stages to it."""
    file = folder / "data.yaml"
    if not file.is_file():
        return {}
    from rlhf.data_prep import prepare, read_recipe

    values = read_yaml(file)
    if "output_dir" in overrides:
        values["output_dir"] = str(Path(overrides["output_dir"]) / "data")
    return {"dataset": str(prepare(read_recipe(values, str(file))))}


def _stage_configs(folder: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """All are read before the first trains: a slip in ppo.yaml must not show after ten minutes of SFT."""
    to_pretrain = {name: value for name, value in overrides.items() if name not in NOT_OF_PRETRAINING}
    return {
        stage: _stage_config(folder / f"{stage}.yaml", kind, to_pretrain if stage == "pretrain" else overrides)
        for stage, kind in STAGES.items()
        if stage != "pretrain" or (folder / "pretrain.yaml").is_file()
    }


def _stage_config(file: Path, config_type: Any, overrides: dict[str, Any]) -> Any:
    fields = config_type.__dataclass_fields__
    config = build(config_type, {**read_yaml(file), **{k: v for k, v in overrides.items() if k in fields}}, str(file))
    actions(config.doctor)  # raises for a word that it does not know
    return config


def _results(artifacts: dict[str, Any], seed: int, seconds: float) -> dict[str, Any]:
    """The figures of the chain, all of them out of the manifests."""
    figures = {stage: dict(artifact.manifest.metrics) for stage, artifact in artifacts.items()}
    phases = [{"stage": stage, **phase} for stage, f in figures.items() for phase in f.pop("phases")]
    figures["reward"]["vader_accuracy"] = figures["reward"].pop("gold_accuracy")
    return {
        **figures,
        # A stage that was skipped counts with the seconds that it took when it ran.
        "total_seconds": round(max(seconds, sum(f["seconds"] for f in figures.values())), 1),
        "peak_rss_gb": round(max(p["peak_rss_gb"] for p in phases), 2),
        "artifacts": {
            s: {"reference": a.reference, "hash": a.hash, "run_id": a.manifest.wandb_run_id}
            for s, a in artifacts.items()
        },
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
    parser = Parser(
        usage="%(prog)s --config CONFIG [--option value ...]",
        description=__doc__.split("\n")[0],
        epilog="An option goes to every stage that has it. Data, training length and optimisation of pretraining are not those "
        "of the other stages: they stay as in pretrain.yaml.",
    )
    parser.add_argument(
        "--config",
        required=True,
        type=Path,
        help="folder with sft.yaml, reward.yaml, ppo.yaml, data.yaml, pretrain.yaml",
    )
    arguments, rest = parser.parse_known_args(argv)
    if not arguments.config.is_dir():
        siblings = [str(p) for p in arguments.config.parent.glob("*")] if arguments.config.parent.is_dir() else []
        raise UserError(f"no config folder {arguments.config}{did_you_mean(str(arguments.config), siblings)}")
    known = {name for kind in STAGES.values() for name in kind.__dataclass_fields__}
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
