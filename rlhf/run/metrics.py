"""The metrics of PPO: what each means."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from rlhf.base.json_files import finite_number

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


def reward_kl_points(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The points (`step`, `sqrt_kl`, `score`) of a PPO run's log lines; KL in nats a response, exact where it was logged.

    An estimate of a KL near 0 can come out below it: those points have no root and are left out.
    """
    points = []
    for row in rows:
        kl = finite_number(row.get("objective/kl_full", row.get("objective/kl")))
        score = finite_number(row.get("objective/score"))
        if kl is not None and score is not None and kl >= 0:
            points.append({"step": float(row.get("step") or 0), "sqrt_kl": math.sqrt(kl), "score": score})
    return points
