"""The alignment tax: a policy's loss on plain text and on benchmark tasks."""

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
from rlhf.base.errors import UserError, did_you_mean, install
from rlhf.base.intervals import Array
from rlhf.base.json_files import finite_number
from rlhf.base.text_files import text_lines
from rlhf.models.compute import Compute
from rlhf.models.likelihood import mean_logprobs

#: Longest window of plain text, tokens.
WINDOW = 512
PLAIN_TEXT = Path(__file__).with_name("plain.txt")


def text_windows(tokenizer: PreTrainedTokenizerBase, file: Path, context: int = WINDOW) -> list[list[int]]:
    """Return token rows of a plain text's paragraphs, without a chat template.

    Long paragraphs are split into windows of `WINDOW` tokens, or of the model's context if that is less.

    Raises:
        UserError: no such file, or nothing in it.
    """
    try:
        text = "\n".join(text_lines(file))
    except OSError as error:
        raise UserError(f"cannot read the plain text {file}: {error}") from error
    rows = [tokenizer(part.strip())["input_ids"] for part in text.split("\n\n") if part.strip()]
    longest = min(WINDOW, context)
    pieces = [row[i : i + longest] for row in rows for i in range(0, len(row), longest)]
    pieces = [piece for piece in pieces if len(piece) > 1]  # the first token has nothing that predicts it
    if not pieces:
        raise UserError(f"the plain text {file} has no paragraph of two tokens")
    return pieces


def text_logprobs(
    model: PreTrainedModel, rows: Sequence[list[int]], *, pad_token_id: int, compute: Compute, batch_size: int
) -> list[float]:
    """Return the mean log-likelihood a token of each row after its first, nats."""
    numbers = torch.arange(len(rows))
    return mean_logprobs(
        model, rows, [1] * len(rows), numbers, pad_token_id=pad_token_id, compute=compute, batch_size=batch_size
    ).tolist()


def perplexity(logprobs: Array, tokens: Array, groups: Array, seed: int = 0) -> dict[str, float | None] | None:
    """Return exp of the mean negative log-likelihood a token, with its interval over groups; None without texts.

    Args:
        logprobs: (n,) mean log-likelihood a token of each text, nats.
        tokens: (n,) tokens of each text.
        groups: (n,) group of each text; the bootstrap draws whole groups.
    """
    loss = intervals.mean(-logprobs, groups, seed, weights=tokens.astype(float))
    return loss and {name: None if value is None else math.exp(value) for name, value in loss.items()}


# Tasks


class Tasks:
    """Tasks of lm-evaluation-harness.

    Args:
        names: tasks or groups of tasks.
        folder: folder of `.yaml` task files; None: the harness's own tasks, whose data it downloads.
        limit: examples of each task; None: all.

    Raises:
        UserError: the harness is not installed, or there is no such task.
    """

    def __init__(self, names: Sequence[str], folder: str | None, limit: int | None) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise UserError(f"tasks need lm-evaluation-harness: {install('eval')}") from error
        if folder is not None and not Path(folder).is_dir():
            raise UserError(f"no task folder {folder}")
        self.names, self.limit = list(names), limit
        self.manager: Any = TaskManager(include_path=folder, include_defaults=folder is None)
        tasks = list(self.manager.all_tasks)
        for name in self.names:
            if name not in tasks:
                choice = f" in {folder}: {', '.join(tasks[:8])}" if folder else ""
                raise UserError(f"no task '{name}'{did_you_mean(name, tasks)}{choice}")

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, seed: int
    ) -> dict[str, dict[str, dict[str, float | None]]]:
        """Return task -> metric -> `value` and `error` (its standard error, if the harness has one)."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()):
            outcome: Any = simple_evaluate(
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
        return {str(task): _metrics(figures) for task, figures in outcome["results"].items()}


def _metrics(figures: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Return the harness's `acc,none` and `acc_stderr,none` as one figure `acc`; other filters stay in the name."""
    metrics: dict[str, dict[str, float | None]] = {}
    for key, value in figures.items():
        name, _, filter_ = key.partition(",")
        if not filter_ or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = figures.get(f"{name}_stderr,{filter_}")
        metrics[name if filter_ == "none" else key] = {"value": float(value), "error": finite_number(error)}
    return metrics
