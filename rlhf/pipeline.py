"""Data -> SFT -> reward model -> PPO -> report, in one command: rlhf pipeline --config FOLDER

The folder holds a file for each stage: `sft.yaml`, `reward.yaml` and `ppo.yaml`, before them `data.yaml` and, to pretrain a
base model, `pretrain.yaml`, and after them `evaluate.yaml`, which compares the policies. A file that is not there leaves
its stage out; what later stages need of it must be registered. A stage whose recipe (options, data, parents) has a
registered result is skipped, so the command can be repeated after an interruption.
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
from rlhf.base.errors import UserError, run_command
from rlhf.config import (
    STAGE_CONFIGS,
    EvaluationConfig,
    RunConfig,
    TrainingLength,
    build,
    find_config,
    folder_name,
    is_registered_reward,
    read_overrides,
    read_yaml,
)
from rlhf.data_prep import prepare, read_recipe
from rlhf.doctor.health.findings import actions
from rlhf.registry import MANIFEST, Artifact, Registry
from rlhf.report.run_page import print_results, write_report
from rlhf.stages.next_steps import print_next

#: Options of the same name but another meaning in pretraining: on the command line they go to the other stages only.
NOT_OF_PRETRAINING = {
    "dataset",
    "chat_template",
    "quantization",
    *("optim", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("lr_scheduler_type", "warmup_steps", "save_steps"),
    *(option.name for option in dataclasses.fields(TrainingLength)),
}


def run(folder: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """Run all stages, write `results.json` and the report, and return the content of `results.json`.

    Args:
        folder: folder of the stages' YAML files.
        overrides: options for every stage that has them (registry, output_dir, seed, device, ...), except
            `NOT_OF_PRETRAINING` in pretraining.
    """
    started = time.perf_counter()
    data = _prepare_data(folder, overrides)
    configs = _stage_configs(folder, {**overrides, **data})
    evaluation = _evaluation_config(folder, {**overrides, **data})
    last = [*configs.values()][-1]
    group = last.wandb_group or last.name
    artifacts: dict[str, Artifact] = {}
    for stage, config in configs.items():
        inputs = {**_exact_inputs(stage, config, artifacts), "wandb_group": config.wandb_group or group}
        reference = _run_stage(stage, dataclasses.replace(config, **inputs))
        artifacts[stage] = Registry(config.registry).read(reference)
        place = Path(config.output_dir) / stage
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(artifacts[stage].path / MANIFEST, place)  # for a skipped stage, too
    output = Path(last.output_dir)
    if evaluation:
        own = {f"{stage}/{_name(folder / f'{stage}.yaml')}": made.reference for stage, made in artifacts.items()}
        models = [own.get(model, model) for model in evaluation.models]
        _run_stage("evaluate", dataclasses.replace(evaluation, models=models))
    results = _results(artifacts, last.seed, time.perf_counter() - started)
    output.mkdir(parents=True, exist_ok=True)
    storage.write_text(output / "results.json", json.dumps(results, indent=2) + "\n")
    print_results(results)
    print(f"report: {write_report(output)}")
    print_next([*artifacts.values()][-1], last, [])
    return results


def _exact_inputs(stage: str, config: Any, artifacts: dict[str, Artifact]) -> dict[str, Any]:
    """Return the options that name the versions of this run, even where a newer version is registered."""
    inputs: dict[str, Any] = {"policy": artifacts["sft"].reference} if "sft" in artifacts else {}
    if stage == "sft" and "pretrain" in artifacts:
        inputs["model_name_or_path"] = artifacts["pretrain"].reference
    if "reward" in artifacts:  # in place of the name; other kinds of rewards stay
        exact = artifacts["reward"].reference
        inputs["reward"] = [exact if is_registered_reward(reward) else reward for reward in config.reward]
    return inputs


def _run_stage(stage: str, config: Any) -> str:
    """Run a stage in its own process, which frees all its memory at the end, and return the registered reference.

    Ctrl-C and SIGTERM are passed on: the stage finishes its update and saves, and this process waits for it and exits with
    its code. A stage whose pipeline was killed (kill -9, a closed terminal) also saves and exits.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_stage_process, args=(stage, config, sender))
    with _started(process) as signals:
        sender.close()
        try:
            reference = str(receiver.recv())
        except EOFError:
            reference = ""  # it ended without a result and has printed why
        process.join()
    if signals:
        sys.exit(128 + signals[0])
    if process.exitcode is not None and process.exitcode < 0:
        raise UserError(
            f"the {stage} stage was killed by signal {-process.exitcode} (9: often by the system, when memory runs out); "
            "its checkpoints are intact, continue with --resume true"
        )
    if not reference:
        sys.exit(process.exitcode)
    return reference


@contextlib.contextmanager
def _started(process: BaseProcess) -> Iterator[list[int]]:
    """Start the process and pass SIGINT and SIGTERM on to it, as SIGTERM; yields the list of received signals."""
    signals: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        process.terminate()

    # The process inherits these handlers. While it imports, a Ctrl-C on the terminal must reach it only through this one.
    # A SIGTERM before it has started ends this process, and with it the other.
    previous = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.SIGTERM: signal.signal(signal.SIGTERM, signal.SIG_DFL),
    }
    try:
        process.start()
        for number in previous:
            signal.signal(number, pass_on)
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _stage_process(stage: str, config: Any, sender: Connection) -> None:
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C keeps coming through the parent only
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if stage != "ppo":
        os.environ.pop("WANDB_SWEEP_ID", None)  # a sweep over pipelines looks at the last stage

    def work() -> None:
        if stage == "evaluate":
            sender.send(importlib.import_module("rlhf.evaluation.__main__").evaluate(config))
            return
        sender.send(str(importlib.import_module(f"rlhf.stages.{stage}").run(config, reuse=True).reference))

    try:
        run_command(work)
    except Exception:
        sys.excepthook(*sys.exc_info())  # multiprocessing would print it without removing secrets
        sys.exit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _prepare_data(folder: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """Prepare the data of `data.yaml`, if any, and return the option that names its folder."""
    file = folder / "data.yaml"
    if not file.is_file():
        return {}
    values = read_yaml(file)
    if "output_dir" in overrides:
        values["output_dir"] = str(Path(overrides["output_dir"]) / "data")
    return {"dataset": str(prepare(read_recipe(values, str(file))))}


def _stage_configs(folder: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the configs of all stages, so that a mistake in ppo.yaml is found before SFT starts."""
    for_pretraining = {name: value for name, value in overrides.items() if name not in NOT_OF_PRETRAINING}
    configs = {
        stage: _stage_config(folder / f"{stage}.yaml", kind, for_pretraining if stage == "pretrain" else overrides)
        for stage, kind in STAGE_CONFIGS.items()
        if (folder / f"{stage}.yaml").is_file()
    }
    if not configs:
        raise UserError(f"no stage in {folder}: expected {', '.join(f'{stage}.yaml' for stage in STAGE_CONFIGS)}")
    for config in configs.values():
        registry = Registry(config.registry)
        if hasattr(config, "policy") and "sft" not in configs:
            registry.get(config.policy, expect_stage="sft")
        for reward in filter(is_registered_reward, getattr(config, "reward", [])):
            if "reward" not in configs:
                registry.get(reward, expect_stage="reward")
    return configs


def _name(file: Path) -> str:
    """Return the name of the runs of a config file, where the command line gives no other."""
    return str(read_yaml(file).get("name") or folder_name(file))


def _evaluation_config(folder: Path, overrides: dict[str, Any]) -> EvaluationConfig | None:
    """Return the config of `evaluate.yaml`, if any; of the command line it takes where and how to compute."""
    file = folder / "evaluate.yaml"
    if not file.is_file():
        return None
    shared = {option.name for option in dataclasses.fields(RunConfig)}
    changes = {name: value for name, value in overrides.items() if name in {*shared, "dataset"}}
    if "output_dir" in overrides:
        changes["output_dir"] = str(Path(overrides["output_dir"]) / "evaluation")
    return build(EvaluationConfig, {**read_yaml(file), **changes}, str(file))


def _stage_config(file: Path, config_type: Any, overrides: dict[str, Any]) -> Any:
    fields = {field.name for field in dataclasses.fields(config_type)}
    changes = {k: v for k, v in overrides.items() if k in fields}
    config = build(config_type, {**read_yaml(file), "name": _name(file), **changes}, str(file))
    actions(config.doctor)  # raises for an unknown action
    return config


def _results(artifacts: dict[str, Artifact], seed: int, seconds: float) -> dict[str, Any]:
    """Return the content of `results.json`, with figures from the manifests."""
    figures = {stage: dict(artifact.manifest.metrics) for stage, artifact in artifacts.items()}
    phases = [{"stage": stage, **phase} for stage, f in figures.items() for phase in f.pop("phases")]
    if "reward" in figures:
        figures["reward"]["vader_accuracy"] = figures["reward"].pop("gold_accuracy")
    return {
        **figures,
        # A skipped stage counts with the seconds of its run.
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
    """Return the config folder, and the values of `--option value` pairs by option."""
    parser = Parser(
        usage="%(prog)s --config CONFIG [--option value ...]",
        description=__doc__.split("\n")[0],
        epilog="An option, such as --device cpu or --resume true, goes to every stage that has it; rlhf sft --help lists "
        "those of SFT, and so on. Pretraining keeps the data, training length and optimiser of pretrain.yaml.",
    )
    parser.add_argument(
        "--config",
        required=True,
        type=Path,
        help="folder with data.yaml, pretrain.yaml, sft.yaml, reward.yaml, ppo.yaml and evaluate.yaml, or some of them; or a "
        "recipe's name: demo",
    )
    arguments, rest = parser.parse_known_args(argv)
    folder = find_config(arguments.config)
    if not folder.is_dir():
        raise UserError(f"--config takes a folder here, and {folder} is a file")
    return folder, read_overrides(rest, STAGE_CONFIGS.values())


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    run(*parse(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    run_command(main)
