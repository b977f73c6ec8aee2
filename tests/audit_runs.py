"""What the tests of PPO's audit share: short runs of the stage on the toy pipeline's artefacts."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest

from rlhf.base.errors import UserError
from rlhf.base.reading import FolderReader
from rlhf.config import PPOConfig, parse_config
from rlhf.doctor import statements as kept
from rlhf.doctor.statements import Statement
from rlhf.stages import ppo

RUN: dict[str, Any] = {
    "total_episodes": 24, "learning_rate": 3e-3, "dtype": "float32", "optim": "adamw_torch", "wandb_mode": "disabled",
    "preflight": False, "eval_steps": 0, "num_eval_samples": 2, "save_steps": 100, "audit_steps": 1, "num_logged_samples": 0,
    "missing_eos_penalty": 0.5, "whiten_rewards": True, "kl_target": 1.0, "kl_horizon": 100, "warmup_steps": 2,
}  # fmt: skip


def brevity(prompts: Sequence[Any], responses: Sequence[str], **columns: Any) -> list[float]:
    """A reward that compares responses with each other."""
    longest = max(map(len, responses))
    return [1 - len(text) / max(longest, 1) for text in responses]


def large(prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
    """A reward whose differences are small beside its size; the prompts that it was given are emptied."""
    for prompt in prompts:
        prompt.clear()
    return [10_000 + len(text) for text in responses]


_MET: set[str] = set()


def novelty(prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
    """A reward that remembers what it has met."""
    scores = [0.0 if text in _MET else 1.0 + len(text) for text in responses]
    _MET.update(responses)
    return scores


class Start(Protocol):
    def __call__(self, *, may_fail: bool = False, **options: Any) -> Path: ...


@pytest.fixture(scope="module")
def start(finished: tuple[Path, Path], toy_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """`start(**options)` makes a run of three updates; returns its stage folder, with sheets of the last two."""
    registry = tmp_path_factory.mktemp("audit") / "registry"
    shutil.copytree(finished[0], registry)
    count = iter(range(1000))

    def make(*, may_fail: bool = False, **options: Any) -> Path:
        number = next(count)
        place = {"registry": registry, "output_dir": registry.parent / f"run{number}", "name": f"run{number}"}
        words = {"--config": toy_config / "ppo.yaml", **{f"--{k}": v for k, v in {**RUN, **place, **options}.items()}}
        line = [str(w) for k, v in words.items() for w in (k, *(v if isinstance(v, list) else [v]))]
        config = parse_config(PPOConfig, line)
        try:
            ppo.run(config)
        except (UserError, RuntimeError):
            if not may_fail:
                raise
        return Path(config.output_dir) / "ppo"

    return make


def statements(folder: Path) -> list[Statement]:
    """What the audits of a run established."""
    return [one for one in kept.read(FolderReader(folder)) if one.part == "audit"]


def wrong(rows: Sequence[Statement], step: int | None = None) -> list[str]:
    """Names of what is accused, of one update or all."""
    accused = [one for one in rows if not one.passed and one.severity != "note"]
    return [one.name for one in accused if step in (None, one.step)]
