"""Limits on options of every training stage, and of SFT, reward modelling and pretraining."""

from __future__ import annotations

from rlhf.doctor.review.facts import Facts
from rlhf.doctor.review.limits import Limit, Side

TRAINED = ("sft", "reward", "ppo")
SUPERVISED = ("pretrain", "sft", "reward")
EVERY = ("pretrain", *TRAINED)
STEP_SIZES = (
    "Schulman et al. 2025, LoRA Without Regret: adapters ten times full fine-tuning; width as tinker-cookbook's get_lr"
)
#: Symptoms of a step size that is far too large.
TOO_LARGE = (
    *(
        "not_finite",
        "loss_rising",
        "loss_flat",
        "accuracy_at_chance",
        "batch_spike",
        "steps_too_large",
        "kl_jump",
        "kl_high",
    ),
    *(
        "stale_logprobs",
        "entropy_collapse",
        "responses_alike",
        "repeated_text",
        "length_up",
        "length_down",
        "reward_falling",
    ),
    *(
        "stop_rate_falling",
        "over_optimised",
        "advantages_vanished",
        "reward_saturated",
        "value_useless",
        "gradient_spike",
    ),
    *("length_rewarded", "controller_saturated", "sampler_drift", "value_dead"),
)
#: Symptoms of weights that do not move.
UNMOVED = ("learning_rate_zero", "loss_flat", "accuracy_at_chance", "policy_unmoved", "same_as_sft", "value_dead",
           "value_untrained", "value_useless", "gradient_spike")  # fmt: skip


def _reach(f: Facts) -> float | None:
    """Return the reach of a run whose step size is a hundredth of the usual one or less: a trial of few updates is none."""
    relative = f.relative_step(f.config.learning_rate)
    return f.reach if relative is not None and relative < 0.01 else None


def _warmup(f: Facts) -> float | None:
    """Return the warm-up's share of the run; a trial of fewer than ten updates may end in it."""
    share = f.warmup_share
    return share if share is None or f.steps is None or f.steps >= 10 else min(share, 0.9)


def _decay(f: Facts) -> float | None:
    return f.config.weight_decay * f.config.learning_rate * f.steps if f.steps else None


def _memory(f: Facts) -> float | None:
    return 1 / (1 - f.config.adam_beta1) / f.steps if f.steps and f.steps >= 10 else None


TRAINING_LIMITS = (
    Limit(
        name="learning_rate",
        what="step size over the one that suits width and method",
        measure=lambda f: f.relative_step(f.config.learning_rate),
        options=("learning_rate", "lora_alpha", "lora_r"),
        stages=TRAINED,
        low=Side(
            note=0.01,
            cause="small steps: published runs with such step sizes take thousands of updates",
            action="raise learning_rate, or expect little of a short run",
            explains=UNMOVED,
        ),
        high=Side(
            note=3,
            warning=6,
            critical=15,
            cause="the step size is far above published ones: training diverges or forgets, whatever the other options are",
            action="lower learning_rate (adapters: 1e-4 to 1e-3, full fine-tuning a tenth; wider models less)",
            explains=TOO_LARGE,
        ),
        source=STEP_SIZES,
    ),
    Limit(
        name="learning_rate",
        what="step size over GPT-3's at this width (6e-4 at 768)",
        measure=lambda f: f.relative_step(f.config.learning_rate),
        options=("learning_rate",),
        stages=("pretrain",),
        low=Side(
            note=0.03,
            cause="small steps: little is learned from a pass over the text",
            action="raise learning_rate",
            explains=UNMOVED,
        ),
        high=Side(
            note=5,
            warning=20,
            critical=60,
            cause="the step size is far above published ones",
            action="lower learning_rate",
            explains=TOO_LARGE,
        ),
        source="Brown et al. 2020, table 2.1",
    ),
    Limit(
        name="reach",
        what="relative step size times updates",
        measure=_reach,
        options=("learning_rate", "lora_alpha", "lora_r", "warmup_steps"),
        stages=EVERY,
        low=Side(
            note=3,
            warning=0.5,
            critical=0.05,
            cause="the steps are far too small for the length of the run: the weights end where they began",
            action="raise learning_rate by a factor of ten or more",
            explains=UNMOVED,
        ),
        source=STEP_SIZES,
    ),
    Limit(
        name="warmup",
        what="warm-up as a share of the run's optimiser updates",
        measure=_warmup,
        options=("warmup_steps",),
        stages=EVERY,
        percent=True,
        high=Side(
            note=0.4,
            warning=0.999,
            critical=2,
            cause="the warm-up is longer than the run, so the step size never reaches learning_rate",
            action="lower warmup_steps to a tenth of the updates, or train longer",
            explains=UNMOVED,
        ),
        source="InstructGPT, appendix C: 10 of 256,000 / 512 updates",
    ),
    Limit(
        name="schedule",
        what="step size over the usual one, held to the end of the run",
        measure=lambda f: (
            f.relative_step(f.config.learning_rate) if f.config.lr_scheduler_type == "constant_with_warmup" else None
        ),
        options=("lr_scheduler_type", "learning_rate"),
        stages=TRAINED,
        high=Side(
            note=1,
            cause="a large step size that never falls: late updates undo each other, and PPO drifts away",
            action="set lr_scheduler_type cosine_with_min_lr, or lower learning_rate",
            explains=("over_optimised", "kl_high", "responses_alike"),
        ),
        source="InstructGPT, appendix C; Ziegler et al. 2019",
    ),
    Limit(
        name="updates",
        what="optimiser updates of the run",
        measure=lambda f: f.steps,
        options=("max_steps", "total_episodes"),
        stages=EVERY,
        low=Side(
            note=20,
            cause="a run this short is a trial of the machinery: it can learn little",
            action="train longer: more rows, epochs or episodes, or smaller batches",
            explains=("loss_flat", "accuracy_at_chance", "policy_unmoved", "same_as_sft"),
        ),
    ),
    Limit(
        name="batch",
        what="rows an optimiser update",
        measure=lambda f: f.batch,
        options=("per_device_train_batch_size", "gradient_accumulation_steps", "minibatch_size"),
        stages=TRAINED,
        low=Side(note=2, cause="gradients of so few rows are mostly noise", action="raise the batch size"),
        high=Side(
            note=1024,
            cause="adapters learn less from very large batches than full fine-tuning",
            action="lower the batch size, and have more updates",
        ),
        source="Schulman et al. 2025; InstructGPT: 32 (SFT), 64 prompts (reward), 64 (PPO)",
    ),
    Limit(
        name="epochs",
        what="passes over the demonstrations",
        measure=lambda f: f.epochs,
        options=("num_train_epochs", "max_steps"),
        stages=("pretrain", "sft"),
        high=Side(note=16, cause="the model learns its rows by heart", action="train for fewer passes"),
        source="InstructGPT, appendix C.1: 16 (it overfits after 1, and is still preferred)",
    ),
    Limit(
        name="epochs",
        what="passes over the comparisons",
        measure=lambda f: f.epochs,
        options=("num_train_epochs", "max_steps"),
        stages=("reward",),
        high=Side(note=3, cause="reward models overfit from the second pass on", action="train for one pass"),
        source="InstructGPT, appendix C.2: 1",
    ),
    Limit(
        name="adam_epsilon",
        what="Adam's epsilon",
        measure=lambda f: f.config.adam_epsilon,
        stages=EVERY,
        low=Side(note=1e-12, cause="a gradient of 0 makes steps of any size", action="set adam_epsilon 1e-8 to 1e-5"),
        high=Side(
            note=1e-4,
            warning=1e-2,
            critical=1,
            cause="epsilon is larger than gradients are, so steps shrink to nothing",
            action="set adam_epsilon 1e-8 to 1e-5",
            explains=UNMOVED,
        ),
        source="N+: 1e-5; Kingma and Ba 2015: 1e-8",
    ),
    Limit(
        name="adam_beta1",
        what="updates that Adam's first moment remembers, 1 / (1 - beta1), as a share of the run",
        measure=_memory,
        options=("adam_beta1",),
        stages=EVERY,
        high=Side(
            note=1.01,
            warning=3,
            cause="the momentum is older than the run: steps follow gradients of long ago",
            action="set adam_beta1 0.9",
            explains=UNMOVED,
        ),
        source="InstructGPT, appendix C: 0.9",
    ),
    Limit(
        name="adam_beta2",
        what="decay of Adam's second moment",
        measure=lambda f: f.config.adam_beta2,
        stages=EVERY,
        low=Side(
            note=0.9,
            warning=0.5,
            cause="the size of gradients is that of the last ones alone: steps of one size, whatever their sign's certainty",
            action="set adam_beta2 0.95 to 0.999",
        ),
        source="InstructGPT, appendix C: 0.95; Kingma and Ba 2015: 0.999",
    ),
    Limit(
        name="weight_decay",
        what="share of the weights that decays in the run: weight_decay x learning_rate x updates",
        measure=_decay,
        options=("weight_decay", "learning_rate"),
        stages=EVERY,
        percent=True,
        high=Side(
            note=0.5,
            warning=3,
            cause="decay takes back what is learned",
            action="set weight_decay 0 to 0.1",
            explains=UNMOVED,
        ),
        source="InstructGPT, appendix C: 0 to 0.1",
    ),
    Limit(
        name="max_grad_norm",
        what="norm that gradients are scaled down to",
        measure=lambda f: f.config.max_grad_norm,
        stages=EVERY,
        low=Side(
            note=0.05,
            warning=1e-4,
            cause="every gradient is scaled down to next to nothing, near Adam's epsilon",
            action="set max_grad_norm 0.5 to 1",
            explains=UNMOVED,
        ),
        high=Side(note=100, cause="nothing holds the step of a bad batch", action="set max_grad_norm 0.5 to 1"),
        source="OpenRLHF, TRL: 1; CleanRL: 0.5",
    ),
    Limit(
        name="lora_rank",
        what="rank of the adapters",
        measure=lambda f: f.option("lora_r") if f.option("finetuning") != "full" else None,
        options=("lora_r",),
        stages=TRAINED,
        low=Side(
            note=4, cause="few directions to learn in: enough for PPO, little for SFT", action="set lora_r 8 to 64"
        ),
        high=Side(note=256, cause="more weights than adapters need", action="set lora_r 8 to 64, or finetuning full"),
        source="Hu et al. 2022; Schulman et al. 2025",
    ),
    Limit(
        name="lora_dropout",
        what="dropout on the adapters' input",
        measure=lambda f: f.option("lora_dropout"),
        stages=("sft", "reward"),
        high=Side(
            note=0.2,
            warning=0.7,
            cause="most of the adapters' input is dropped",
            action="set lora_dropout 0 to 0.1",
            explains=("loss_flat", "accuracy_at_chance"),
        ),
        source="Dettmers et al. 2023: 0.05 to 0.1",
    ),
    Limit(
        name="label_smoothing",
        what="assumed share of flipped pairs",
        measure=lambda f: f.option("label_smoothing"),
        stages=("reward",),
        percent=True,
        high=Side(
            note=0.3,
            warning=0.45,
            cause="nearly half of the labels are assumed to be wrong, so nothing is left to learn",
            action="set label_smoothing to the raters' disagreement: 0 to 0.3",
            explains=("accuracy_at_chance", "loss_flat"),
        ),
        source="Wang et al. 2024, Secrets of RLHF II; raters of InstructGPT agree in 73%",
    ),
    Limit(
        name="centering",
        what="weight of the squared sum of a pair's scores",
        measure=lambda f: f.option("center_rewards_coefficient"),
        options=("center_rewards_coefficient",),
        stages=("reward",),
        high=Side(
            note=0.1,
            warning=5,
            cause="scores are pressed to 0 rather than apart",
            action="set center_rewards_coefficient 0.01",
            explains=("accuracy_at_chance", "loss_flat"),
        ),
        source="Eisenstein et al. 2023, TRL: 0.01",
    ),
    Limit(
        name="margin",
        what="mean margin of a training pair: margin_per_rating x difference in rating, logits",
        measure=lambda f: (
            f.option("margin_per_rating") * d if (d := f.figure("rating_difference")) is not None else None
        ),
        options=("margin_per_rating",),
        stages=("reward",),
        high=Side(
            note=3,
            warning=20,
            cause="scores must lie so far apart that every pair counts as wrong to the end",
            action="choose margin_per_rating for margins of up to 1 to 3",
        ),
        source="Llama 2, section 3.2.2: up to 1 or 3",
    ),
)
