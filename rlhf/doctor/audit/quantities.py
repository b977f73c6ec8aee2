"""The quantities of PPO's audit in causal order, each with its cause, what to do, and the findings that it explains."""

from __future__ import annotations

from rlhf.doctor.audit.compare import Quantity
from rlhf.doctor.health.findings import CHECKS

#: Checks of what the run was given, or of the machine: no computation is their cause.
_GIVEN = {"reward_opposes_judge", "reward_ignores_judge", "slowing_down", "pad_is_stop", "template_twice"}
_OUTCOMES = [check.name for check in CHECKS if check.stages == ("ppo",) and check.name not in _GIVEN]
_REWARD = ["reward_opposes_judge", "reward_ignores_judge"]
_PAGE = "docs/house.md, one prompt's way through PPO"


def _quantity(name: str, cause: str, action: str, *explains: str, source: str = _PAGE) -> Quantity:
    return Quantity(name=name, cause=cause, action=action, explains=(*explains, *_OUTCOMES), source=source)


PROMPTS = _quantity(
    "prompts",
    "the prompts that are answered are not those of their data rows",
    "look at what renders, cuts or orders the prompts: the chat template is applied once, nothing is cut, and token rows "
    "stand in the order of their data rows",
    "template_twice",
    *_REWARD,
)
ROLLOUTS_DIFFER = _quantity(
    "rollouts_differ",
    "two rollouts are alike: the random numbers do not move on",
    "derive the seeds of prompts and responses from the number of the update",
)
RESPONSE_MASK = _quantity(
    "response_mask",
    "the mask does not cover each response up to its first stop token, and nothing else",
    "make masks from the lengths of the responses, and end them at the first stop token",
    "pad_is_stop",
)
RANDOM_NUMBERS = _quantity(
    "random_numbers",
    "the tokens are drawn with other random numbers than seed and update give",
    "seed the generator of each rollout from the run's seed and the number of the update",
)
SAMPLING = _quantity(
    "sampling",
    "the tokens are not drawn from the policy with the weights that it has",
    "sample from the newest weights, merged once, at the temperature that divides the scored logits, with no top-k or top-p",
)
OLD_LOGPROBS = _quantity(
    "old_logprobs",
    "the old log-probabilities are not the policy's",
    "compute them with the weights that sampled, at the sampling temperature, one position left of each token",
)
REF_LOGPROBS = _quantity(
    "ref_logprobs",
    "the reference's log-probabilities are not the SFT model's",
    "switch the policy's adapter off for the reference, start from the registered SFT model, and use the same temperature",
)
VALUES = _quantity(
    "values",
    "the values are not those of the value model, read before each token",
    "read the value one position left of each token, with the value's own weights and head",
)
RAW_SCORES = _quantity(
    "raw_scores",
    "the scores are not those that the reward gives these responses",
    "look at what the reward is shown (rows in order, whole texts, the stop token) and at its mean and spread",
    *_REWARD,
)
SCORES = _quantity(
    "scores",
    "clip and penalties are not applied to the raw scores as the options say",
    "look at reward_clip, missing_eos_penalty and short_response_penalty, and where they are subtracted",
    *_REWARD,
)
KL_COEF = _quantity(
    "kl_coef",
    "the KL coefficient is not what the options and the last rollout's KL make it",
    "look at what changes it after each rollout",
    source="Ziegler et al. 2019, section 2.2",
)
TOKEN_REWARDS = _quantity(
    "token_rewards",
    "the token rewards are not the score at the last token less kl_coef times the log-ratio at each",
    "look at the sign and size of the KL term, and at the token that gets the score",
    *_REWARD,
    source="Ziegler et al. 2019, section 2",
)
WHITENED_REWARDS = _quantity(
    "whitened_rewards",
    "the rewards are not scaled to a spread of 1 with their mean kept",
    "whiten over the real tokens of the whole rollout, and only with whiten_rewards",
)
ADVANTAGES = _quantity(
    "advantages",
    "the advantages are not the generalised advantage estimates of these rewards and values",
    "look at gamma, lam and the mask; nothing comes after the last real token",
    source="Schulman et al. 2015, eq. 16",
)
RETURNS = _quantity(
    "returns",
    "the returns are not advantages plus values, before whitening",
    "form them from the raw advantages and the values of the rollout",
)
WHITENED_ADVANTAGES = _quantity(
    "whitened_advantages",
    "the advantages that are trained on do not have mean 0 and spread 1 over the real tokens, or another sign",
    "subtract the mean and divide by the spread over exactly the tokens of the loss",
)
MINIBATCHES = _quantity(
    "minibatches",
    "the minibatches do not cover each row once an epoch",
    "split a permutation of all rows",
)
GRADIENTS_ZEROED = _quantity(
    "gradients_zeroed",
    "gradients of an earlier minibatch are still there when the next begins",
    "set the gradients to zero after each optimiser step",
)
POLICY_LOSS = _quantity(
    "policy_loss",
    "the policy's loss is not the clipped surrogate",
    "look at its sign, at the ratio and at the side on which it is clipped",
    source="Schulman et al. 2017, eq. 7",
)
VALUE_LOSS = _quantity(
    "value_loss",
    "the value's loss is not half the larger of the plain and the clipped squared error",
    "look at the returns, at the old values and at clip_range_value",
)
GRADIENT = _quantity(
    "gradient",
    "the gradient is not that of the losses over the minibatch's tokens",
    "look at the divisor (real tokens of the whole minibatch), at vf_coef and ptx_coef, and at what is cut off from the loss",
)
GRADIENT_CLIPPING = _quantity(
    "gradient_clipping",
    "the gradients are not scaled down to max_grad_norm",
    "clip the norm of policy and value each, once, before the optimiser's step",
)
LEARNING_RATE = _quantity(
    "learning_rate",
    "the step size is not what the schedule should have at this step",
    "step the schedule once for each minibatch, and give it the number of all minibatches of the run",
    "learning_rate_zero",
)
OPTIMIZER_STEP = _quantity(
    "optimizer_step",
    "the weights did not move as AdamW moves them",
    "look at the optimiser's states, betas and weight_decay, and whether it holds the weights that are used",
)
WEIGHTS_KEPT = _quantity(
    "weights_kept",
    "the weights changed between two updates",
    "look at what touches the weights outside the optimiser: merging, averaging, evaluation, roles",
)
FROZEN_WEIGHTS = _quantity(
    "frozen_weights",
    "weights that do not train have changed",
    "restore the base after merging, and keep the other roles' weights out of the optimiser",
)
#: All quantities, causes before consequences.
PPO = (
    PROMPTS,
    ROLLOUTS_DIFFER,
    RESPONSE_MASK,
    SAMPLING,
    RANDOM_NUMBERS,
    OLD_LOGPROBS,
    REF_LOGPROBS,
    VALUES,
    RAW_SCORES,
    SCORES,
    TOKEN_REWARDS,
    WHITENED_REWARDS,
    ADVANTAGES,
    RETURNS,
    WHITENED_ADVANTAGES,
    MINIBATCHES,
    GRADIENTS_ZEROED,
    POLICY_LOSS,
    VALUE_LOSS,
    GRADIENT,
    GRADIENT_CLIPPING,
    LEARNING_RATE,
    OPTIMIZER_STEP,
    FROZEN_WEIGHTS,
    WEIGHTS_KEPT,
    KL_COEF,
)
