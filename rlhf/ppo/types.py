"""The data sheet of PPO: a rollout.

Legend: B responses, P padded prompt, R padded response, T = P + R, V vocabulary. Masks are boolean, True = counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlhf.models.sequences import Sequences
from rlhf.ppo import functional as F


@dataclass(frozen=True, kw_only=True)
class Rollout(Sequences):
    """One batch of episodes as the optimiser sees it; it carries no gradient and stays as it is over all epochs."""

    prompt: Tensor
    """(B,) int64: which prompt each row answers, by its number in the training data."""
    stopped: Tensor
    """(B,) bool: the response ended in a stop token."""
    sampler_logprobs: Tensor
    """(B, R) log-probabilities under the sampler (merged weights): only to measure the gap to `logprobs`; nats."""
    logprobs: Tensor
    """(B, R) old log-probabilities, recomputed by the training forward; nats."""
    ref_logprobs: Tensor
    """(B, R) log-probabilities under the SFT reference (adapters off); nats."""
    entropy: Tensor
    """(B, R) entropy of the policy's next-token distribution; nats."""
    full_kl: Tensor
    """(B, R) KL(policy || reference) of the next-token distributions, over the whole vocabulary; nats."""
    values: Tensor
    """(B, R) V(s_t), read before token t; units of the score. Zeros for estimators that need no values."""
    raw_scores: Tensor
    """(B,) the reward model's normalised score, before penalties."""
    scores: Tensor
    """(B,) the score that is optimised: raw score less the penalties for a missing stop token and for short responses."""

    @property
    def kl(self) -> Tensor:
        """KL to the reference (B,), nats a response: log-ratios (k1) summed over its sampled tokens."""
        return F.masked_sum(F.kl_k1(self.logprobs, self.ref_logprobs), self.mask, dim=1)

    @property
    def exact_kl(self) -> Tensor:
        """KL to the reference (B,), nats a response: exact next-token KLs summed over its tokens."""
        return F.masked_sum(self.full_kl, self.mask, dim=1)
