"""Credit: how much each sampled token of a rollout is to be reinforced.

An estimator is a small callable (`Estimator`). The trainer and the preflight call it and hold no maths of their own; one that
needs no values gets a rollout whose values are zeros, and the value model is then neither run nor trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from torch import Tensor

from rlhf.config import PPOConfig
from rlhf.ppo import functional as F
from rlhf.ppo.types import Rollout


@dataclass(frozen=True, kw_only=True)
class Credit:
    """Targets of the losses; B responses, R padded response."""

    advantages: Tensor
    """(B, R) for the policy loss; 0 where masked."""
    returns: Tensor | None = None
    """(B, R) targets of the values, units of the score; None from an estimator that needs no values."""
    metrics: Mapping[str, float]
    """Figures for the log."""
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """(B, R) intermediate results by name, for the audit: `token_rewards`, `whitened_rewards`, `advantages` before whitening."""


class Estimator(Protocol):
    """An advantage estimator."""

    needs_values: ClassVar[bool]
    """The estimator reads `Rollout.values`, and returns targets to train them towards."""

    def __call__(self, rollout: Rollout, *, kl_coef: float) -> Credit:
        """Return the credit of a whole rollout, of all processes; `kl_coef` is the penalty per nat."""
        ...


@dataclass(frozen=True, kw_only=True)
class Gae:
    """Generalised advantage estimation on token rewards, whitened over the whole rollout."""

    needs_values: ClassVar[bool] = True
    gamma: float
    lam: float
    whiten_rewards: bool = False
    """Give the token rewards a spread of 1 first."""

    def __call__(self, rollout: Rollout, *, kl_coef: float) -> Credit:
        """Return whitened advantages, and returns, which are formed before whitening."""
        mask = rollout.mask
        rewards = F.token_rewards(rollout.scores, rollout.logprobs, rollout.ref_logprobs, mask, kl_coef=kl_coef)
        parts = {"token_rewards": rewards}
        if self.whiten_rewards:
            rewards = F.whiten_rewards(rewards, mask)
        advantages, returns = F.gae(rollout.values, rewards, mask, gamma=self.gamma, lam=self.lam)
        parts |= {"whitened_rewards": rewards, "advantages": advantages}
        whitened = F.whiten(advantages, mask)
        metrics = {
            "ppo/explained_variance": float(F.explained_variance(rollout.values, returns, mask)),
            "ppo/value_std": float(rollout.values[mask].std(correction=0)),
            "ppo/advantage_std": float(advantages[mask].std(correction=0)),
            "ppo/advantage_mean": float(F.masked_mean(whitened, mask)),
        }
        return Credit(advantages=whitened, returns=returns, metrics=metrics, parts=parts)


def estimator(config: PPOConfig) -> Estimator:
    """Return the advantage estimator of a run."""
    return Gae(gamma=config.gamma, lam=config.lam, whiten_rewards=config.whiten_rewards)
