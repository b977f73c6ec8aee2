"""Figures of TRL's trainers, and of all that are built on transformers' Trainer.

Names as in `trainer_state.json`; W&B and TensorBoard have `train/` before them, and `eval/` for `eval_`.
"""

from __future__ import annotations

from rlhf.doctor.foreign.figure import COMPLEMENT, ROUGH_KL, Figure, Kind, per_response, words
from rlhf.doctor.health.check import Stage

TRAINER_SETTINGS = {
    "learning_rate": ("learning_rate",),
    "lr_scheduler_type": ("lr_scheduler_type",),
    "warmup_steps": ("warmup_steps",),
    "warmup_ratio": ("warmup_ratio",),
    "max_grad_norm": ("max_grad_norm",),
    "max_steps": ("max_steps",),
    "num_train_epochs": ("num_train_epochs",),
    "batch size a device": ("per_device_train_batch_size", "train_batch_size"),
    "gradient_accumulation_steps": ("gradient_accumulation_steps",),
    "logging_steps": ("logging_steps",),
}
_TRAINER = "transformers, trainer.py: _maybe_log_save_evaluate"


def trainer_figures(stage: Stage, *, loss: str = "") -> tuple[Figure, ...]:
    """Return the figures that transformers' Trainer logs in every run, for one of our stages."""
    return (
        Figure(
            theirs=("loss",),
            ours=(f"{stage}/policy_loss" if stage == "ppo" else f"{stage}/loss",),
            meaning=loss or "the mean of the steps since the last log line",
            source=_TRAINER,
        ),
        Figure(
            theirs=("grad_norm",),
            ours=(f"{stage}/grad_norm",),
            meaning="the norm before clipping, of the last step only",
            zero_counts=True,
            source=_TRAINER,
        ),
        Figure(theirs=("learning_rate", "lr"), ours=(f"{stage}/lr",), zero_counts=True, source=_TRAINER),
    )


def eval_loss(stage: Stage) -> Figure:
    """Return the held-out loss of transformers' Trainer."""
    return Figure(theirs=("eval_loss",), ours=(f"{stage}/eval_loss",), source="transformers, trainer.py: evaluate")


SFT = Kind(
    project="TRL",
    trainer="SFT, or another training with one loss",
    stage="sft",
    marks=(words("loss", "eval_loss"),),
    figures=(
        *trainer_figures("sft"),
        eval_loss("sft"),
        Figure(
            theirs=("mean_token_accuracy",),
            ours=("sft/token_accuracy",),
            source="sft_trainer.py: compute_loss",
        ),
        Figure(
            theirs=("eval_accuracy", "accuracy"),
            near=("reward/eval_accuracy",),
            meaning="the accuracy of a classifier or of a reward model; give --stage reward if it is one",
            source="compute_metrics of the script",
        ),
    ),
    settings=TRAINER_SETTINGS,
)

REWARD = Kind(
    project="TRL",
    trainer="reward model",
    stage="reward",
    marks=(
        words("loss", "eval_loss"),
        words("margin", "eval_margin", "mean_reward", "eval_mean_reward", "stage=reward"),
        words("eval_accuracy", "accuracy"),
    ),
    figures=(
        *trainer_figures("reward"),
        eval_loss("reward"),
        Figure(theirs=("accuracy",), ours=("reward/accuracy",), source="reward_trainer.py: compute_loss"),
        Figure(theirs=("eval_accuracy",), ours=("reward/eval_accuracy",), source="reward_trainer.py: compute_loss"),
        Figure(theirs=("margin",), ours=("reward/margin",), source="reward_trainer.py: compute_loss"),
    ),
    settings=TRAINER_SETTINGS,
)

_IMPLICIT = "the accuracy of the policy's implicit reward, which no reward model's limit was set on"
PREFERENCE = Kind(
    project="TRL",
    trainer="DPO, KTO, CPO, ORPO",
    stage="reward",
    marks=(
        words("rewards/chosen", "rewards/accuracies", "eval_rewards/accuracies"),
        words("rewards/margins", "eval_rewards/margins"),
    ),
    figures=(
        *trainer_figures("reward"),
        eval_loss("reward"),
        Figure(
            theirs=("eval_rewards/accuracies", "rewards/accuracies"),
            near=("reward/eval_accuracy",),
            meaning=_IMPLICIT,
            source="dpo_trainer.py: _compute_loss",
        ),
        Figure(theirs=("rewards/margins",), ours=("reward/margin",), source="dpo_trainer.py: _compute_loss"),
    ),
    settings=TRAINER_SETTINGS | {"beta": ("beta",)},
)

_GRPO = "grpo_trainer.py"
_LENGTHS = ("completions/mean_length", "completion_length")
GRPO = Kind(
    project="TRL",
    trainer="GRPO, RLOO",
    stage="ppo",
    marks=(
        words("reward"),
        words(*_LENGTHS, "completions/clipped_ratio", "frac_reward_zero_std", "reward_std"),
    ),
    figures=(
        *trainer_figures("ppo", loss="the loss of GRPO, KL term included"),
        Figure(
            theirs=("reward",),
            ours=("objective/score", "objective/raw_score"),
            meaning="the weighted sum of the reward functions",
            source=f"{_GRPO}: _generate_and_score_completions",
        ),
        Figure(
            theirs=("reward_std",),
            ours=("objective/score_std",),
            meaning="in most versions the mean spread within the groups of one prompt, less than that of all scores",
            unfit=("reward_falling", "reward_saturated"),
            source=f"{_GRPO}: _generate_and_score_completions",
        ),
        Figure(
            theirs=("kl",),
            ours=("objective/kl_k3",),
            convert=per_response(*_LENGTHS),
            meaning="k3 in GRPO and k1 in RLOO, nats a token, in the course of an update",
            unfit=("policy_unmoved",),
            limits=ROUGH_KL,
            source=f"{_GRPO}: _compute_loss",
        ),
        Figure(theirs=("entropy", "entropy/mean"), ours=("objective/entropy",), source=f"{_GRPO}: _compute_loss"),
        Figure(
            theirs=("clip_ratio/region_mean", "clip_ratio"),
            ours=("ppo/clipfrac",),
            source=f"{_GRPO}: _compute_loss",
        ),
        Figure(theirs=_LENGTHS, ours=("response/length",), source=f"{_GRPO}: _generate"),
        Figure(
            theirs=("completions/clipped_ratio",),
            ours=("response/stop_rate",),
            convert=COMPLEMENT,
            meaning="the share of responses without a stop token",
            source=f"{_GRPO}: _generate",
        ),
        Figure(
            theirs=("sampling/sampling_logp_difference/mean",),
            ours=("rollout/logprob_gap",),
            source=f"{_GRPO}: _generate_and_score_completions",
        ),
    ),
    settings=TRAINER_SETTINGS
    | {"beta": ("beta",), "temperature": ("temperature",), "num_generations": ("num_generations",)},
)

_PPO = "experimental/ppo/ppo_trainer.py: train"
#: A KL by k1 of the sampler's logits: rounding alone is some tenths of a nat a response in bf16.
_ROUGH = {"wrong_reference": {"kl": 1.0}, "negative_kl": {"kl": -0.5}}
PPO = Kind(
    project="TRL",
    trainer="PPO",
    stage="ppo",
    marks=(words("objective/kl"), words("policy/approxkl_avg", "policy/clipfrac_avg", "loss/policy_avg")),
    figures=(
        Figure(
            theirs=("objective/kl",),
            ours=("objective/kl", "objective/kl_k3"),
            meaning="k1 (or k3, `kl_estimator`) summed over a response, where our k3 has less noise",
            unfit=("policy_unmoved",),
            limits=_ROUGH,
            source=_PPO,
        ),
        Figure(
            theirs=("policy/entropy_avg",),
            ours=("objective/entropy",),
            meaning="of the updates' forward passes, over padding, too",
            limits={"entropy_collapse": {"share": 0.02}},
            source=_PPO,
        ),
        Figure(
            theirs=("objective/entropy",),
            near=("objective/entropy",),
            meaning="-log p summed over a response",
            source=_PPO,
        ),
        Figure(
            theirs=("objective/scores",),
            ours=("objective/score",),
            meaning="the score less `missing_eos_penalty`",
            source=_PPO,
        ),
        Figure(theirs=("objective/rlhf_reward",), ours=("objective/rlhf_reward",), source=_PPO),
        Figure(
            theirs=("policy/approxkl_avg",),
            ours=("ppo/approx_kl",),
            meaning="half the mean square of the log-ratio (k2), over padding, too: at most ours",
            source=_PPO,
        ),
        Figure(theirs=("policy/clipfrac_avg",), ours=("ppo/clipfrac",), source=_PPO),
        Figure(theirs=("loss/policy_avg",), ours=("ppo/policy_loss",), source=_PPO),
        Figure(theirs=("loss/value_avg",), ours=("ppo/value_loss",), source=_PPO),
        Figure(theirs=("val/clipfrac_avg",), ours=("ppo/value_clipfrac",), source=_PPO),
        Figure(
            theirs=("val/ratio",),
            near=("ppo/ratio_max",),
            meaning="the mean ratio, over padding, too",
            source=_PPO,
        ),
        Figure(
            theirs=("val/num_eos_tokens",),
            near=("response/stop_rate",),
            meaning="a number of tokens, padding included where it is the stop token",
            source=_PPO,
        ),
        Figure(theirs=("lr", "learning_rate"), ours=("ppo/lr",), zero_counts=True, source=_PPO),
        Figure(theirs=("episode",), ours=("episodes",), source=_PPO),
    ),
    settings=TRAINER_SETTINGS
    | {
        "kl_coef": ("kl_coef",),
        "num_ppo_epochs": ("num_ppo_epochs",),
        "response_length": ("response_length",),
        "temperature": ("temperature",),
    },
)

_OLD = "0.11, ppo_trainer.py: record_step_stats"
OLD_PPO = Kind(
    project="TRL to 0.11",
    trainer="PPO",
    stage="ppo",
    marks=(words("objective/kl"), words("ppo/mean_scores", "env/reward_mean", "ppo/policy/approxkl")),
    figures=(
        Figure(
            theirs=("objective/kl",),
            ours=("objective/kl", "objective/kl_k3"),
            meaning="k1 (or `kl_penalty`) summed over a response, where our k3 has less noise",
            unfit=("policy_unmoved",),
            limits=_ROUGH,
            source=_OLD,
        ),
        Figure(theirs=("objective/kl_coef",), ours=("objective/kl_coef",), source=_OLD),
        Figure(
            theirs=("ppo/policy/entropy",),
            ours=("objective/entropy",),
            meaning="of the updates' forward passes",
            source="0.11, ppo_trainer.py: loss",
        ),
        Figure(
            theirs=("ppo/policy/approxkl",),
            ours=("ppo/approx_kl",),
            meaning="half the mean square of the log-ratio (k2)",
            source="0.11, ppo_trainer.py: loss",
        ),
        Figure(theirs=("ppo/policy/clipfrac",), ours=("ppo/clipfrac",), source="0.11, ppo_trainer.py: loss"),
        Figure(
            theirs=("ppo/mean_scores", "env/reward_mean"),
            ours=("objective/score", "objective/raw_score"),
            source=_OLD,
        ),
        Figure(theirs=("ppo/std_scores", "env/reward_std"), ours=("objective/score_std",), source=_OLD),
        Figure(theirs=("tokens/responses_len_mean",), ours=("response/length",), source=_OLD),
        Figure(theirs=("ppo/loss/policy",), ours=("ppo/policy_loss",), source="0.11, ppo_trainer.py: loss"),
        Figure(theirs=("ppo/loss/value",), ours=("ppo/value_loss",), source="0.11, ppo_trainer.py: loss"),
        Figure(
            theirs=("ppo/val/var_explained",),
            near=("ppo/explained_variance",),
            meaning="1 - mean square of the error over Var(R): the error's mean counts against it, too",
            source=_OLD,
        ),
        Figure(
            theirs=("ppo/policy/advantages_mean",),
            near=("ppo/advantage_mean",),
            meaning="a mean of the minibatches' means, which is not 0",
            source="0.11, ppo_trainer.py: loss",
        ),
        Figure(theirs=("ppo/learning_rate",), ours=("ppo/lr",), zero_counts=True, source="0.11, ppo_trainer.py: step"),
    ),
    settings={
        "learning_rate": ("learning_rate",),
        "kl_coef": ("init_kl_coef",),
        "kl_target": ("target",),
        "rollout_batch_size": ("batch_size",),
        "num_ppo_epochs": ("ppo_epochs",),
        "max_grad_norm": ("max_grad_norm",),
    },
)

KINDS = (PPO, OLD_PPO, GRPO, PREFERENCE, REWARD, SFT)
