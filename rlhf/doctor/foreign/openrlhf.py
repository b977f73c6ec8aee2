"""Figures of OpenRLHF's trainers; the short names are those of its progress bars."""

from __future__ import annotations

from rlhf.doctor.foreign.figure import COMPLEMENT, ROUGH_KL, Figure, Kind, less, per_response, words

_ACTOR = "openrlhf/trainer/ray/ppo_actor.py: ppo_train"
_CRITIC = "openrlhf/trainer/ray/ppo_critic.py: training_step"
_MAKER = "openrlhf/trainer/ppo_utils/experience_maker.py"
_ROLLOUT = "openrlhf/trainer/ppo_trainer.py: _compute_rollout_stats"
_LENGTHS = ("rollout/response_length_mean", "response_length", "gen_len", "glen")

PPO = Kind(
    project="OpenRLHF",
    trainer="PPO, REINFORCE++, GRPO, RLOO",
    stage="ppo",
    marks=(
        words("policy_loss", "act_loss", "pg"),
        words(*_LENGTHS, "actor_lr", "act_lr"),
    ),
    figures=(
        Figure(theirs=("policy_loss", "act_loss", "pg"), ours=("ppo/policy_loss",), source=_ACTOR),
        Figure(theirs=("critic_loss", "cri"), ours=("ppo/value_loss",), source=_CRITIC),
        Figure(
            theirs=("rollout/reward_mean", "reward", "rm"),
            ours=("objective/score", "objective/raw_score"),
            source=_ROLLOUT,
        ),
        Figure(theirs=("rollout/reward_std",), ours=("objective/score_std",), source=_ROLLOUT),
        Figure(
            theirs=("group_reward_std",),
            near=("objective/score_std",),
            meaning="the spread within the groups of one prompt",
            source=f"{_MAKER}: compute_advantages_and_returns",
        ),
        Figure(
            theirs=("return", "ret"),
            ours=("objective/rlhf_reward",),
            meaning="the reward less a baseline, in estimators that have one",
            source=f"{_MAKER}: compute_advantages_and_returns",
        ),
        Figure(
            theirs=("kl",),
            ours=("objective/kl", "objective/kl_k3"),
            convert=per_response(*_LENGTHS),
            meaning="`kl_estimator` (k1 by default), nats a token; 0 without a reference",
            unfit=("policy_unmoved",),
            limits=ROUGH_KL,
            source=f"{_MAKER}: make_experience",
        ),
        Figure(
            theirs=("entropy_loss", "ent_loss"),
            ours=("objective/entropy",),
            meaning="logged if `entropy_coef` is set",
            source=_ACTOR,
        ),
        Figure(
            theirs=("ppo_kl",),
            ours=("ppo/approx_kl",),
            meaning="k1: the mean of old less new log-probabilities",
            source="openrlhf/models/loss.py: PolicyLoss",
        ),
        Figure(theirs=("ppo_clip_ratio",), ours=("ppo/clipfrac",), source="openrlhf/models/loss.py: PolicyLoss"),
        Figure(
            theirs=("vllm_kl",),
            near=("rollout/logprob_gap",),
            meaning="a mean with signs, which cancel",
            source="openrlhf/models/loss.py: PolicyLoss",
        ),
        Figure(theirs=_LENGTHS, ours=("response/length",), source=_ROLLOUT),
        Figure(
            theirs=("rollout/truncated_rate", "response_clip_ratio"),
            ours=("response/stop_rate",),
            convert=COMPLEMENT,
            meaning="the share of responses that were cut off",
            source=_ROLLOUT,
        ),
        Figure(theirs=("actor_lr", "act_lr"), ours=("ppo/lr",), zero_counts=True, source=_ACTOR),
        Figure(theirs=("critic_lr", "cri_lr"), ours=("ppo/value_lr",), zero_counts=True, source=_CRITIC),
        Figure(
            theirs=("actor_grad_norm", "grad_norm"),
            ours=("ppo/grad_norm",),
            meaning="that of the last step of the update",
            zero_counts=True,
            source=_ACTOR,
        ),
        Figure(theirs=("critic_grad_norm",), ours=("ppo/value_grad_norm",), zero_counts=True, source=_CRITIC),
        Figure(
            theirs=("timing/generation",), ours=("time/rollout",), source="openrlhf/trainer/ppo_trainer.py: train_step"
        ),
        Figure(
            theirs=("timing/make_experience",),
            ours=("time/score",),
            source="openrlhf/trainer/ppo_trainer.py: train_step",
        ),
        Figure(
            theirs=("timing/ppo_train",), ours=("time/optimise",), source="openrlhf/trainer/ppo_trainer.py: train_step"
        ),
    ),
    settings={
        "learning_rate": ("actor_learning_rate", "actor.optim.lr"),
        "kl_coef": ("init_kl_coef", "algo.kl.init_coef"),
        "kl_target": ("kl_target",),
        "rollout_batch_size": ("rollout_batch_size", "rollout.batch_size"),
        "max_grad_norm": ("max_norm",),
        "temperature": ("temperature",),
    },
)

_RM = "openrlhf/trainer/rm_trainer.py: fit"
_PAIRS = (
    Figure(theirs=("loss_mean", "loss"), ours=("reward/loss",), source=_RM),
    Figure(theirs=("eval_eval_loss",), ours=("reward/eval_loss",), source="openrlhf/trainer/rm_trainer.py: evaluate"),
    Figure(theirs=("chosen_reward",), ours=("reward/margin",), convert=less("reject_reward"), source=_RM),
    Figure(theirs=("grad_norm",), ours=("reward/grad_norm",), zero_counts=True, source=_RM),
    Figure(theirs=("lr",), ours=("reward/lr",), zero_counts=True, source=_RM),
)
_PAIR_MARKS = (words("chosen_reward"), words("reject_reward"))
REWARD = Kind(
    project="OpenRLHF",
    trainer="reward model",
    stage="reward",
    marks=(*_PAIR_MARKS, words("eval_reward_mean", "stage=reward")),
    figures=(
        *_PAIRS,
        Figure(theirs=("acc_mean", "acc"), ours=("reward/accuracy",), source=_RM),
        Figure(
            theirs=("eval_acc_mean",), ours=("reward/eval_accuracy",), source="openrlhf/trainer/rm_trainer.py: evaluate"
        ),
    ),
    settings={"learning_rate": ("learning_rate", "adam.lr"), "max_grad_norm": ("max_norm",)},
)
PREFERENCE = Kind(
    project="OpenRLHF",
    trainer="DPO or a reward model",
    stage="reward",
    marks=_PAIR_MARKS,
    figures=(
        *_PAIRS,
        Figure(
            theirs=("eval_acc_mean", "acc_mean", "acc"),
            near=("reward/eval_accuracy",),
            meaning="that of a reward model, or of a policy's implicit reward; give --stage reward if it is the first",
            source=_RM,
        ),
    ),
    settings=REWARD.settings,
)
_SFT = "openrlhf/trainer/sft_trainer.py: fit"
SFT = Kind(
    project="OpenRLHF",
    trainer="SFT",
    stage="sft",
    marks=(words("gpt_loss", "eval_eval gpt_loss"),),
    figures=(
        Figure(theirs=("loss_mean", "gpt_loss"), ours=("sft/loss",), source=_SFT),
        Figure(
            theirs=("eval_eval gpt_loss",),
            ours=("sft/eval_loss",),
            source="openrlhf/trainer/sft_trainer.py: evaluate",
        ),
        Figure(theirs=("grad_norm",), ours=("sft/grad_norm",), zero_counts=True, source=_SFT),
        Figure(theirs=("lr",), ours=("sft/lr",), zero_counts=True, source=_SFT),
    ),
    settings=REWARD.settings,
)
KINDS = (PPO, REWARD, PREFERENCE, SFT)
