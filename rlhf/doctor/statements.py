"""Statements: what the doctor established about one thing of a run, kept in the run's folder.

The audit recomputes quantities, the review looks at what was given, the investigation experiments. Each appends its
statements to `doctor.jsonl` of the stage's folder, good ones too; `rlhf.doctor.diagnosis` puts those that failed before the
symptoms that they explain.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rlhf.base.reading import FolderReader
from rlhf.run.tracker import STATEMENTS

Part = Literal["audit", "review", "investigation"]
#: Beginning of `measured` of a thing that could not be looked at: its statement passed, and excludes nothing.
NOT_EXAMINED = "not examined"
#: Names of all that the review and the audit look at; here, so that the option `doctor` is read without them.
# fmt: off
NAMES = (
    "adam_beta1", "adam_beta2", "adam_epsilon", "advantages", "batch", "centering", "clip_range", "clipped",
    "commonest_answer", "contradictions", "cut_answers", "dropout", "echoes", "ema_decay", "empty", "epochs",
    "few_prompts", "frozen_weights", "gamma", "garbled", "gradient", "gradient_clipping", "gradients_zeroed",
    "judge_agrees", "judge_score", "kl_coef", "kl_horizon", "kl_target", "label_noise", "label_smoothing", "labels",
    "lam", "learning_rate", "length_score", "longer_wins", "lora_dropout", "lora_rank", "loss", "margin", "max_approx_kl",
    "max_grad_norm", "min_response_length", "minibatches", "missing_eos_penalty", "no_penalty", "normalization",
    "old_logprobs", "optimizer_step", "padding", "policy_loss", "prompt_shift", "prompts", "ptx_coef", "random_numbers",
    "rater_reliability", "ratings", "raw_scores", "reach", "ref_logprobs", "related", "rendered", "repeated_rows",
    "response_length", "response_mask", "returns", "reuse", "reward_clip", "reward_constant", "reward_scale", "rollout",
    "rollouts_differ", "rows_drawn", "same_responses", "sampling", "saved_scores", "schedule", "scores", "short_penalty",
    "splits_agree", "splits_differ", "temperature", "ties", "token_rewards", "tokens", "too_long", "trunk_share",
    "unclear", "unfinished", "updates", "updates_a_rollout", "value_clip", "value_learning_rate", "value_loss",
    "value_warmup", "values", "warmup", "weight_decay", "weights_kept", "whiten_rewards", "whitened_advantages",
    "whitened_rewards",
)
# fmt: on


@dataclass(frozen=True, kw_only=True)
class Statement:
    """The result of looking at one thing of a run."""

    part: Part
    name: str
    """Thing that was looked at, one name in every run: `advantages`, `reward_scale`."""
    passed: bool
    measured: str
    """What was measured, with its limit."""
    severity: Literal["critical", "warning", "note"] = "critical"
    """Of one that failed. A note is worth reading, and no finding."""
    cause: str = ""
    """Why it failed, a sentence without a full stop; as the other texts, empty where it passed."""
    action: str = ""
    explains: list[str] = field(default_factory=list)
    """Health checks, and statements, that are consequences of it where it failed."""
    source: str = "-"
    """Paper or code that says what it should be."""
    step: int = 0
    """Update at which it was looked at; 0 before the first."""

    @property
    def is_finding(self) -> bool:
        """Whether it failed, and is more than a note."""
        return not self.passed and self.severity != "note"

    @property
    def is_confirmed(self) -> bool:
        """Whether it was looked at and is right."""
        return self.passed and not self.measured.startswith(NOT_EXAMINED)


def append(folder: Path, statements: Iterable[Statement]) -> None:
    """Add statements to those of a stage's folder."""
    lines = "".join(json.dumps(dataclasses.asdict(statement)) + "\n" for statement in statements)
    try:
        with (folder / STATEMENTS).open("a", encoding="utf-8") as file:
            file.write(lines)
    except OSError as error:  # a full disk must not end a run that could go on
        print(f"doctor: {folder / STATEMENTS} cannot be written: {error.strerror}", file=sys.stderr, flush=True)


def read(reader: FolderReader) -> list[Statement]:
    """Return the statements of a stage's folder, oldest first; none where no file is."""
    return [Statement(**row) for row in reader.read_rows(STATEMENTS, Statement, expected=False)]


def newest(statements: Iterable[Statement]) -> list[Statement]:
    """Return the newest statement about each thing: of the audit at each update, of the other parts at any."""
    rows = {(s.part, s.name, s.step if s.part == "audit" else 0): s for s in statements}
    return list(rows.values())


def passed(statements: Iterable[Statement]) -> frozenset[str]:
    """Return the things, as `part:name`, that were right whenever they were looked at."""
    rows = newest(statements)
    failed = {(s.part, s.name) for s in rows if not s.passed}
    return frozenset(f"{s.part}:{s.name}" for s in rows if s.is_confirmed and (s.part, s.name) not in failed)
