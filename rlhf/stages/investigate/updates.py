"""Experiments with single updates of PPO, each on a copy of the weights and on one rollout.

Legend: B responses, R padded response. Plain targets are formed here, not by the trainer's credit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from rlhf.base.intervals import Array
from rlhf.doctor.statements import Statement
from rlhf.ppo import functional as F
from rlhf.ppo.credit import Gae
from rlhf.ppo.types import Rollout
from rlhf.stages.investigate.experiment import (
    Interval,
    confirmed,
    correlation,
    experiment,
    mean,
    ruled_out,
    undecided,
)
from rlhf.stages.investigate.subject import PPOSubject, Trial

#: Change of log-probabilities, nats, up to which a policy did not move: rounding.
UNMOVED = 1e-7
#: Nats a token that one update moves the policy at least and at most, and the share of its tokens that may be clipped.
LEAST_MOVE, LARGEST_MOVE, MOST_CLIPPED = 1e-7, 0.2, 0.5
#: Nats a token beyond which an update is a jump.
JUMP = 1.0
#: KL to the reference, nats a response, from which its term can be seen to pull back.
LEAST_KL = 0.05
#: KL to the reference, nats a response, that is high for a run without its penalty.
HIGH_KL = 5.0
#: Correlation of advantages and plain targets below which credit does not follow the score.
LEAST_CREDIT = 0.2
#: Rise of the explained variance that counts although a first step without warm-up may shift all values.
EXPLAINED = 0.05
#: Gain of that correlation by gamma 1, from which gamma is to blame.
DISCOUNTED = 0.1


def to_go(x: Tensor) -> Tensor:
    """Return sums (B, R) of x (B, R) from each position to the end."""
    return x.flip(1).cumsum(1).flip(1)


def score_target(rollout: Rollout, kl_coef: float) -> Tensor:
    """Return (B, R) the reward from each token on, less the value before it: what a plain policy gradient weighs tokens by."""
    k1 = (rollout.logprobs - rollout.ref_logprobs) * rollout.mask
    return rollout.scores[:, None] - kl_coef * to_go(k1) - rollout.values


def aligned(x: Tensor, y: Tensor, rollout: Rollout) -> Interval:
    """Return the correlation of two figures (B, R) over the rollout's tokens, drawing whole responses."""
    rows = rollout.places[0]
    return correlation(_real(x, rollout), _real(y, rollout), rows.cpu().numpy())


def moved(trial: Trial, rollout: Rollout) -> float:
    """Return the KL from the policy before an update to the one after it, nats a token (k3)."""
    return float(F.masked_mean(torch.expm1(trial.change) - trial.change, rollout.mask))


def _real(x: Tensor, rollout: Rollout) -> Array:
    return x[rollout.mask].double().cpu().numpy()


@experiment("ppo", needs=("first", "ordinary"), settles=(
    "reward_falling", "policy_unmoved", "same_as_sft", "gradient_zero", "kl_high", "kl_jump", "entropy_collapse",
    "advantages_not_centred", "advantages_vanished",
))  # fmt: skip
def update_direction(subject: PPOSubject) -> Iterator[Statement]:
    """Does an update raise the probability of what scored better than expected?"""
    rollout, trial = subject.first, subject.ordinary
    if float(trial.change.abs().max()) <= UNMOVED:
        yield _unmoved(subject)
        return
    advantages = subject.credit.advantages
    credit = aligned(score_target(rollout, subject.config.kl_coef), advantages, rollout)
    measured = f"advantages correlate by {credit} with score less KL penalty less value, over {len(rollout)} responses"
    estimator = subject.trainer.estimator
    if isinstance(estimator, Gae) and estimator.gamma < 1:
        plain = dataclasses.replace(estimator, gamma=1.0)(rollout, kl_coef=subject.config.kl_coef).advantages
        undiscounted = aligned(score_target(rollout, subject.config.kl_coef), plain, rollout)
        measured += f", with gamma 1 by {undiscounted}"
        if undiscounted.low > credit.high + DISCOUNTED:
            yield confirmed(
                "credit_discount", measured, severity="warning",
                cause=f"gamma {estimator.gamma:g} keeps the score from the tokens that earn it: it comes at the last token",
                action="set gamma 1, as InstructGPT does",
                explains=("value_untrained", "value_useless", "reward_falling", "length_down", "score_gained"),
            )  # fmt: skip
    if credit.low > LEAST_CREDIT:
        yield ruled_out("credit_follows_score", f"{measured}: signs and rows of the credit are in order")
    elif credit.high < LEAST_CREDIT:
        sign = "have the wrong sign" if credit.high < 0 else "hardly depend on the scores: rows mixed up, or a discount"
        yield confirmed(
            "credit_follows_score", measured,
            cause=f"advantages {sign}, so updates do not raise the score",
            action="recompute advantages by hand for one response (rlhf doctor audit); look at gamma, lam and whiten_rewards",
            explains=("reward_falling", "value_useless", "kl_high", "kl_jump", "entropy_collapse", "score_gained", "kl_term"),
        )  # fmt: skip
    else:
        yield undecided("credit_follows_score", measured)
    update = aligned(advantages, trial.change, rollout)
    measured = f"log-probabilities change with the advantages by a correlation of {update}"
    if update.low > 0:
        yield ruled_out("update_follows_credit", f"{measured}: the sign of the loss and the optimiser are in order")
    elif update.high < 0:
        yield confirmed(
            "update_follows_credit", measured,
            cause="an update lowers the probability of tokens with a high advantage: the loss or the step has the wrong sign",
            action="look at the sign of the policy loss and of the optimiser's step (rlhf doctor audit)",
            explains=("reward_falling", "kl_high", "kl_jump", "entropy_collapse", "score_gained", "kl_term"),
        )  # fmt: skip
    else:
        yield undecided("update_follows_credit", measured)


def _unmoved(subject: PPOSubject) -> Statement:
    rate, norm = subject.config.learning_rate, subject.ordinary.metrics["ppo/grad_norm"]
    if rate == 0:
        cause, action = "the step size is 0", "set learning_rate"
    elif norm == 0 and float(subject.first.scores.std()) <= UNMOVED and subject.config.kl_coef == 0:
        cause, action = "all scores are equal, so there is no gradient", "look at the reward"
    elif norm == 0:
        cause = "no gradient reaches the weights that the optimiser holds: they are frozen, or copies of the policy's"
        action = "see that the policy's adapter has requires_grad, is in the loss, and is what the optimiser holds"
    else:
        cause = f"the gradient (norm {norm:.2g}) reaches weights that do not decide the policy's outputs, or is scaled to nothing"
        action = "see that the optimiser holds the policy's own weights; look at adam_epsilon and max_grad_norm"
    return confirmed(
        "update_moves_policy", f"one update at the peak step size changes no log-probability by more than {UNMOVED:g} nats",
        cause=cause, action=action,
        explains=("policy_unmoved", "same_as_sft", "gradient_zero", "learning_rate_zero", "score_gained", "step_size"),
    )  # fmt: skip


@experiment("ppo", needs=("first", "ordinary"), settles=("value_untrained", "value_useless", "value_dead"))
def value_learns(subject: PPOSubject) -> Iterator[Statement]:
    """Does an update bring the values closer to the returns?"""
    rollout, returns = subject.first, subject.credit.returns
    if returns is None:
        return
    before, after = ((v - returns).square() * rollout.mask for v in (rollout.values, subject.ordinary.values))
    tokens = rollout.mask.sum(dim=1)
    change = mean(((after - before).sum(dim=1) / tokens).double().cpu().numpy(), np.arange(len(rollout)))
    scale = float(before.sum() / tokens.sum())
    explained = [
        float(F.explained_variance(v, returns, rollout.mask)) for v in (rollout.values, subject.ordinary.values)
    ]
    known = aligned(rollout.values, rollout.scores[:, None].expand_as(rollout.values), rollout)
    measured = (
        f"squared error {scale:.3g}, changed by {change} in one update; explained variance {explained[0]:.2f}, then "
        f"{explained[1]:.2f}; values and scores correlate by {known}"
    )
    trained = float((subject.ordinary.values - rollout.values).abs().max()) > UNMOVED
    if trained and (change.high < 0 or explained[1] > explained[0] + EXPLAINED):
        yield ruled_out("value_learns", f"{measured}: the values are trained towards their returns")
    elif not trained:
        c, metrics = subject.config, subject.ordinary.metrics
        rate = c.learning_rate if c.value_learning_rate is None else c.value_learning_rate
        cause = (
            "the value's step size is 0" if rate == 0
            else "vf_coef is 0" if c.vf_coef == 0
            else "no gradient reaches the value model" if metrics["ppo/value_grad_norm"] == 0
            else "the optimiser holds other weights than those that the values are computed with"
        )  # fmt: skip
        yield confirmed(
            "value_learns", measured, cause=f"an update does not change the values: {cause}",
            action="set value_learning_rate and vf_coef above 0, and see that adapter and head of the value have requires_grad",
            explains=("value_untrained", "value_useless", "value_dead"),
        )  # fmt: skip
    elif change.low > 0 and explained[1] < 0:
        yield confirmed(
            "value_learns", measured, severity="warning",
            cause="an update moves the values away from the returns of its own rollout: their step size is too large, or the "
            "sign of their loss is wrong",
            action="lower value_learning_rate; look at clip_range_value beside the spread of the scores",
            explains=("value_useless",),
        )  # fmt: skip
    else:
        yield undecided("value_learns", measured)


@experiment("ppo", passes=3.5, settles=("kl_high", "kl_jump", "negative_kl", "no_kl_penalty", "controller_saturated"))
def kl_term(subject: PPOSubject) -> Iterator[Statement]:
    """Does the KL penalty alone pull the policy back to the reference?"""
    rollout, kl_coef = subject.rollout(trained=True), subject.trainer.state.kl_coef
    kl = float(rollout.exact_kl.mean())
    spreads = kl_coef * float(rollout.kl.std()), float(rollout.scores.std())
    measured = (
        f"KL {kl:.2g} nats a response at kl_coef {kl_coef:g}; over responses the penalty spreads by {spreads[0]:.2g}, the "
        f"scores by {spreads[1]:.2g}"
    )
    if kl_coef == 0 and kl > HIGH_KL:
        yield confirmed(
            "kl_term", measured, severity="warning", cause="nothing pulls the policy back to the reference: kl_coef is 0",
            action="set kl_coef (0.02 to 0.1 for scores of spread 1) or kl_target",
            explains=("no_kl_penalty", "kl_high", "responses_alike", "repeated_text", "entropy_collapse"),
        )  # fmt: skip
        return
    if kl_coef == 0 or kl < LEAST_KL:
        yield ruled_out("kl_term", f"{measured}: nothing to pull back")
        return
    alone = dataclasses.replace(rollout, scores=rollout.scores * 0, values=rollout.values * 0)
    trial = subject.attempt(rollout, subject.trainer.estimator(alone, kl_coef=kl_coef), trained=True)
    k1 = (rollout.logprobs - rollout.ref_logprobs) * rollout.mask
    pull = aligned(-to_go(k1), trial.change, rollout)
    measured = (
        f"updated by the KL penalty alone, log-probabilities of tokens fall with the log-ratio from them on by a correlation of "
        f"{pull}; {measured}"
    )
    if pull.low > 0:
        yield ruled_out("kl_term", f"{measured}: the penalty has the right sign")
    elif pull.high < 0:
        yield confirmed(
            "kl_term", measured,
            cause="the KL penalty pushes the policy away from the reference: it has the wrong sign, or another reference",
            action="the reward of a token is -kl_coef * (log pi - log pi_ref), and the score is added at the last",
            explains=("kl_high", "kl_jump", "negative_kl", "steps_too_large", "entropy_collapse", "over_optimised",
                      "responses_alike", "repeated_text", "controller_saturated", "length_up", "stop_rate_falling",
                      "over_optimisation", "endings", "score_gained"),
        )  # fmt: skip
    else:
        yield undecided("kl_term", measured)


@experiment(
    "ppo",
    needs=("first", "ordinary"),
    passes=4.0,
    settles=("reward_falling", "policy_unmoved", "same_as_sft", "reward_scale", "reward_constant"),
)
def reward_steers(subject: PPOSubject) -> Iterator[Statement]:
    """Do updates go the other way when the reward's sign is flipped, or does something else steer them?"""
    rollout, estimator = subject.first, subject.trainer.estimator
    if moved(subject.ordinary, rollout) < LEAST_MOVE:
        return
    kl_coef = subject.config.kl_coef
    plain, flipped = (
        subject.attempt(one, estimator(one, kl_coef=kl_coef)).change
        for one in (
            dataclasses.replace(rollout, values=rollout.values * 0),
            dataclasses.replace(rollout, values=rollout.values * 0, scores=-rollout.scores),
        )
    )
    same = aligned(plain, flipped, rollout)
    measured = (
        f"changes of log-probabilities with the reward and with its sign flipped correlate by {same}; the scores' spread is "
        f"{float(rollout.scores.std()):.3g}"
    )
    if same.high < 0:
        yield ruled_out("reward_steers", f"{measured}: the reward decides where updates go")
    elif same.low > 0:
        yield confirmed(
            "reward_steers", measured, severity="warning",
            cause="updates go the same way whatever the reward says: something else steers them, a mean of the advantages",
            action="look at ppo/advantage_mean, and at the steps from scores to advantages (rlhf doctor audit)",
            explains=("advantages_not_centred", "policy_unmoved", "same_as_sft", "reward_falling"),
        )  # fmt: skip
    else:
        yield undecided("reward_steers", measured)


@experiment("ppo", needs=("first", "ordinary"), passes=4.0, settles=(
    "steps_too_large", "kl_jump", "kl_high", "policy_unmoved", "same_as_sft", "gradient_spike", "entropy_collapse",
))  # fmt: skip
def step_size(subject: PPOSubject) -> Iterator[Statement]:
    """How far does an update go with half, with all and with double the peak step size?"""
    rollout = subject.first
    lines, moves, clipped = [], {}, {}
    for rate in (0.5, 1.0, 2.0):
        trial = subject.ordinary if rate == 1 else subject.attempt(rollout, subject.credit, rate=rate)
        moves[rate] = moved(trial, rollout)
        clipped[rate] = float(
            F.masked_mean((trial.change.expm1().abs() > subject.config.clip_range).float(), rollout.mask)
        )
        lines.append(f"{rate:g} x {moves[rate]:.2g} nats, {clipped[rate]:.0%}")
    if not any(moves.values()):
        return
    measured = (
        "from the start, KL a token to the policy before the update, and tokens beyond the clip range "
        f"{subject.config.clip_range:g}: " + "; ".join(lines)
    )
    if moves[1.0] > LARGEST_MOVE or clipped[1.0] > MOST_CLIPPED:
        fits = moves[0.5] <= LARGEST_MOVE and clipped[0.5] <= MOST_CLIPPED
        yield confirmed(
            "step_size", measured, severity="critical" if max(moves[1.0], 2 * clipped[1.0]) > JUMP else "warning",
            cause="one update moves the policy out of the clip range: the step size is too large",
            action=f"{'halve' if fits else 'lower by far (ten times or more)'} learning_rate, or raise minibatch_size",
            explains=("steps_too_large", "kl_jump", "kl_high", "gradient_spike", "entropy_collapse", "responses_alike",
                      "reward_falling", "stop_rate_falling", "value_useless", "length_up", "length_down", "repeated_text",
                      "over_optimised", "over_optimisation", "endings", "score_gained", "value_learns", "value_dead",
                      "reward_steers"),
        )  # fmt: skip
    elif moves[1.0] < LEAST_MOVE:
        yield confirmed(
            "step_size", measured, severity="warning", cause="one update hardly moves the policy: the step size is far too small",
            action="raise learning_rate tenfold; look at adam_epsilon and max_grad_norm",
            explains=("policy_unmoved", "same_as_sft", "reward_steers"),
        )  # fmt: skip
    else:
        yield ruled_out("step_size", f"{measured}: neither too large nor too small")
