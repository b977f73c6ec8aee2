"""The plan command: configs, models and data of a command line."""

from __future__ import annotations

import importlib
import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from rlhf.base.errors import UserError
from rlhf.config import STAGE_CONFIGS, build, find_config, folder_name, read_overrides, read_yaml
from rlhf.data_prep import DataConfig, prepare, read_recipe
from rlhf.data_prep.prepare.recipe import local
from rlhf.doctor.plan.estimate import as_dict, libraries, make_plan
from rlhf.doctor.plan.rates import LAUNCH, UTILISATION, find_gpu
from rlhf.doctor.plan.show import lines
from rlhf.doctor.plan.twin import read_shape
from rlhf.doctor.plan.work import Work, assumed_work, read_work
from rlhf.doctor.preflight.command import stage_of
from rlhf.models.catalogue import resolve_model
from rlhf.models.compute import Compute
from rlhf.models.tokenization import load_tokenizer
from rlhf.registry import Registry

#: Stages that are planned; pretraining is not.
STAGES = ("sft", "reward", "ppo")


def run(arguments: Namespace, rest: Sequence[str]) -> None:
    """Print the plans of the stages that the command line names."""
    arguments.config = find_config(arguments.config)
    overrides = read_overrides(rest, (STAGE_CONFIGS[stage] for stage in STAGES))
    gpu = find_gpu(arguments.gpu) if arguments.gpu else None
    plans = []
    for stage, values in _stages(arguments.config).items():
        kind = STAGE_CONFIGS[stage]
        own = {name: value for name, value in overrides.items() if name in kind.__dataclass_fields__}
        config: Any = build(kind, {**values, **own}, str(arguments.config))
        importlib.import_module(f"rlhf.stages.{stage}")
        libraries()
        compute = Compute(torch.device("cpu"), torch.bfloat16) if gpu else Compute.choose(config)
        name, tokenizer_source = base_model(config, arguments.config, arguments.model)
        shape = read_shape(name, config.registry, trust_remote_code=getattr(config, "trust_remote_code", False))
        work = _work(config, tokenizer_source, arguments)
        plan = make_plan(config, shape, compute, work, gpu=gpu)
        plans.append(plan)
        if not arguments.json:
            print("\n".join(lines(plan, config, f"one {arguments.gpu}" if gpu else str(compute))), flush=True)
    if arguments.json:
        print(json.dumps([as_dict(plan) for plan in plans], indent=2))
    elif gpu:
        print(f"assumed: {UTILISATION:.0%} of the published rates, {LAUNCH * 1e6:g} microseconds to launch an operator")


def _stages(place: Path) -> dict[str, dict[str, Any]]:
    """Return the options of the stages in a folder, or of one file, by stage; the data of `data.yaml` is theirs."""
    if place.is_dir():
        files = {stage: place / f"{stage}.yaml" for stage in STAGES if (place / f"{stage}.yaml").is_file()}
        if not files:
            raise UserError(f"{place} holds no {', '.join(f'{stage}.yaml' for stage in STAGES)}")
        stages = {stage: {"name": folder_name(file), **read_yaml(file)} for stage, file in files.items()}
    else:
        values = read_yaml(place)
        stage = stage_of(str(place), values)
        if stage not in STAGES:
            raise UserError(f"{place} is a config of {stage}, which has no plan; {', '.join(STAGES)} have")
        stages = {stage: {"name": folder_name(place), **values}}
    data = (place if place.is_dir() else place.parent) / "data.yaml"
    if data.is_file():
        dataset = _dataset(data)
        for values in stages.values():
            values["dataset"] = dataset
    return stages


def _dataset(file: Path) -> str:
    """Return the data folder of `data.yaml`; it is made if its sources are on this machine, as the training would make it."""
    recipe = read_recipe(read_yaml(file), str(file))
    if not isinstance(recipe, DataConfig) or not all(map(local, recipe.sources)):
        return recipe.output_dir
    with redirect_stdout(sys.stderr):
        return str(prepare(recipe))


def base_model(config: Any, place: Path, model: str | None = None) -> tuple[str, str]:
    """Return the base model of a stage, and where its tokenizer is.

    Args:
        place: config file or folder; `sft.yaml` beside it names the base of a policy that is not registered yet.
        model: name that comes first.
    """
    if model or hasattr(config, "model_name_or_path"):
        name = str(model or config.model_name_or_path)
        return name, name
    try:
        policy = Registry(config.registry).get(config.policy, expect_stage="sft")
        return policy.manifest.base_model, str(policy.path)
    except UserError as error:
        folder = place if place.is_dir() else place.parent
        file = folder / "sft.yaml"
        base = read_yaml(file).get("model_name_or_path") if file.is_file() else None
        if base:
            return str(base), str(base)
        raise UserError(f"{config.policy} is not registered yet; name its base with --model") from error


def _work(config: Any, tokenizer_source: str, arguments: Any) -> Work:
    """Return the work of the data if it and a tokenizer are on this machine, else of the lengths in the options."""
    if Path(config.dataset).exists():
        source = resolve_model(tokenizer_source, config.registry)
        tokenizer = load_tokenizer(source, chat_template=getattr(config, "chat_template", None), untrained=True)
        return read_work(config, config.dataset, tokenizer)
    longest = getattr(config, "response_length", arguments.answer_tokens)
    answers = longest if hasattr(config, "rollout_batch_size") else arguments.answer_tokens
    return assumed_work(config, prompt_tokens=arguments.prompt_tokens, answer_tokens=answers, rows=arguments.rows)
