"""Maths of PPO with a KL penalty: masks, entropy and KL, rewards and advantages, losses.

Pure functions of tensors and numbers, which mutate nothing and import nothing but torch.

Shapes: `B` sequences, `R` padded response length in tokens, `V` vocabulary; `...` is any leading shape.

Masks are boolean (B, R), True = counts, and every row is a non-empty prefix: True ... True False ... False.

- The result of a function with a mask is zero (or False) outside the mask, and depends neither in value nor in gradient
  on inputs there, NaN and inf included. Inputs are therefore zeroed *before* any arithmetic: zeroing afterwards would
  still send 0 * NaN = NaN backwards.
- Functions without a mask (`kl_*`, `entropy`, `full_kl`) never mix two positions, so `masked_sum` of their result leaves
  out padding. In a loss, NaN in their own input still gives that position a NaN gradient.
- NaN at a token that counts is never hidden.

Floats are computed and returned in at least fp32: lower precision is raised, float64 stays.

Errors: `ValueError` for shapes that differ (with both), and for a mask that is not boolean, not a prefix or has a row
without a token (with the row).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.base.tensors import check_shapes, upcast

# ---- masks -----------------------------------------------------------------------------------------------------------


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum x over the mask: all of it to a scalar, or along one dimension (dim=1: one sum per sequence, (B,)).

    Args: x (B, R), floating or boolean; mask (B, R). The gradient is zero outside the mask.
    """
    check_shapes(mask.shape, mask=mask, x=x)
    return _masked(x, mask).sum() if dim is None else _masked(x, mask).sum(dim)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of x (B, R), floating or boolean, over the mask (B, R), as a scalar.

    A mean of microbatch means is not the minibatch's mean: with accumulation, add up `masked_sum` and divide by the
    minibatch's token count.
    """
    return masked_sum(x, mask) / mask.sum()


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Return (x - mean) / std over all masked-in elements, with the population variance (ddof 0).

    Args: x (B, R), in PPO the advantages of the whole rollout, after returns are formed; mask (B, R).
    Returns: (B, R). A single element, or elements equal up to rounding, give zeros.
    """
    check_shapes(mask.shape, mask=mask, x=x)
    centred, variance = _moments(x, mask)
    # No epsilon under the root, unlike lm-human-preferences (1e-8): the degenerate case is decided by `_moments`, and
    # small advantages are whitened as exactly as large ones.
    return centred * variance.rsqrt().masked_fill(variance == 0, 0.0)


def whiten_rewards(rewards: Tensor, mask: Tensor) -> Tensor:
    """Scale rewards to a population variance of 1 over all masked-in elements, keeping their mean.

    Args: rewards (B, R), in PPO of the whole rollout, before `gae`; mask (B, R).
    Returns: (B, R), detached; equal rewards stay as they are.
    Source: openai/lm-human-preferences, train_policy.py, `whiten` with shift_mean=False.
    """
    check_shapes(mask.shape, mask=mask, rewards=rewards)
    rewards = _masked(rewards.detach(), mask)
    centred, variance = _moments(rewards, mask)
    mean = rewards.sum() / mask.sum()
    # (x - mean) / std + mean: the spread becomes 1 and the mean stays, which x / std would not give.
    scaled = centred * torch.where(variance == 0, 1.0, variance).rsqrt() + mean
    return _masked(scaled, mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Return 1 - Var(returns - values) / Var(returns) over masked-in elements, with population variances.

    1: the values predict the returns up to a constant. 0: no better than a constant. Below 0: worse than one.

    Args: values, returns, mask (B, R). Returns: a scalar, detached; 0 where Var(returns) = 0.
    Source: openai/baselines, common/math_util.py, which gives NaN there.
    """
    check_shapes(mask.shape, mask=mask, values=values, returns=returns)
    values, returns = _masked(values.detach(), mask), _masked(returns.detach(), mask)
    _, unexplained = _moments(returns - values, mask)
    _, total = _moments(returns, mask)
    return torch.where(total == 0, 0.0, 1 - unexplained / total)


# ---- entropy and KL --------------------------------------------------------------------------------------------------


def entropy(log_pi: Tensor) -> Tensor:
    """Return H(pi) = -sum_v pi_v log pi_v per position, in nats.

    Args: log_pi (..., V), where -inf means a token that cannot be drawn and adds 0. Returns: (...), from 0 to log V.
    """
    return -_expectation(log_pi.exp(), log_pi)


def full_kl(log_pi: Tensor, log_ref: Tensor) -> Tensor:
    """Return KL(pi || ref) = sum_v pi_v (log pi_v - log ref_v), exact over the vocabulary, in nats.

    Args: log_pi, log_ref (..., V). Returns: (...), not negative up to rounding; inf where pi can draw a token that ref
    cannot.
    """
    check_shapes(log_pi.shape, log_ref=log_ref)
    return _expectation(log_pi.exp(), log_pi - log_ref)


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return k1 = log pi - log ref on tokens drawn from pi: unbiased for KL(pi || ref), of either sign; nats.

    The KL estimate in the reward. Args: (B, R) each, or any one shape; returns that shape.
    Source of k1 and k3: Schulman 2020, Approximating KL Divergence, joschu.net/blog/kl-approx.html.
    """
    check_shapes(logprobs.shape, ref_logprobs=ref_logprobs)
    return upcast(logprobs) - upcast(ref_logprobs)


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return k3 = exp(-k1) - 1 + k1: unbiased, low variance, never negative; nats per token.

    In Schulman's letters (r - 1) - log r with r = ref / pi, tokens drawn from pi. Arguments and source as `kl_k1`.
    """
    k1 = kl_k1(logprobs, ref_logprobs)
    return torch.expm1(-k1) + k1  # expm1: for small k1, exp(-k1) - 1 would cancel to noise


def adapted_kl_coef(kl_coef: float, kl: float, *, target: float, horizon: int, episodes: int) -> float:
    """Return the next KL coefficient of the adaptive controller: higher if the KL is above its target, else lower.

        kl_coef * (1 + clip(kl / target - 1, -0.2, 0.2) * episodes / horizon)

    Args: kl, target: nats a response; episodes: responses since the last change; horizon: responses over which an
    error of 0.2, the largest that counts, changes the coefficient by a fifth.
    Source: Ziegler et al. 2019, section 2.2; openai/lm-human-preferences, train_policy.py.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)


# ---- rewards and advantages ------------------------------------------------------------------------------------------


def token_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """Return r_t = -kl_coef * (log pi(t) - log ref(t)), plus the score at the last real token.

    Args: scores (B,); logprobs, ref_logprobs (B, R) of the sampled tokens under policy and reference; mask (B, R);
    kl_coef: reward per nat. Returns: (B, R), detached: a reward is data. The KL is k1, unclamped, of either sign.
    Source: Ziegler et al. 2019, section 2. summarize_from_feedback_details and TRL put the score one position later,
    after the stop token; here it is on it, where `gae` ends too.
    """
    check_shapes(mask.shape, mask=mask, logprobs=logprobs, ref_logprobs=ref_logprobs)
    check_shapes(mask.shape[:1], scores=scores)
    penalty = kl_coef * kl_k1(_masked(logprobs.detach(), mask), _masked(ref_logprobs.detach(), mask))
    is_last = mask & ~_next(mask)  # (B, R), True once a row
    return torch.where(is_last, upcast(scores.detach()).unsqueeze(1), 0.0) - penalty


def gae(values: Tensor, rewards: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Return generalised advantage estimates, and the returns that values are trained towards.

        delta_t  = r_t + gamma V_{t+1} - V_t
        A_t      = sum_l (gamma lam)^l delta_{t+l} = delta_t + gamma lam A_{t+1}
        return_t = A_t + V_t

    V_t is read *before* token t, and V is 0 after the last real token: a response that ran out of length ends there
    like one that stopped.

    Args: values, rewards, mask (B, R); gamma, lam from 0 to 1.
    Returns: advantages and returns, (B, R) each, detached: both are targets.
    Source: Schulman et al. 2015, High-Dimensional Continuous Control Using GAE, eq. 16.
    """
    check_shapes(mask.shape, mask=mask, values=values, rewards=rewards)
    values, rewards = _masked(values.detach(), mask), _masked(rewards.detach(), mask)
    deltas = rewards + gamma * _next(values) - values  # zero outside the mask, so advantages are as well
    advantages = torch.zeros_like(deltas)
    advantage = torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        advantage = deltas[:, t] + gamma * lam * advantage
        advantages[:, t] = advantage
    return advantages, advantages + values


# ---- losses ----------------------------------------------------------------------------------------------------------


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_range: float
) -> tuple[Tensor, Tensor]:
    """Return the negated clipped surrogate max(-A r, -A clip(r, 1 - clip_range, 1 + clip_range)), r = pi / pi_old.

    Args: logprobs (B, R), the only input that gets a gradient; old_logprobs, advantages, mask (B, R).
    Returns: the loss per token (B, R), for the caller to sum and divide; and `clipped` (B, R) bool, True where the
    clipped side is strictly larger, so that the token has no gradient.
    Source: Schulman et al. 2017, Proximal Policy Optimization Algorithms, eq. 7.
    """
    check_shapes(mask.shape, mask=mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    advantages = _masked(advantages.detach(), mask)
    ratio = torch.exp(_masked(logprobs, mask) - _masked(old_logprobs.detach(), mask))  # 1 outside the mask
    plain_loss = -advantages * ratio
    clipped_loss = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(plain_loss, clipped_loss), clipped_loss > plain_loss


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip_range_value: float
) -> tuple[Tensor, Tensor]:
    """Return 0.5 max((V - return)^2, (V_clip - return)^2), V_clip = V clipped to the old value +- clip_range_value.

    Args: values (B, R), the only input that gets a gradient; old_values, returns, mask (B, R); clip_range_value in
    units of the value.
    Returns: the loss per token (B, R), for the caller to sum and divide; and `clipped` (B, R) bool, True where the
    clipped error is strictly larger.
    Source: openai/lm-human-preferences, train_policy.py, `loss`.
    """
    check_shapes(mask.shape, mask=mask, values=values, old_values=old_values, returns=returns)
    values, old_values, returns = (_masked(x, mask) for x in (values, old_values.detach(), returns.detach()))
    plain_error = (values - returns).square()
    # Clamped itself, not as old + clamp(V - old): that sum rounds, and would call values inside the range clipped.
    clipped_values = values.clamp(old_values - clip_range_value, old_values + clip_range_value)
    clipped_error = (clipped_values - returns).square()
    return 0.5 * torch.maximum(plain_error, clipped_error), clipped_error > plain_error


# ---- private ---------------------------------------------------------------------------------------------------------


def _masked(x: Tensor, mask: Tensor) -> Tensor:
    """Return x in at least fp32, zero outside the mask, as is its gradient."""
    return torch.where(mask, upcast(x), 0.0)


def _next(x: Tensor) -> Tensor:
    """Return x at t + 1, zero or False after the end: (B, R) -> (B, R)."""
    return torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], dim=1)


def _expectation(pi: Tensor, x: Tensor) -> Tensor:
    """Return sum_v pi_v x_v (...), where x may be infinite or NaN at tokens of probability 0, which add 0."""
    if x.device.type == "cpu":  # elsewhere the look at the result would wait for the device
        total = torch.linalg.vecdot(pi, x)
        if not bool(total.isnan().any()):
            return total
    return (pi * x.masked_fill(pi == 0, 0.0)).sum(-1)


def _moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return x - mean (B, R), zero outside the mask, and the population variance, exactly 0 if it is rounding only.

    Seven times 0.1 has an fp32 variance of 6e-17 and not 0, and dividing by its root would give +-1.
    """
    x, count = _masked(x, mask), mask.sum()
    centred = _masked(x - x.sum() / count, mask)
    variance = centred.square().sum() / count
    rounding = 8 * torch.finfo(x.dtype).eps * x.abs().max()
    return centred, variance.masked_fill(variance.sqrt() <= rounding, 0.0)
