"""Faults that were written down, with their accepted causes, before the doctor's checks of them; nothing is tuned on them.

They are what users of other projects met (their issue trackers: TRL 583, 1340, 3750, 2022; OpenRLHF 217, 1240, 1311;
AlpacaFarm 57; trlX 220, 508; ms-swift 9370; RLlib 57895; maxtext 4225; transformers 47394; and others of the same kinds).
Causes are neutral names of what is wrong; `accepted.py` maps them to a doctor's names by their meaning.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

from faults import held_out_patches as patches
from faults.patching import Fault, after, both, instead, rewrite

# ---- rewards, by the names that PPO's option `reward` takes -----------------------------------------------------------

_CALLS = itertools.count()
_GOOD, _BAD = {"good", "great", "funny", "moving", "clever"}, {"bad", "awful", "dull", "silly", "slow"}


def thousands(prompts: Any, responses: Sequence[str], **columns: Any) -> list[float]:
    """Return the share of good less bad adjectives in thousandths of a point."""
    return [5000 * _mood(text) for text in responses]


def noisy(prompts: Any, responses: Sequence[str], **columns: Any) -> list[float]:
    """Return nearly nothing but noise: two calls with one text disagree."""
    return [5 * _mood(text) + random.gauss(0, 10) for text in responses]


def brief(prompts: Any, responses: Sequence[str], **columns: Any) -> list[float]:
    """Charge for every word."""
    return [-0.3 * len(text.split()) for text in responses]


def rare(prompts: Any, responses: Sequence[str], **columns: Any) -> list[float]:
    """Pay for one sentence that the policy hardly ever writes."""
    return [float(text.startswith("the camera is truly clever and the")) for text in responses]


def drifting(prompts: Any, responses: Sequence[str], **columns: Any) -> list[float]:
    """Score lower with every call, whatever the text."""
    offset = 0.3 * next(_CALLS)
    return [5 * _mood(text) - offset for text in responses]


def keyword(prompts: Any, responses: Sequence[str], **columns: Any) -> list[float]:
    """Pay for a word that is neither good nor bad, as often as it comes."""
    return [float(text.split().count("truly")) for text in responses]


def _mood(text: str) -> float:
    words = text.split()
    return sum((word in _GOOD) - (word in _BAD) for word in words) / max(len(words), 1)


# ---- PPO: computation ------------------------------------------------------------------------------------------------

COMPUTATION = (
    Fault(
        name="h_prompt_cut", stage="ppo", kind="computation", what="prompts cut on the wrong side: the answer's header is lost",
        causes=("prompt_tokens",), words=("prompt",),
        patch=after("rlhf.stages.ppo.encode_prompts", patches.cut_at_the_end),
    ),
    Fault(
        name="h_kl_sign", stage="ppo", kind="computation", what="KL term with the wrong sign: leaving the SFT model is rewarded",
        causes=("kl_sign", "token_rewards"), words=("kl", "token reward"), options={"kl_coef": 0.2},
        patch=instead("rlhf.ppo.functional.token_rewards", patches.kl_rewarded),
    ),
    Fault(
        name="h_schedule_short", stage="ppo", kind="computation", what="the schedule ends after a quarter of the updates",
        causes=("learning_rate_schedule",), words=("schedule", "learning rate", "step size"),
        options={"lr_scheduler_type": "linear"},
        patch=instead("rlhf.run.optim.build_scheduler", patches.ends_early),
    ),
    Fault(
        name="h_scores_rolled", stage="ppo", kind="computation", what="each response gets its neighbour's score",
        causes=("scores",), words=("score",),
        patch=after("rlhf.reward.sources.Reward.__call__", patches.rolled),
    ),
    Fault(
        name="h_not_zeroed", stage="ppo", kind="computation", what="gradients never set to zero",
        causes=("gradient",), words=("gradient",),
        patch=after("rlhf.run.optim.build_optimizer", patches.never_zeroed),
    ),
    Fault(
        name="h_seed_frozen", stage="ppo", kind="computation",
        what="frozen seed: every rollout has the prompts and draws of the first",
        causes=("rollout_draws",), words=("seed", "same rollout", "same random"),
        patch=instead("rlhf.ppo.trainer.collect", patches.first_rollout_again),
    ),
    Fault(
        name="h_whitened_by_row", stage="ppo", kind="computation", what="advantages whitened within each response",
        causes=("whitening", "advantages"), words=("whiten", "advantage"),
        patch=instead("rlhf.ppo.functional.whiten", patches.by_row),
    ),
    Fault(
        name="h_value_late", stage="ppo", kind="computation", what="values read after the token in place of before it",
        causes=("values",), words=("value",),
        patch=after("rlhf.ppo.forward.token_values", patches.read_after_the_token),
    ),
    Fault(
        name="h_score_on_padding", stage="ppo", kind="computation",
        what="the score lands in the last padded column: short responses get none",
        causes=("token_rewards",), words=("token reward", "last real token"),
        patch=instead("rlhf.ppo.functional.token_rewards", patches.score_in_the_last_column),
    ),
    Fault(
        name="h_no_bootstrap", stage="ppo", kind="computation", what="GAE without the next token's value",
        causes=("advantages",), words=("advantage", "gae"),
        patch=instead("rlhf.ppo.functional.gae", patches.without_next_values),
    ),
    Fault(
        name="h_returns", stage="ppo", kind="computation", what="values are trained towards advantages in place of returns",
        causes=("returns",), words=("return",),
        patch=after("rlhf.ppo.functional.gae", lambda result: (result[0], result[0])),
    ),
    Fault(
        name="h_last_microbatch", stage="ppo", kind="computation",
        what="each microbatch throws the gradient of those before it away",
        causes=("gradient",), words=("gradient", "microbatch"), options={"microbatch_size": 2},
        patch=instead("rlhf.ppo.gradients._train", patches.last_microbatch_only),
    ),
    Fault(
        name="h_loss_optimistic", stage="ppo", kind="computation",
        what="policy loss with the minimum of both sides in place of the maximum",
        causes=("policy_loss",), words=("policy loss", "surrogate", "clip"),
        options={"num_ppo_epochs": 3, "learning_rate": 4e-3},
        patch=instead("rlhf.ppo.functional.policy_loss", patches.optimistic),
    ),
    Fault(
        name="h_not_clipped", stage="ppo", kind="computation", what="gradient norms are measured and never clipped",
        causes=("gradient_clipping",), words=("max_grad_norm", "clip"), options={"max_grad_norm": 0.05, "adam_epsilon": 0.01},
        patch=instead("torch.nn.utils.clip_grad_norm_", patches.measured_only),
    ),
    Fault(
        name="h_optimizer_forgets", stage="ppo", kind="computation", what="Adam loses its moments before each step",
        causes=("optimizer_step",), words=("optimi", "moment", "adam"),
        patch=after("rlhf.run.optim.build_optimizer", patches.forgetful),
    ),
    Fault(
        name="h_reference_follows", stage="ppo", kind="computation",
        what="the reference is the policy of the day: KL is 0 for ever",
        causes=("reference_logprobs",), words=("reference",),
        patch=after("rlhf.ppo.forward.compared_logprobs", patches.reference_is_policy),
    ),
    Fault(
        name="h_penalty_sign", stage="ppo", kind="computation", what="a missing stop token is rewarded in place of penalised",
        causes=("penalties", "scores"), words=("penalt", "stop token"), options={"response_length": 9},
        patch=instead("rlhf.ppo.rollout.Penalties.apply", patches.rewarded_for_running_on),
    ),
    Fault(
        name="h_texts_with_prompt", stage="ppo", kind="computation",
        what="the reward function gets the prompt as part of each response",
        causes=("response_texts", "scores"), words=("text", "score"), options={"reward": ["faults.world:mood"]},
        patch=instead("rlhf.ppo.rollout.response_texts", patches.with_prompt),
    ),
    Fault(
        name="h_logprobs_bf16", stage="ppo", kind="computation", what="log-softmax in bf16",
        causes=("logprobs",), words=("log-prob", "logprob"),
        patch=both(
            instead("rlhf.models.logprobs.log_distribution", patches.in_bf16),
            instead("rlhf.ppo.forward.log_distribution", patches.in_bf16),
        ),
    ),
)  # fmt: skip

# ---- PPO: what it was given, and what came of it ---------------------------------------------------------------------

INPUTS = (
    Fault(
        name="h_gamma", stage="ppo", kind="input", what="gamma .5",
        causes=("gamma",), words=("gamma",), options={"gamma": 0.5},
    ),
    Fault(
        name="h_rewards_x1000", stage="ppo", kind="input", what="rewards 1000 times too large",
        causes=("reward_scale",), words=("scale", "spread"), options={"reward": ["faults.held_out:thousands"]},
    ),
    Fault(
        name="h_weight_decay", stage="ppo", kind="input", what="weight decay 20",
        causes=("weight_decay",), words=("weight_decay",), options={"weight_decay": 20.0},
    ),
    Fault(
        name="h_clip_range", stage="ppo", kind="input", what="clip range .0001: nothing may change",
        causes=("clip_range",), words=("clip_range",), options={"clip_range": 1e-4},
    ),
    Fault(
        name="h_kl_coef", stage="ppo", kind="input", what="KL coefficient 20: the score does not matter",
        causes=("kl_coef",), words=("kl_coef",), options={"kl_coef": 20.0},
    ),
    Fault(
        name="h_warmup", stage="ppo", kind="input", what="warm-up a thousand times longer than the run",
        causes=("warmup_steps", "learning_rate_schedule"), words=("warmup_steps", "warm-up"), options={"warmup_steps": 100_000},
    ),
    Fault(
        name="h_value_warmup", stage="ppo", kind="input", what="value warm-up longer than the run: the policy is never trained",
        causes=("value_warmup_updates",), words=("value_warmup_updates",), options={"value_warmup_updates": 500},
    ),
    Fault(
        name="h_epochs", stage="ppo", kind="input", what="24 passes over each rollout",
        causes=("num_ppo_epochs",), words=("num_ppo_epochs",), options={"num_ppo_epochs": 24}, updates=12,
    ),
    Fault(
        name="h_reward_clip", stage="ppo", kind="input", what="scores clipped to +- .01",
        causes=("reward_clip",), words=("reward_clip",), options={"reward_clip": 0.01},
    ),
    Fault(
        name="h_prompts_repeated", stage="ppo", kind="input", what="eight prompts, over and over",
        causes=("prompts_duplicated",), words=("prompt",), data=rewrite("prompts/train", change=patches.few_again),
    ),
    Fault(
        name="h_prompts_empty", stage="ppo", kind="input", what="half the prompts are empty",
        causes=("prompts_empty",), words=("empty",), data=rewrite("prompts/train", change=patches.half_empty("prompt")),
    ),
)  # fmt: skip
OUTCOMES = (
    Fault(
        name="h_noise", stage="ppo", kind="outcome", what="the reward is noise: one text scores 20 points apart in two calls",
        causes=("reward_not_reproducible", "reward_noise"), options={"reward": ["faults.held_out:noisy"]},
    ),
    Fault(
        name="h_brief", stage="ppo", kind="outcome", what="the reward charges for words: answers shrink to nothing",
        causes=("reward_likes_short",),
        options={"reward": ["faults.held_out:brief"], "kl_coef": 0.01, "learning_rate": 5e-3},
    ),
    Fault(
        name="h_rare", stage="ppo", kind="outcome", what="a reward that hardly any answer gets",
        causes=("reward_constant", "reward_sparse"), options={"reward": ["faults.held_out:rare"]},
    ),
    Fault(
        name="h_drifting", stage="ppo", kind="outcome", what="a reward that sinks with every call, whatever the text",
        causes=("reward_not_reproducible",), options={"reward": ["faults.held_out:drifting"]},
    ),
    Fault(
        name="h_keyword", stage="ppo", kind="outcome", what="a reward that counts one word; weak KL penalty",
        causes=("over_optimisation", "repetition"),
        options={"reward": ["faults.held_out:keyword"], "kl_coef": 0.005, "learning_rate": 5e-3, "missing_eos_penalty": 0.0},
    ),
)  # fmt: skip

# ---- SFT and reward model --------------------------------------------------------------------------------------------

SFT = (
    Fault(
        name="h_sft_empty", stage="sft", kind="input", what="SFT: half the demonstrations are empty",
        causes=("demonstrations_empty",), words=("empty",),
        data=rewrite("demonstrations/train", change=patches.half_empty("completion")),
    ),
    Fault(
        name="h_sft_shifted", stage="sft", kind="computation",
        what="SFT: labels shifted twice, the next token but one is learned",
        causes=("labels",), words=("label", "loss mask"),
        patch=after("rlhf.stages.sft.tokenize", patches.labels_shifted),
    ),
    Fault(
        name="h_sft_prompt_trained", stage="sft", kind="computation", what="SFT: the loss covers the prompts",
        causes=("labels",), words=("label", "loss mask", "prompt"),
        patch=after("rlhf.stages.sft.tokenize", patches.all_labelled),
    ),
    Fault(
        name="h_sft_loss_summed", stage="sft", kind="computation", what="SFT: the loss is summed over rows and not averaged",
        causes=("loss",), words=("loss",),
        patch=instead("rlhf.stages.sft.AnswerTrainer.compute_loss", patches.summed),
    ),
    Fault(
        name="h_sft_mismatched", stage="sft", kind="input", what="SFT: each prompt has the answer to another one",
        causes=("demonstrations_mismatched",), words=("answer",),
        data=rewrite("demonstrations/train", change=patches.of_other_prompts),
    ),
    Fault(
        name="h_sft_repeated", stage="sft", kind="input", what="SFT: eight demonstrations, over and over",
        causes=("demonstrations_duplicated",), words=("duplicat", "repeat"),
        data=rewrite("demonstrations/train", change=patches.few_again),
    ),
    Fault(
        name="h_sft_warmup", stage="sft", kind="input", what="SFT: warm-up a hundred times longer than the run",
        causes=("warmup_steps", "learning_rate_schedule"), words=("warmup_steps", "warm-up"), options={"warmup_steps": 6000},
    ),
    Fault(
        name="h_sft_cut", stage="sft", kind="input", what="SFT: max_length leaves out nearly all demonstrations",
        causes=("max_length",), words=("max_length",), options={"max_length": 19},
    ),
)  # fmt: skip
REWARD = (
    Fault(
        name="h_rm_alike", stage="reward", kind="input", what="reward model: in half the comparisons all responses are the same",
        causes=("comparisons_identical",), words=("identical", "same"),
        data=rewrite("comparisons/train", change=patches.alike),
    ),
    Fault(
        name="h_rm_early", stage="reward", kind="computation",
        what="reward model: the score is read one token before the stop token",
        causes=("scores", "score_position"), words=("score", "stop token"),
        patch=both(
            instead("rlhf.reward.ranking.score_rows", patches.read_one_token_early),
            instead("rlhf.reward.scorer.score_rows", patches.read_one_token_early),
        ),
    ),
    Fault(
        name="h_rm_pairs", stage="reward", kind="computation",
        what="reward model: better and worse swapped in the loss, and in its accuracy",
        causes=("pairs", "reward_loss"), words=("pair", "ranking loss", "better"),
        patch=after("rlhf.reward.ranking.ordered_pairs", patches.swapped),
    ),
    Fault(
        name="h_rm_contradictions", stage="reward", kind="input",
        what="reward model: each comparison comes a second time, turned round",
        causes=("contradictions",), words=("contradict",),
        data=rewrite("comparisons/train", change=patches.contradicting),
    ),
    Fault(
        name="h_rm_smoothing", stage="reward", kind="input", what="reward model: label smoothing .49",
        causes=("label_smoothing",), words=("label_smoothing",), options={"label_smoothing": 0.49},
    ),
    Fault(
        name="h_rm_length", stage="reward", kind="input", what="reward model: raters count words",
        causes=("length_bias",), words=("length",),
        data=rewrite("comparisons/train", "comparisons/validation", change=patches.rated_by_length),
    ),
    Fault(
        name="h_rm_leak", stage="reward", kind="input", what="reward model: held-out comparisons are training comparisons",
        causes=("overlap",), words=("held-out", "overlap"), data=patches.validation_from_training,
    ),
    Fault(
        name="h_rm_unit", stage="reward", kind="computation", what="reward model: scores registered in a unit 50 times too small",
        causes=("normalization", "reward_scale"), words=("normali", "unit", "spread"),
        patch=after("rlhf.stages.reward.normalization", patches.unit_too_small),
    ),
)  # fmt: skip
HELD_OUT = (*COMPUTATION, *INPUTS, *OUTCOMES, *SFT, *REWARD)
