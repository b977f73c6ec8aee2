"""Figures of verl's trainers."""

from __future__ import annotations

from rlhf.doctor.foreign.figure import COMPLEMENT, ROUGH_KL, Figure, Kind, per_response, scaled, words

_DATA = "verl/trainer/ppo/metric_utils.py: compute_data_metrics"
_TIMES = "verl/trainer/ppo/metric_utils.py: compute_timing_metrics"
_ACTOR = "verl/workers/actor/dp_actor.py: update_policy"
_LOSS = "verl/trainer/ppo/core_algos.py: compute_policy_loss_vanilla"
_CRITIC = "verl/workers/critic/dp_critic.py: update_critic"
_PENALTY = "verl/trainer/ppo/ray_trainer.py: apply_kl_penalty"
_WORKERS = "verl/workers/fsdp_workers.py"
_LENGTH = "response_length/mean"

_FIGURES = (
    Figure(
        theirs=("critic/score/mean",),
        ours=("objective/score", "objective/raw_score"),
        meaning="the reward before the KL penalty",
        source=_DATA,
    ),
    Figure(theirs=("critic/rewards/mean",), ours=("objective/rlhf_reward",), source=_DATA),
    Figure(
        theirs=("critic/score/max", "critic/score/min"),
        near=("objective/score_std",),
        meaning="an extreme of the scores, and no spread",
        source=_DATA,
    ),
    Figure(
        theirs=("actor/kl_loss",),
        ours=("objective/kl_k3",),
        convert=per_response(_LENGTH),
        meaning="`kl_loss_type` (k3 by default), nats a token, in the course of an update",
        unfit=("policy_unmoved",),
        limits=ROUGH_KL,
        zero_counts=True,
        source=_ACTOR,
    ),
    Figure(
        theirs=("actor/reward_kl_penalty", "critic/kl"),
        ours=("objective/kl", "objective/kl_k3"),
        convert=per_response(_LENGTH),
        meaning="k1 by default, nats a token, a mean of the responses' means",
        unfit=("policy_unmoved",),
        limits=ROUGH_KL,
        zero_counts=True,
        source=_PENALTY,
    ),
    Figure(
        theirs=("actor/reward_kl_penalty_coeff", "critic/kl_coeff", "actor/kl_coef"),
        ours=("objective/kl_coef",),
        meaning="of the penalty in the reward or of the KL loss",
        zero_counts=True,
        source=_PENALTY,
    ),
    Figure(
        theirs=("actor/entropy", "actor/entropy_loss"),
        ours=("objective/entropy",),
        meaning="of a token by default (`loss_agg_mode`)",
        source="verl/trainer/ppo/ray_trainer.py: fit",
    ),
    Figure(
        theirs=("actor/ppo_kl",),
        ours=("ppo/approx_kl",),
        meaning="k1: the mean of old less new log-probabilities",
        source=_LOSS,
    ),
    Figure(theirs=("actor/pg_clipfrac",), ours=("ppo/clipfrac",), source=_LOSS),
    Figure(theirs=("actor/pg_loss",), ours=("ppo/policy_loss",), source=_ACTOR),
    Figure(
        theirs=("actor/grad_norm",),
        ours=("ppo/grad_norm",),
        meaning="the mean of the update's steps, where ours is the largest",
        zero_counts=True,
        source=_ACTOR,
    ),
    Figure(theirs=("actor/lr",), ours=("ppo/lr",), zero_counts=True, source=_WORKERS),
    Figure(theirs=("actor/lr(1e-4)",), ours=("ppo/lr",), convert=scaled(1e-4), zero_counts=True, source="verl 0.1"),
    Figure(theirs=("critic/lr",), ours=("ppo/value_lr",), zero_counts=True, source=_WORKERS),
    Figure(
        theirs=("critic/lr(1e-4)",), ours=("ppo/value_lr",), convert=scaled(1e-4), zero_counts=True, source="verl 0.1"
    ),
    Figure(theirs=("critic/vf_loss",), ours=("ppo/value_loss",), source=_CRITIC),
    Figure(theirs=("critic/vf_clipfrac",), ours=("ppo/value_clipfrac",), source=_CRITIC),
    Figure(theirs=("critic/grad_norm",), ours=("ppo/value_grad_norm",), zero_counts=True, source=_CRITIC),
    Figure(theirs=("critic/vf_explained_var",), ours=("ppo/explained_variance",), source=_DATA),
    Figure(
        theirs=("critic/values/max", "critic/values/min"),
        near=("ppo/value_std",),
        meaning="an extreme of the values, and no spread",
        source=_DATA,
    ),
    Figure(
        theirs=("critic/advantages/max", "critic/advantages/min"),
        near=("ppo/advantage_std",),
        meaning="an extreme of the advantages after whitening",
        source=_DATA,
    ),
    Figure(theirs=(_LENGTH,), ours=("response/length",), source=_DATA),
    Figure(
        theirs=("response_length/clip_ratio",),
        ours=("response/stop_rate",),
        convert=COMPLEMENT,
        meaning="the share of responses of the greatest length",
        source=_DATA,
    ),
    Figure(
        theirs=("training/rollout_probs_diff_mean",),
        near=("rollout/logprob_gap",),
        meaning="a difference of probabilities, not of their logarithms",
        source="verl/utils/debug/metrics.py: calculate_debug_metrics",
    ),
    Figure(theirs=("timing_s/gen",), ours=("time/rollout",), source=_TIMES),
    Figure(
        theirs=("timing_s/old_log_prob", "timing_s/ref", "timing_s/values", "timing_s/reward"),
        ours=("time/score",),
        total=True,
        source=_TIMES,
    ),
    Figure(
        theirs=("timing_s/update_actor", "timing_s/update_critic"), ours=("time/optimise",), total=True, source=_TIMES
    ),
)
_ADVANTAGES = Figure(theirs=("critic/advantages/mean",), ours=("ppo/advantage_mean",), source=_DATA)
_SETTINGS = {
    "learning_rate": ("actor_rollout_ref.actor.optim.lr",),
    "warmup_steps": ("actor_rollout_ref.actor.optim.lr_warmup_steps",),
    "max_grad_norm": ("actor_rollout_ref.actor.grad_clip",),
    "kl_coef": ("algorithm.kl_ctrl.kl_coef",),
    "kl_target": ("algorithm.kl_ctrl.target_kl",),
    "kl_loss_coef": ("actor_rollout_ref.actor.kl_loss_coef",),
    "temperature": ("actor_rollout_ref.rollout.temperature",),
    "rollout_batch_size": ("data.train_batch_size",),
    "response_length": ("data.max_response_length",),
    "adv_estimator": ("algorithm.adv_estimator",),
}
_MARKS = words("actor/pg_loss", "critic/score/mean", "critic/rewards/mean", "actor/grad_norm")
PPO = Kind(
    project="verl",
    trainer="PPO",
    stage="ppo",
    marks=(_MARKS, words("critic/vf_loss", "critic/vf_explained_var")),
    figures=(*_FIGURES, _ADVANTAGES),
    settings=_SETTINGS,
)
GRPO = Kind(
    project="verl",
    trainer="GRPO and others without a critic",
    stage="ppo",
    marks=(_MARKS,),
    figures=(
        *_FIGURES,
        Figure(
            theirs=("critic/advantages/mean",),
            near=("ppo/advantage_mean",),
            meaning="centred over the responses of a prompt, so not 0 over tokens",
            source=_DATA,
        ),
    ),
    settings=_SETTINGS,
)
SFT = Kind(
    project="verl",
    trainer="SFT",
    stage="sft",
    marks=(words("loss"), words("val/loss", "lr(1e-3)", "mfu", "global_tokens")),
    figures=(
        Figure(theirs=("loss",), ours=("sft/loss",), source="verl/trainer/sft_trainer.py: fit"),
        Figure(theirs=("val/loss",), ours=("sft/eval_loss",), source="verl/trainer/sft_trainer.py: fit"),
        Figure(
            theirs=("grad_norm",), ours=("sft/grad_norm",), zero_counts=True, source="verl/trainer/sft_trainer.py: fit"
        ),
        Figure(theirs=("lr",), ours=("sft/lr",), zero_counts=True, source="verl/trainer/sft_trainer.py: fit"),
        Figure(
            theirs=("lr(1e-3)",),
            ours=("sft/lr",),
            convert=scaled(1e-3),
            zero_counts=True,
            source="verl/trainer/fsdp_sft_trainer.py: training_step",
        ),
    ),
    settings={"learning_rate": ("optim.lr",), "max_grad_norm": ("optim.clip_grad",)},
)
KINDS = (PPO, GRPO, SFT)
