"""Options of `rlhf generate` and `rlhf chat`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from rlhf.base.errors import require
from rlhf.config import CHECKS, ComputeConfig, option, require_above_zero, require_at_least


@dataclass(kw_only=True)
class GenerationConfig(ComputeConfig):
    """Models, and the sampling of their answers."""

    GROUPS: ClassVar = {"model": "model", "system": "sampling", "reward": "reward"}

    model: str | None = option(
        "the model: an artefact (pretrain/NAME, sft/NAME, ppo/NAME), a folder or a hub name", None
    )
    compare: list[str] = field(
        default_factory=list,
        metadata={
            "help": "several models instead of one; all sample with the same random numbers, and are shown side by side"
        },
    )
    chat_template: str | None = option(
        "chat template: the model's own if not given, 'chatml', 'plain', or a file", None
    )
    trust_remote_code: bool = option("run code that comes with a hub model", False)
    system: str | None = option("system prompt", None)
    temperature: float = option("sampling temperature; 0 takes the likeliest token", 1.0)
    top_p: float = option("tokens are drawn from the likeliest ones that together have this probability", 1.0)
    response_length: int | None = option(
        "longest answer, tokens, stop token included; default: 256, or half of the model's context if that is less",
        None,
    )
    stop_strings: list[str] = field(
        default_factory=list,
        metadata={"help": "texts that end an answer, besides the model's stop tokens; kept in the answer"},
    )
    reward: str | None = option(
        "scores the answers: reward/NAME, package.module:function, a classifier or a URL; default with compare: the reward "
        "of the first PPO policy",
        None,
    )
    reward_timeout: float = option("seconds that an endpoint may take for a request", 60.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            (self.model is None) != (not self.compare),
            "name a model: --model NAME, or several: --compare NAME NAME ...",
        )
        require_at_least(0, self, "temperature")
        require(0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, got {self.top_p}")
        require_at_least(1, self, "response_length")
        require_above_zero(self, "reward_timeout")
        require(all(self.stop_strings), "a stop string is empty: every answer would end at once")

    @property
    def names(self) -> list[str]:
        """Names of all models."""
        return self.compare or [str(self.model)]


@dataclass(kw_only=True)
class GenerateConfig(GenerationConfig):
    """Answers to prompts, shown as they come or written to a file."""

    RENAMED: ClassVar = {"prompts": "dataset"}
    GROUPS: ClassVar = {
        "prompt": "data", "samples_per_prompt": "sampling", "check": "evaluation",
        "per_device_eval_batch_size": "computing",
    }  # fmt: skip

    prompt: list[str] = field(
        default_factory=list, metadata={"help": "texts to answer; without prompt and dataset, all of standard input"}
    )
    dataset: str | None = option(
        "prompts to answer: a .txt file, one a line; a .jsonl, .json, .csv or .parquet file with a column prompt or "
        "messages; or a folder made by rlhf data, of which the held-out prompts are taken",
        None,
    )
    output: str | None = option("file for the answers, JSON lines; default: standard output, as text", None)
    samples_per_prompt: int = option("answers to each prompt", 1)
    check: str | None = option(
        "compare the answers with the prompts' references: summarisation, translation, question_answering or "
        "classification, as in rlhf evaluate --checks; temperature 0 is usual",
        None,
    )
    per_device_eval_batch_size: int = option("answers a forward pass, where a file is written", 16)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not (self.prompt and self.dataset), "give the prompts once: --prompt TEXT, or --dataset FILE")
        require(
            self.check is None or (self.check in CHECKS and self.dataset is not None),
            f"check is one of {', '.join(CHECKS)}, and needs --dataset FILE with a column reference",
        )
        require_at_least(1, self, "samples_per_prompt", "per_device_eval_batch_size")


@dataclass(kw_only=True)
class ChatConfig(GenerationConfig):
    """A conversation, at a terminal or through a pipe, a line a turn."""

    GROUPS: ClassVar = {"history_tokens": "sampling", "load": "places and checkpoints"}

    history_tokens: int | None = option(
        "longest history with the new question, tokens: the oldest turns are left out, the system prompt never; default: "
        "the model's context without room for the answer",
        None,
    )
    load: str | None = option("file of a saved conversation to go on with", None)
    save: str | None = option("file in which the conversation is saved after every turn", None)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "history_tokens")
