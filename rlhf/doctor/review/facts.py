"""The facts that a review judges: options, sizes, and figures of the data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf.config import TrainingConfig, is_registered_reward

#: Width at which the reference step sizes hold, and their exponent: tinker-cookbook's `get_lr` for Llama models.
WIDTH, EXPONENT = 2000, 0.781
#: Step sizes at that width that suit full fine-tuning, and adapters of `ALPHA` at any rank (Schulman et al. 2025).
FULL_STEP, LORA_STEP, ALPHA = 5e-5, 5e-4, 32
#: GPT-3's step size at the width of its smallest model (Brown et al. 2020, table 2.1); wider ones take less in proportion.
PRETRAIN_STEP, PRETRAIN_WIDTH = 6e-4, 768
#: Start of PPO's warm-up as a share of the peak.
_PPO_START = 0.1


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts of a run before it trains."""

    stage: str
    config: TrainingConfig
    width: int | None = None
    """Hidden size of the base model."""
    rows: int | None = None
    """Training rows."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Figures of the data by name."""
    details: Mapping[str, str] = field(default_factory=dict)
    """Words that follow a figure in the review."""

    def option(self, name: str) -> Any:
        """Return an option's value; None where the stage has no such option."""
        return getattr(self.config, name, None)

    def figure(self, name: str) -> float | None:
        """Return a figure of the data, if it could be computed."""
        return self.figures.get(name)

    @property
    def rollouts(self) -> int | None:
        """Rollouts of a PPO run."""
        return self.option("num_updates")

    @property
    def steps_a_rollout(self) -> int:
        """Optimiser updates on each rollout of PPO."""
        return self.option("num_ppo_epochs") * (self.option("rollout_batch_size") // self.option("minibatch_size"))

    @property
    def batch(self) -> int:
        """Rows of an optimiser update."""
        if self.stage == "ppo":
            return int(self.option("minibatch_size"))
        return int(self.option("per_device_train_batch_size") * self.option("gradient_accumulation_steps"))

    @property
    def steps(self) -> int | None:
        """Optimiser updates of the run; None where the rows that decide it are unknown."""
        if self.rollouts is not None:
            return self.rollouts * self.steps_a_rollout
        if self.option("max_steps") > 0:
            return int(self.option("max_steps"))
        return None if self.rows is None else math.ceil(self.rows / self.batch * self.option("num_train_epochs"))

    @property
    def epochs(self) -> float | None:
        """Passes over the training rows."""
        if self.rows and self.stage != "ppo" and self.option("max_steps") > 0:
            return float(self.option("max_steps") * self.batch / self.rows)
        return self.option("num_train_epochs")

    @property
    def warmup_share(self) -> float | None:
        """Warm-up as a share of the run's updates."""
        return self.config.warmup_steps / self.steps if self.steps else None

    @property
    def peak(self) -> float:
        """Largest step size that the schedule reaches, as a share of `learning_rate`."""
        share = self.warmup_share
        if share is None or share <= 1:
            return 1.0
        start = _PPO_START if self.stage == "ppo" else 0.0
        return start + (1 - start) / share

    def relative_step(self, learning_rate: float | None) -> float | None:
        """Return a step size as a multiple of the one that suits the model's width and the way it is trained.

        Adam moves an adapter's weights by the step size, and the layer by alpha / rank times that, in rank directions.
        """
        if not self.width or not learning_rate:
            return None if learning_rate else learning_rate  # 0 is too small for any width
        if self.stage == "pretrain":
            return learning_rate / (PRETRAIN_STEP * PRETRAIN_WIDTH / self.width)
        scale = (WIDTH / self.width) ** EXPONENT
        if self.option("finetuning") == "full":
            return learning_rate / (FULL_STEP * scale)
        alpha = self.option("lora_alpha") * (math.sqrt(self.option("lora_r")) if self.option("use_rslora") else 1)
        return float(learning_rate * alpha / ALPHA / (LORA_STEP * scale))

    @property
    def reach(self) -> float | None:
        """Relative step size times updates: how far the weights can go."""
        relative = self.relative_step(self.config.learning_rate)
        return None if relative is None or self.steps is None else relative * self.steps * self.peak

    @property
    def answer_tokens(self) -> float:
        """Mean length of answers in tokens: of the SFT model's, of the demonstrations, else half of `response_length`."""
        tokens = self.figure("sampled_tokens") or self.figure("answer_tokens") or self.option("response_length") / 2
        return float(min(tokens, self.option("response_length")))

    @property
    def spread(self) -> float | None:
        """Standard deviation of the score: measured on SFT answers, else 1 for a registered reward model alone."""
        if (measured := self.figure("score_spread")) is not None:
            return measured
        rewards, weights = self.option("reward"), self.option("reward_weights")
        alone = len(rewards) == 1 and is_registered_reward(rewards[0])
        return abs(weights[0]) if alone and weights else 1.0 if alone else None

    @property
    def pull(self) -> float | None:
        """Spread of the clipped score over `kl_coef`; the KL at the optimum of a Gaussian score is half its square, nats.

        The optimum is the reference times exp(score / kl_coef), up to a constant (Ziegler et al. 2019, section 2.2; Korbak
        et al. 2022). For a score of N(0, s) that shifts the mean by s * s / kl_coef, and the KL is (s / kl_coef)^2 / 2.
        """
        coefficient, spread = self.option("kl_coef"), self.spread
        if not spread or not coefficient:
            return None
        clip = self.option("reward_clip")
        return min(spread, clip or math.inf) / coefficient
