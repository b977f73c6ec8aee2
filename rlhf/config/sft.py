"""Options of supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, ClassVar

from rlhf.base.errors import UserError, did_you_mean, require
from rlhf.base.text_files import text_lines
from rlhf.config.limits import divides, require_at_least
from rlhf.config.options import StageConfig, TrainingLength, option


@dataclass(kw_only=True)
class SFTConfig(TrainingLength, StageConfig):
    """Supervised fine-tuning on demonstrations, with the loss on the answers only."""

    GROUPS: ClassVar = {"model_name_or_path": "model", "selection_reward": "evaluation"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_length()
        divides("eval_steps", self.eval_steps, "save_steps", self.save_steps)
        require_at_least(1, self, "selection_samples", "response_length")
        require_at_least(0, self, "learn_tokens")
        require(
            not (self.new_tokens and self.learn_tokens),
            "new tokens come from new_tokens or learn_tokens; leave out one of them",
        )
        require(
            self.template_date is None or is_date(self.template_date),
            f"template_date must be a date like 2026-01-31, got '{self.template_date}'",
        )

    def recipe(self) -> dict[str, Any]:
        """Return the options that decide the result, with the tokens of the file `new_tokens`."""
        tokens = read_new_tokens(self.new_tokens) if self.new_tokens else []
        options = super().recipe()
        if self.template_date is None:  # the day of the training is no choice
            del options["template_date"]
        return {**options, "added_tokens": tokens}

    model_name_or_path: str = option(
        "base model: hub name, folder, pypi:smollm2-135m-instruct, or pretrain/NAME of the registry"
    )
    model_revision: str | None = option("revision of a hub model", None)
    chat_template: str | None = option("chat template: 'chatml', 'plain' or a file; default: the model's own", None)
    template_date: str | None = option(
        "date, as YYYY-MM-DD, for a chat template that writes today's; default: the day of the training, for all later stages",
        None,
    )
    trust_remote_code: bool = option("run code that comes with a hub model", False)
    new_tokens: str | None = option(
        "text file of tokens to add to the vocabulary, one per line; their embeddings start from the mean of their pieces and "
        "are trained with the adapter",
        None,
    )
    learn_tokens: int = option(
        "number of tokens to learn from the training answers and add, in place of new_tokens: first characters that take "
        "several tokens, then sequences of characters",
        0,
    )
    selection_reward: str | None = option(
        "reward model that chooses the checkpoint by its mean score of sampled answers, in place of the held-out loss "
        "(InstructGPT, section 3.5): reward/NAME or reward/NAME@VERSION",
        None,
    )
    selection_samples: int = option("answers to held-out prompts sampled at each evaluation for selection_reward", 64)
    response_length: int = option("longest answer sampled for selection_reward, tokens", 48)


def is_date(text: str) -> bool:
    """Return whether a text is a date as YYYY-MM-DD."""
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def read_new_tokens(file: str) -> list[str]:
    """Return the tokens of a text file that has one on each line.

    Raises:
        UserError: a missing file, or an empty or repeated line.
    """
    place = Path(file).expanduser()
    if not place.is_file():
        siblings = [str(p) for p in place.parent.glob("*")]
        raise UserError(f"no file {file} with new tokens{did_you_mean(file, siblings)}")
    tokens = list(text_lines(place)) or [""]
    first: dict[str, int] = {}
    for number, token in enumerate(tokens, start=1):
        if not token.strip():
            raise UserError(f"{file}, line {number}: an empty token; delete the line")
        if token in first:
            raise UserError(f"{file}, line {number}: '{token}' is on line {first[token]} already; delete one of them")
        first[token] = number
    return tokens
