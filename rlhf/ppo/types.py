"""Data sheets of PPO: what a rollout holds, and what each metric means.

Legend: B responses, P padded prompt, R padded response, T = P + R, V vocabulary. Masks are boolean, True = counts.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Prompts (left-padded) with their responses (right-padded)."""

    prompts: Tensor
    """(B, P) int64, padded on the left."""
    prompt_mask: Tensor
    """(B, P) bool: True at the prompt's tokens."""
    responses: Tensor
    """(B, R) int64, the stop token included, padded on the right."""
    mask: Tensor
    """(B, R) bool: True at the response's tokens: a prefix of at least one token."""

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> Tensor:
        """(B,) tokens of prompt and response together."""
        return self.prompt_mask.sum(dim=1) + self.mask.sum(dim=1)

    @property
    def input_ids(self) -> Tensor:
        """(B, T)"""
        return torch.cat([self.prompts, self.responses], dim=1)

    @property
    def attention_mask(self) -> Tensor:
        """(B, T) bool"""
        return torch.cat([self.prompt_mask, self.mask], dim=1)

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        return type(self)(**{f.name: getattr(self, f.name).to(device) for f in dataclasses.fields(self)})

    def select(self, rows: Tensor) -> Self:
        """Some rows of every field, with the padding that they do not need cut off."""
        first = int(self.prompts.shape[1] - self.prompt_mask[rows].sum(dim=1).max())
        width = int(self.mask[rows].sum(dim=1).max())

        def cut(name: str) -> Tensor:
            tensor = getattr(self, name)[rows]
            if tensor.dim() == 1:
                return tensor
            return tensor[:, first:] if name.startswith("prompt") else tensor[:, :width]

        return type(self)(**{f.name: cut(f.name) for f in dataclasses.fields(self)})


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


def concatenate(parts: list[Sequences], pad_token_id: int) -> Sequences:
    """Sequences of several batches as one, re-padded to the widest."""
    width_p = max(p.prompts.shape[1] for p in parts)
    width_r = max(p.responses.shape[1] for p in parts)

    def widen(x: Tensor, width: int, left: bool, fill: int | bool) -> Tensor:
        gap = width - x.shape[1]
        return torch.nn.functional.pad(x, (gap, 0) if left else (0, gap), value=fill)

    return Sequences(
        prompts=torch.cat([widen(p.prompts, width_p, True, pad_token_id) for p in parts]),
        prompt_mask=torch.cat([widen(p.prompt_mask, width_p, True, False) for p in parts]),
        responses=torch.cat([widen(p.responses, width_r, False, pad_token_id) for p in parts]),
        mask=torch.cat([widen(p.mask, width_r, False, False) for p in parts]),
    )


def length_sorted_batches(lengths: Tensor, size: int, tokens: int | None = None) -> list[Tensor]:
    """Row numbers in batches of at most `size` rows, similar lengths together, so that little is computed on padding.

    With `tokens`, rows times the longest of them is at most that, too; a longer row is a batch of its own.
    """
    order = torch.argsort(lengths, descending=True, stable=True)
    if tokens is None:
        return list(order.split(size))
    counts: list[int] = []
    longest = 0
    for length in lengths[order].tolist():
        if not counts or counts[-1] == size or (counts[-1] + 1) * longest > tokens:
            counts.append(0)
            longest = length
        counts[-1] += 1
    return list(order.split(counts))


#: What each logged figure means. KL: summed over the response, mean over the batch, in nats.
METRICS = {
    "objective/score": "mean score of the rollout, penalties included; 0 is the demonstrations' mean",
    "objective/raw_score": "mean score before the penalties for a missing stop token and short responses",
    "objective/score_std": "spread of the scores in the rollout; near 0 there is nothing to learn from",
    "objective/length_correlation": "correlation of raw scores and response lengths in the rollout",
    "objective/kl": "log pi - log pi_ref on sampled tokens (k1), nats a response: the KL that is penalised",
    "objective/kl_k3": "the same KL by the low-variance estimator k3, nats a response",
    "objective/kl_full": "the same KL, exact over the vocabulary at each sampled prefix, nats a response",
    "objective/kl_coef": "coefficient of the KL penalty in this rollout; changes only with kl_target",
    "objective/entropy": "entropy of the policy, nats a token",
    "objective/rlhf_reward": "score - kl_coef * KL, mean over responses: what PPO maximises",
    "ppo/policy_loss": "clipped policy loss, mean over tokens",
    "ppo/value_loss": "clipped value loss, mean over tokens",
    "ppo/clipfrac": "share of tokens whose clipped policy loss is the larger one",
    "ppo/value_clipfrac": "share of tokens whose clipped value loss is the larger one",
    "ppo/approx_kl": "KL between the rollout's policy and the updated one (k3), nats a token",
    "ppo/ratio_mean": "mean probability ratio new/old",
    "ppo/ratio_max": "largest probability ratio new/old",
    "ppo/first_ratio_error": "largest |ratio - 1| before the first optimiser step: 0 up to rounding, else old logprobs are stale",
    "ppo/explained_variance": "share of the returns' variance that the old values explain; 1 is perfect, 0 useless",
    "ppo/value_std": "spread of the values over the rollout's tokens, units of the score",
    "ppo/advantage_std": "spread of the advantages before whitening, units of the score; near 0 there is nothing to learn from",
    "ppo/advantage_mean": "mean of the advantages that the optimiser gets; 0 up to rounding, as they are whitened",
    "ppo/grad_norm": "norm of the policy's gradient before clipping, largest of the rollout",
    "ppo/value_grad_norm": "norm of the value's gradient before clipping, largest of the rollout",
    "ppo/lr": "step size of the policy at the end of the rollout's updates",
    "ppo/value_lr": "step size of the value model at the end of the rollout's updates",
    "ppo/ptx_loss": "PPO-ptx: mean negative log-likelihood of the mixed-in texts, nats a token; 0 without ptx_coef",
    "ppo/early_stop": "1 if the rollout's updates ended early at max_approx_kl, else 0",
    "ppo/roll_backs": "times that the run went back to a checkpoint, at max_kl or on the doctor's order",
    "response/length": "tokens a response, stop token included",
    "response/stop_rate": "share of responses that end in a stop token",
    "response/distinct_2": "distinct word pairs over all word pairs of the rollout; falls when answers grow alike",
    "response/repetition": "share of a response's word triples that it has used before, mean over responses",
    "rollout/tokens_per_second": "sampled tokens a second",
    "rollout/logprob_gap": "mean |sampler - training forward| log-probability, nats a token",
    "rollout/surprise_gap": "mean of -log pi - entropy of sampled tokens, nats; 0 if they come from the policy that is scored",
    "rollout/surprise_error": "standard error of rollout/surprise_gap, nats a token",
    "rollout/pad_tokens": "pad tokens among the tokens that count, a response; 0",
    "time/rollout": "seconds of sampling",
    "time/score": "seconds of log-probabilities, values and scores",
    "time/optimise": "seconds of the optimiser epochs",
}
