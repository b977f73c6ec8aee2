"""Options of the reward model and of its report card."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rlhf.base.errors import require
from rlhf.config.limits import require_at_least
from rlhf.config.options import RunConfig, StageConfig, TrainingLength, option


@dataclass(kw_only=True)
class CardConfig:
    """What the report card of a reward model measures. The parts that cost forward passes of their own are limited."""

    eval_rating_difference: float = option("accuracy is measured on pairs whose ratings differ by at least this", 1.0)
    slice_columns: list[str] = field(
        default_factory=lambda: ["source", "prompt_group"],
        metadata={"help": "columns of the data, where it has them, by whose values accuracy is listed"},
    )
    card_policy_samples: int = option(
        "responses of the SFT policy whose scores are compared with those of twice as many training responses", 64
    )
    card_likelihood_responses: int = option("held-out responses on which the SFT model's likelihood is the rival", 256)
    card_probe_answers: int = option("held-out answers that each hack probe is tried on", 24)
    response_length: int = option("longest response sampled from the SFT policy, tokens", 48)
    gold: str | None = option(
        "an independent scorer to compare with: package.module:function(responses) -> scores", None
    )

    def check_card(self) -> None:
        """Raises `UserError` for sizes that measure nothing."""
        sizes = ("card_policy_samples", "card_likelihood_responses", "card_probe_answers", "response_length")
        require_at_least(1, self, *sizes)
        require_at_least(0, self, "eval_rating_difference")


@dataclass(kw_only=True)
class RewardConfig(CardConfig, TrainingLength, StageConfig):
    """A reward model on the SFT policy, trained on rankings of K responses to a prompt."""

    policy: str = option("the SFT policy it starts from: sft/NAME or sft/NAME@VERSION")
    finetuning: Literal["lora", "full"] = option(
        "lora: an adapter and a head on the frozen policy; full: all weights, in fp32, with about a tenth of the step size",
        "lora",
    )
    min_rating_difference: float = option(
        "pairs whose ratings differ by less are left out as ties, in units of the ratings", 0.0
    )
    min_responses: int = option("rankings of fewer responses are left out of training, 2 keeps all", 2)
    margin_per_rating: float = option(
        "scores must differ by this for each unit that the ratings differ (Llama 2, section 3.2.2); 0 asks for order only",
        0.0,
    )
    label_smoothing: float = option("share of pairs taken to be labelled the wrong way round, below 0.5", 0.0)
    center_rewards_coefficient: float = option(
        "weight of the squared sum of a pair's scores, which keeps scores near 0 (TRL; Eisenstein et al. 2023: 0.01)",
        0.0,
    )
    weight_by_agreement: bool = option(
        "weigh a pair by how much its raters agree, 1 all and 0 half and half; the data needs rater_ratings", False
    )
    normalize_on: Literal["demonstrations", "policy"] = option(
        "responses whose mean score becomes 0: demonstrations (InstructGPT), or the SFT policy's own (Ziegler et al. 2019)",
        "demonstrations",
    )
    normalize_std: bool = option("scale scores to standard deviation 1 on those responses, too", True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_length()
        self.check_card()
        require(
            0 <= self.label_smoothing < 0.5, f"label_smoothing must be from 0 to below 0.5, got {self.label_smoothing}"
        )
        require_at_least(0, self, "min_rating_difference", "margin_per_rating", "center_rewards_coefficient")
        require_at_least(2, self, "min_responses")
        require(
            self.finetuning == "lora" or self.quantization == "none",
            f"finetuning full cannot train weights that are held in {self.quantization}; use finetuning lora",
        )


@dataclass(kw_only=True)
class RewardCardConfig(CardConfig, RunConfig):
    """The report card of a registered reward model on any comparisons."""

    model: str = option("the reward model: reward/NAME or reward/NAME@VERSION")
    data: str = option("comparisons: folder, data file or hub name; their train split feeds the baselines")
    output_dir: str = option("folder for card.json, scores.jsonl and report.html", "outputs/reward_card")
    per_device_eval_batch_size: int = option("responses a forward pass", 32)
    max_length: int = option("longest prompt + response, tokens; longer rankings are left out and counted", 1024)

    def __post_init__(self) -> None:
        self.check_card()
        require_at_least(1, self, "per_device_eval_batch_size", "max_length")
