"""Data sheets of PPO: what a rollout holds, and what each metric means.

Legend: B responses, P padded prompt, R padded response, T = P + R, V vocabulary. Masks are boolean, True = counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlhf.models.sequences import Sequences


@dataclass(frozen=True, kw_only=True)
class Rollout(Sequences):
    """One batch of episodes as the optimiser sees it. Nothing here carries a gradient, and nothing changes over its epochs."""

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
    """(B, R) V(s_t), read before token t; units of the score."""
    raw_scores: Tensor
    """(B,) the reward model's normalised score, before penalties."""
    scores: Tensor
    """(B,) the score that is optimised: raw score less the penalties for a missing stop token and for short responses."""
