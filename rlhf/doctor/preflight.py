"""Preflight: what has to be true before a long run. `python -m rlhf.doctor preflight --config FILE`

Each stage runs it by default once everything is built and before anything is trained (`--preflight false` leaves it out): a
few rows go through the very models, data sets, loss and sampler of the run. It takes random numbers of its own, and leaves
weights, optimiser and global state as they were, so a run ends in the same bytes with it and without.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.config import (
    PPOConfig,
    PretrainConfig,
    RewardConfig,
    SFTConfig,
    StageConfig,
    TrainingConfig,
    parse_config,
    read_yaml,
)
from rlhf.data_prep.loading import Loaded
from rlhf.doctor.checks import Check
from rlhf.doctor.preflight_data import check_leaks, check_registered, parents_data
from rlhf.doctor.preflight_models import check_probe
from rlhf.doctor.preflight_text import check_template, check_tokenizers
from rlhf.doctor.probe import read_probe
from rlhf.errors import UserError, run_command
from rlhf.models import Compute
from rlhf.registry import Artifact
from rlhf.reward.evaluate import mean_logprobs

USAGE = "usage: python -m rlhf.doctor preflight --config FILE [--option value ...], FILE and options of a stage"
STAGES: dict[str, Any] = {"pretrain": PretrainConfig, "sft": SFTConfig, "reward": RewardConfig, "ppo": PPOConfig}
#: Rows of data among which a few are chosen.
_AMONG = 64


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What the preflight of every stage stands on."""

    config: StageConfig
    compute: Compute
    folder: Path
    """Of the run; small files are written there and removed again."""
    registry: Path
    """Root of the registry."""
    parents: Sequence[Artifact]
    tokenizer: PreTrainedTokenizerBase
    training: Mapping[str, Loaded]
    """Name -> rows that this stage trains on."""
    validation: Loaded

    @property
    def pad_token_id(self) -> int:
        """Token id of padding."""
        return int(self.tokenizer.pad_token_id)

    @property
    def quantized(self) -> bool:
        """Whether this run or a parent's holds its base in fewer bits: their outputs then differ by more than rounding."""
        return any(
            held != "none"
            for held in (self.config.quantization, *(p.manifest.config["quantization"] for p in self.parents))
        )


def few(lengths: Sequence[int], count: int) -> list[int]:
    """Numbers of a few short rows of different lengths: enough to see what is wrong, and quick."""
    order = sorted(range(min(len(lengths), _AMONG)), key=lambda i: lengths[i])
    short = order[: max(count, len(order) // 2)]
    return short[:: max(1, len(short) // count)][:count]


def check_data(ground: Ground, model: PreTrainedModel, *, by: str) -> list[Check]:
    """The checks of tokenizer, template and data.

    Args:
        by: what must not be trained on and judged: `prompt` (in any stage), or `row` (in this one).
    """
    data = parents_data(ground.parents)
    training = dict(ground.training)
    if by == "prompt":
        for reference, sets in data.items():
            if not isinstance(sets, str):
                training[f"the training rows of {reference}"] = sets["train"]
    # The SFT stage's only parent is the judge of its checkpoints, which reads texts through a tokenizer of its own.
    sharing = [] if isinstance(ground.config, SFTConfig) else ground.parents
    prompts = (row["prompt"] for row in next(iter(ground.training.values())).rows)
    checks = [
        check_tokenizers(ground.tokenizer, sharing, int(cast(Any, model.get_input_embeddings()).weight.shape[0])),
        check_template(ground.tokenizer, prompts),
        check_leaks(ground.config.dataset, ground.validation, training, by=by),
    ]
    return checks + ([check_registered(ground.parents, data)] if data else [])


def check_policy(ground: Ground, policy: PreTrainedModel) -> list[Check]:
    """That the SFT policy, merged and plain, answers its probe as it did when it was trained; nothing without a probe."""
    (artifact,) = [parent for parent in ground.parents if parent.manifest.stage == "sft"]
    probe = read_probe(artifact)
    if probe is None or ground.quantized:
        return []
    now = likelihoods(ground, policy, probe.rows, probe.prompt_lengths)
    return [check_probe(artifact.reference, now, probe.values, probe.dtype, ground.compute)]


def likelihoods(
    ground: Ground, policy: PreTrainedModel, rows: Sequence[Sequence[int]], prompt_lengths: Sequence[int]
) -> Tensor:
    """(n,) mean log-likelihood of the answers, nats a token, of token rows (prompt and answer)."""
    return mean_logprobs(
        policy,
        rows,
        prompt_lengths,
        torch.arange(len(rows)),
        pad_token_id=ground.pad_token_id,
        compute=ground.compute,
        batch_size=len(rows),
    )


def stage_of(options: Iterable[str]) -> str:
    """The stage that options belong to: only SFT names a base model, only PPO a reward, and pretraining not even a policy."""
    names = set(options)
    if "model_name_or_path" in names:
        return "sft"
    return "ppo" if "reward" in names else "reward" if "policy" in names else "pretrain"


def parse(argv: Sequence[str]) -> tuple[str, TrainingConfig]:
    """The stage and its config, from `--config FILE` and `--option value`."""
    files = [argv[i + 1] for i, word in enumerate(argv[:-1]) if word == "--config"]
    if not files:
        raise UserError(USAGE)
    words = [word.removeprefix("--").split("=")[0] for word in argv if word.startswith("--")]
    stage = stage_of([*words, *(name for file in files for name in read_yaml(file))])
    return stage, parse_config(STAGES[stage], list(argv))


def run(stage: str, config: TrainingConfig) -> None:
    """Builds a stage as it would run, checks it, and stops before the training; the run's own folder is not touched.

    Raises:
        UserError: checks failed.
    """
    place = Path(config.output_dir).absolute()
    beside = next(p for p in (place, *place.parents) if p.is_dir())  # on the disk that the checkpoints will be on
    with tempfile.TemporaryDirectory(prefix=".preflight-", dir=beside) as folder:
        rehearsal = dataclasses.replace(config, output_dir=folder, wandb_mode="disabled", resume=False, preflight=True)
        importlib.import_module(f"rlhf.stages.{stage}").run(rehearsal, only_preflight=True)
    print(f"preflight passed: {stage}/{config.name} can start")


def main() -> None:
    """Command line."""
    if {"-h", "--help"} & set(sys.argv):
        print(USAGE)
    else:
        run(*parse(sys.argv[1:]))


if __name__ == "__main__":
    run_command(main)
