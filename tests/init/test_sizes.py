"""Sizes for machines, models and data that are not here: they divide, fit the limits, and load as configs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from rlhf.config import STAGE_CONFIGS, EvaluationConfig, build
from rlhf.data_prep import DataConfig, Source
from rlhf.init.machine import GPU_MODELS, SMALL_MODEL, BaseModel, Machine
from rlhf.init.sizes import Sizes
from rlhf.init.survey import Lengths, Survey
from rlhf.init.write import texts

SMALL_CPU = Machine(gpu="", memory=4, cores=2, bf16=False)
MACHINES = {
    "CPU, 4 GB": SMALL_CPU,
    "CPU, 256 GB": Machine(gpu="", memory=256, cores=64, bf16=True),
    "GPU, 24 GB": Machine(gpu="A", memory=24, cores=8, bf16=True),
    "GPU, 80 GB": Machine(gpu="B", memory=80, cores=8, bf16=True),
}


def sizes_for(machine: Machine, parameters: float = 1.35e8, context: int = 2048) -> Sizes:
    model = BaseModel(name="m", folder=None, parameters=parameters, measured=True, context=context)
    names = {"policy": "sft/x", "reward": "reward/x", "tokenizer": "m"}
    return Sizes(name="x", model=model, machine=machine, chat_template=None, **names)


def data_of(rows: int, prompt: int = 60, answer: int = 80, responses: float = 2.0) -> Survey:
    lengths = Lengths(prompts=np.full(min(rows, 999), prompt), answers=np.full(min(rows, 999), answer), estimated=False)
    kinds = ("demonstrations", "comparisons", "prompts")
    source = {"rows": rows, "reader": "columns", "evidence": "", "name": "f", "malformed": 0, "unused_columns": []}
    return Survey(
        recipe=DataConfig(sources=[Source(path="f.jsonl")], tokenizer="m", max_prompt_length=64),
        sources=[source],
        rows={f"{kind}/train": rows for kind in kinds} | {f"{kind}/validation": max(1, rows // 10) for kind in kinds},
        dropped={},
        sampled=False,
        lengths=lengths,
        responses=responses,
        rating_difference=1.0,
    )


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("parameters, context", [(3e6, 64), (1.35e8, 2048), (7e9, 32768)])
@pytest.mark.parametrize(
    "rows, prompt, answer, responses",
    [(1, 1, 1, 2.0), (12, 60, 80, 2.0), (5000, 5000, 3000, 4.4), (3_000_000, 90, 9, 2.0)],
)
def test_sizes_divide_and_fit(
    machine: Machine, parameters: float, context: int, rows: int, prompt: int, answer: int, responses: float
) -> None:
    """Bug: a batch that its part does not divide, a length beyond the model's positions, or no update at all."""
    files = texts(
        sizes_for(machine, parameters, context),
        data_of(rows, prompt, answer, responses),
        ["sft", "reward", "ppo", "evaluate"],
    )
    values = {Path(name).stem: yaml.safe_load(text) for name, text in files.items()}
    for stage in ("sft", "reward", "ppo"):
        build(STAGE_CONFIGS[stage], {**values[stage], "name": "x"}, stage)  # raises for what does not divide
    assert build(EvaluationConfig, values["evaluate"], "").num_prompts >= 1
    ppo = values["ppo"]
    assert (
        ppo["max_prompt_length"] + ppo["response_length"] <= context
        and min(ppo["max_prompt_length"], ppo["response_length"]) >= 8
    )
    for stage in ("sft", "reward"):
        one = values[stage]
        assert one["max_length"] <= context and one["max_steps"] >= 8 and 1 <= one["save_steps"] <= one["max_steps"]
        assert one["warmup_steps"] < one["max_steps"]
    rollouts = ppo["total_episodes"] / ppo["rollout_batch_size"]
    assert rollouts == int(rollouts) >= 8 and ppo["save_steps"] <= rollouts


@pytest.mark.parametrize("memory, model", [(15.9, GPU_MODELS[0]), (16, GPU_MODELS[16]), (80, GPU_MODELS[16])])
def test_default_model_of_a_gpu(memory: float, model: str) -> None:
    """A model that fills the memory before the first batch."""
    assert Machine(gpu="G", memory=memory, cores=1, bf16=True).default_model == model
    assert SMALL_CPU.default_model == SMALL_MODEL


def test_rows_that_fit_end_at_the_machines_memory() -> None:
    """4 GB hold 1,024 tokens of a model with 135M parameters: four rows of 256, and one token more makes it two."""
    small = sizes_for(SMALL_CPU)
    assert [small.fitting_rows(length, 64) for length in (256, 257, 1024, 1025)] == [4, 2, 1, 1]
    assert sizes_for(SMALL_CPU, 2.7e8).fitting_rows(256, 64) == 2  # twice the model
    assert sizes_for(MACHINES["GPU, 24 GB"], 5e8).fitting_rows(255, 8) == 8 and small.fitting_rows(8, 8) == 8
