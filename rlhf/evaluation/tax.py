"""The alignment tax: what a policy lost on plain text and on benchmark tasks."""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.base import intervals
from rlhf.base.errors import UserError, did_you_mean
from rlhf.base.intervals import Array
from rlhf.models.compute import Compute
from rlhf.models.likelihood import mean_logprobs

#: Longest piece of plain text that is read at once, tokens.
WINDOW = 512
PLAIN_TEXT = Path(__file__).with_name("plain.txt")


def text_windows(tokenizer: PreTrainedTokenizerBase, file: Path, context: int = WINDOW) -> list[list[int]]:
    """Token rows of the paragraphs of a plain text, without a chat template; long ones in pieces of `WINDOW` tokens, or of the
    model's context where that is less.

    Raises:
        UserError: no such file, or nothing in it.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the plain text {file}: {error}") from error
    rows = [tokenizer(part.strip())["input_ids"] for part in text.split("\n\n") if part.strip()]
    longest = min(WINDOW, context)
    pieces = [row[i : i + longest] for row in rows for i in range(0, len(row), longest)]
    pieces = [piece for piece in pieces if len(piece) > 1]  # nothing precedes the first token that could predict it
    if not pieces:
        raise UserError(f"the plain text {file} has no paragraph of two tokens")
    return pieces


def text_logprobs(
    model: PreTrainedModel, rows: Sequence[list[int]], *, pad_token_id: int, compute: Compute, batch_size: int
) -> list[float]:
    """Mean log-likelihood a token of each row, nats, its first token given."""
    numbers = torch.arange(len(rows))
    found = mean_logprobs(
        model, rows, [1] * len(rows), numbers, pad_token_id=pad_token_id, compute=compute, batch_size=batch_size
    )
    return [float(value) for value in found]


def perplexity(logprobs: Array, tokens: Array, groups: Array, seed: int = 0) -> dict[str, float | None] | None:
    """exp of the mean negative log-likelihood a token, with its interval over groups.

    Args:
        logprobs: (n,) means a token of each text, nats.
        tokens: (n,) how many tokens each mean is of.
        groups: (n,) which texts belong together.
    """
    found = intervals.mean(-logprobs, groups, seed, weights=tokens.astype(float))
    return found and {name: None if value is None else math.exp(value) for name, value in found.items()}


# Tasks


class Tasks:
    """Tasks of lm-evaluation-harness.

    Args:
        names: tasks or groups of tasks.
        folder: of `.yaml` task files; None: those that come with the harness, whose data it fetches.
        limit: examples of each task; None: all.

    Raises:
        UserError: the harness is not installed, or there is no such task.
    """

    def __init__(self, names: Sequence[str], folder: str | None, limit: int | None) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise UserError("tasks need lm-evaluation-harness: pip install 'rlhf[eval]'") from error
        if folder is not None and not Path(folder).is_dir():
            raise UserError(f"no task folder {folder}")
        self.names, self.limit = list(names), limit
        self.manager: Any = TaskManager(include_path=folder, include_defaults=folder is None)
        known = list(self.manager.all_tasks)
        for name in self.names:
            if name not in known:
                there = f" in {folder}: {', '.join(known[:8])}" if folder else ""
                raise UserError(f"no task '{name}'{did_you_mean(name, known)}{there}")

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, seed: int
    ) -> dict[str, dict[str, dict[str, float | None]]]:
        """Task -> metric -> `value` and `error` (its standard error, if the harness gives one)."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()):
            judged: Any = simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=self.names,
                task_manager=self.manager,
                limit=self.limit,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
                log_samples=False,
            )
        return {str(task): _metrics(figures) for task, figures in judged["results"].items()}


def _metrics(figures: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """The harness's `acc,none` and `acc_stderr,none` as one figure `acc`; a filter other than none stays in the name."""
    found: dict[str, dict[str, float | None]] = {}
    for key, value in figures.items():
        name, _, filter_ = key.partition(",")
        if not filter_ or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = figures.get(f"{name}_stderr,{filter_}")
        known = float(error) if isinstance(error, int | float) and math.isfinite(error) else None
        found[name if filter_ == "none" else key] = {"value": float(value), "error": known}
    return found
