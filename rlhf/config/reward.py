"""Options of the reward model and of its report card."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from rlhf.base.errors import require
from rlhf.config.limits import require_at_least
from rlhf.config.options import RunConfig, StageConfig, TrainingLength, option


@dataclass(kw_only=True)
class CardConfig:
    """Options of a reward model's report card."""

    GROUPS: ClassVar = {"eval_rating_difference": "report card"}

    eval_rating_difference: float = option("least difference in rating of the pairs that accuracy is measured on", 1.0)
    slice_columns: list[str] = option(
        "columns of the data by whose values accuracy is listed; missing ones are skipped", ["source", "prompt_group"]
    )
    card_policy_samples: int = option(
        "SFT responses whose scores are compared with those of twice as many training responses", 64
    )
    card_likelihood_responses: int = option(
        "held-out responses for comparison with the SFT model's likelihood as a score", 256
    )
    card_probe_answers: int = option("held-out responses that each hack probe changes", 24)
    response_length: int = option("longest response sampled from the SFT policy, tokens", 48)
    gold: str | None = option("independent scorer to compare with: package.module:function(responses) -> scores", None)

    def check_card(self) -> None:
        """Raise `UserError` for sizes that leave nothing to measure."""
        sizes = ("card_policy_samples", "card_likelihood_responses", "card_probe_answers", "response_length")
        require_at_least(1, self, *sizes)
        require_at_least(0, self, "eval_rating_difference")


@dataclass(kw_only=True)
class RewardConfig(CardConfig, TrainingLength, StageConfig):
    """Training of a reward model on rankings of K responses to a prompt, starting from the SFT policy."""

    GROUPS: ClassVar = {"policy": "model", "min_rating_difference": "data", "margin_per_rating": "ranking loss"}

    policy: str = option(
        "the SFT policy it starts from: sft/NAME or sft/NAME@VERSION; default: the one of this run's name", ""
    )
    finetuning: Literal["lora", "full"] = option(
        "lora: an adapter and a head on the frozen policy; full: all weights in fp32 (use about a tenth of the step size)",
        "lora",
    )
    min_rating_difference: float = option(
        "least difference in rating of a training pair; closer ones are ties and left out", 0.0
    )
    min_responses: int = option("fewest responses of a training ranking; 2 keeps all rankings", 2)
    margin_per_rating: float = option(
        "margin of the scores per unit of difference in rating (Llama 2, section 3.2.2); 0 trains the order only", 0.0
    )
    label_smoothing: float = option("assumed share of pairs labelled the wrong way round, below 0.5", 0.0)
    center_rewards_coefficient: float = option(
        "weight of the squared sum of a pair's scores, which centres scores at 0 (TRL; Eisenstein et al. 2023: 0.01)",
        0.0,
    )
    weight_by_agreement: bool = option(
        "weight each pair by its raters' agreement, from 0 (split in half) to 1; needs rater_ratings in the data", False
    )
    normalize_on: Literal["demonstrations", "policy"] = option(
        "responses whose mean score is shifted to 0: demonstrations (InstructGPT) or SFT responses (Ziegler et al. 2019)",
        "demonstrations",
    )
    normalize_std: bool = option("also scale scores to standard deviation 1 on those responses", True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.policy = self.policy or f"sft/{self.name}"
        self.check_length()
        self.check_card()
        require(
            0 <= self.label_smoothing < 0.5, f"label_smoothing must be from 0 to below 0.5, got {self.label_smoothing}"
        )
        require_at_least(0, self, "min_rating_difference", "margin_per_rating", "center_rewards_coefficient")
        require_at_least(2, self, "min_responses")
        require(
            self.finetuning == "lora" or self.quantization == "none",
            f"finetuning full cannot train weights in {self.quantization}; use finetuning lora",
        )


@dataclass(kw_only=True)
class RewardCardConfig(CardConfig, RunConfig):
    """Report card of a registered reward model on any comparisons."""

    RENAMED: ClassVar = {"data": "dataset"}
    GROUPS: ClassVar = {
        "model": "model", "dataset": "data", "output_dir": "places and checkpoints",
        "per_device_eval_batch_size": "computing", "max_length": "data",
    }  # fmt: skip

    model: str = option("the reward model: reward/NAME or reward/NAME@VERSION")
    dataset: str = option("comparisons: folder, data file or hub name; their train split feeds the baselines")
    output_dir: str = option("folder for card.json, scores.jsonl and report.html", "outputs/reward_card")
    per_device_eval_batch_size: int = option("responses per forward pass", 32)
    max_length: int = option(
        "longest prompt + response, tokens; rankings with longer ones are left out and counted", 1024
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_card()
        require_at_least(1, self, "per_device_eval_batch_size", "max_length")
