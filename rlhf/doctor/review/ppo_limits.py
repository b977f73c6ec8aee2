"""Limits on options of PPO."""

from __future__ import annotations

import math

from rlhf.config import is_registered_reward
from rlhf.doctor.review.facts import Facts
from rlhf.doctor.review.limits import Limit, Side
from rlhf.doctor.review.training_limits import STEP_SIZES, TOO_LARGE

#: Symptoms of values that learn nothing.
VALUE = ("value_untrained", "value_dead", "value_useless", "reward_falling")
#: Symptoms of a policy that nothing holds.
LOOSE = (
    *("no_kl_penalty", "kl_jump", "kl_high", "over_optimised", "entropy_collapse", "responses_alike", "repeated_text"),
    *("length_up", "length_down", "length_rewarded", "stop_rate_falling", "steps_too_large", "reward_saturated"),
)
#: Symptoms of credit that does not reach the tokens that earned it.
CREDIT = (*VALUE, "length_rewarded", "length_up", "length_down", "advantages_vanished", "policy_unmoved", "gradient_spike",
          "stop_rate_falling")  # fmt: skip
KL_OPTIMUM = "KL at the optimum (s / kl_coef)^2 / 2 nats: Ziegler et al. 2019, section 2.2; Korbak et al. 2022"


def _no_penalty(f: Facts) -> float | None:
    """Return kl_coef where a learned reward model scores alone or among others, and nothing else limits the KL."""
    learned = any(map(is_registered_reward, f.option("reward")))
    held = f.option("kl_target") or f.option("max_kl")
    return f.option("kl_coef") if learned and not held else None


def _reuse(f: Facts) -> float:
    return float(f.option("num_ppo_epochs") * f.option("clip_range"))


def _clip(f: Facts) -> float | None:
    """Return the clip range, where some update sees a policy other than the rollout's."""
    return f.option("clip_range") if f.steps_a_rollout > 1 else None


def _value_reach(f: Facts) -> float | None:
    """Return how far clipped values can move in the run, in spreads of the score; unknown where the spread is."""
    return f.option("clip_range_value") * max(f.rollouts or 0, 10) / f.spread if f.spread else None


def _controller(f: Facts) -> float | None:
    """Return the largest factor by which the KL controller can change its coefficient, less 1."""
    if f.option("kl_target") is None:
        return None
    return math.expm1(min(0.2 * f.option("total_episodes") / f.option("kl_horizon"), 100))


def _penalty(f: Facts) -> float | None:
    return f.option("missing_eos_penalty") / f.spread if f.spread else None


def _short_penalty(f: Facts) -> float | None:
    shortest, each = f.option("min_response_length"), f.option("short_response_penalty")
    return shortest * each / f.spread if f.spread and shortest and each else None


def _average(f: Facts) -> float | None:
    decay = f.option("ema_decay")
    return 1 / (1 - decay) / f.steps if decay is not None and f.steps else None


PPO_LIMITS = (
    Limit(
        name="value_learning_rate",
        what="step size of the value over the one that suits width and method",
        measure=lambda f: f.relative_step(f.option("value_learning_rate")),
        options=("value_learning_rate",),
        low=Side(
            note=0.01,
            warning=1e-4,
            critical=1e-9,
            cause="the value model is not trained, so advantages are the raw returns of single responses",
            action="leave value_learning_rate out (it is learning_rate then)",
            explains=VALUE,
        ),
        high=Side(
            note=5,
            warning=10,
            critical=25,
            cause="the step size of the value is far above published ones",
            action="lower value_learning_rate",
            explains=(*VALUE, *TOO_LARGE),
        ),
        source=STEP_SIZES,
    ),
    Limit(
        name="value_loss",
        what="weight of the value loss",
        measure=lambda f: f.option("vf_coef"),
        options=("vf_coef",),
        low=Side(
            note=0.01,
            warning=1e-5,
            critical=1e-12,
            cause="the value model is not trained",
            action="set vf_coef 0.1 to 1",
            explains=VALUE,
        ),
        high=Side(note=10, cause="a large value loss", action="set vf_coef 0.1 to 1"),
        source="lm-human-preferences, TRL: 0.1; CleanRL: 0.5",
    ),
    Limit(
        name="trunk_share",
        what="weight of the value loss on the trunk that it shares with the policy",
        measure=lambda f: f.option("vf_coef") if f.option("value_model") == "shared_trunk" else None,
        options=("vf_coef", "value_model"),
        high=Side(
            note=1,
            warning=10,
            cause="the value loss drowns the policy's in the trunk that both train",
            action="set vf_coef 0.1, or value_model adapter",
            explains=("steps_too_large", "kl_jump", "kl_high", "gradient_spike", "reward_falling", "entropy_collapse"),
        ),
        source="lm-human-preferences: 0.1",
    ),
    Limit(
        name="value_warmup",
        what="rollouts that train the value alone, as a share of the run",
        measure=lambda f: f.option("value_warmup_updates") / f.rollouts if f.rollouts else None,
        options=("value_warmup_updates", "total_episodes"),
        percent=True,
        high=Side(
            note=0.4,
            critical=0.999,
            cause="the policy is never trained: the whole run is the value's warm-up",
            action="lower value_warmup_updates, or raise total_episodes",
            explains=("gradient_zero", "policy_unmoved", "same_as_sft"),
        ),
    ),
    Limit(
        name="gamma",
        what="weight of the final score at the first token of an answer",
        measure=lambda f: f.option("gamma") ** f.answer_tokens,
        extra=lambda f, weight: f"gamma ^ {f.answer_tokens:.0f} tokens",
        options=("gamma", "response_length"),
        low=Side(
            note=0.7,
            warning=0.1,
            critical=0.01,
            cause="the score is discounted away before it reaches the tokens that earned it; only short answers are rewarded",
            action="set gamma 1",
            explains=CREDIT,
        ),
        source="InstructGPT, Stiennon et al. 2020, N+, TRL: gamma 1",
    ),
    Limit(
        name="lam",
        what="lambda of generalised advantage estimation",
        measure=lambda f: f.option("lam"),
        low=Side(
            note=0.9,
            warning=0.5,
            critical=0.1,
            cause="advantages follow the value's own guesses and hardly the score, which comes at the end alone",
            action="set lam 0.95 (to 1)",
            explains=CREDIT,
        ),
        source="Schulman et al. 2016; lm-human-preferences, N+, TRL: 0.95",
    ),
    Limit(
        name="clip_range",
        what="clip of the probability ratio",
        measure=_clip,
        options=("clip_range", "num_ppo_epochs", "minibatch_size"),
        low=Side(
            note=0.05,
            warning=0.005,
            critical=5e-4,
            cause="all updates of a rollout after the first are clipped away",
            action="set clip_range 0.2",
            explains=("steps_too_large", "policy_unmoved", "gradient_zero", "same_as_sft"),
        ),
        high=Side(
            note=0.4,
            warning=1,
            critical=10,
            cause="nothing holds the updates of a rollout near the policy that sampled it",
            action="set clip_range 0.2",
            explains=("steps_too_large", "kl_jump", "kl_high", "entropy_collapse"),
        ),
        source="Schulman et al. 2017, InstructGPT, N+, TRL: 0.2",
    ),
    Limit(
        name="reuse",
        what="passes over a rollout x clip range",
        measure=_reuse,
        options=("num_ppo_epochs", "clip_range"),
        high=Side(
            note=1.2,
            warning=4.5,
            cause="each rollout is used so often, and held so loosely, that the policy leaves it",
            action="set num_ppo_epochs 1 to 4 and clip_range 0.2",
            explains=("steps_too_large", "kl_jump", "kl_high", "entropy_collapse", "over_optimised"),
        ),
        source="lm-human-preferences, N+, TRL: 4 x 0.2; InstructGPT: 1 x 0.2",
    ),
    Limit(
        name="updates_a_rollout",
        what="optimiser updates on each rollout",
        measure=lambda f: f.steps_a_rollout,
        options=("num_ppo_epochs", "rollout_batch_size", "minibatch_size"),
        high=Side(
            note=64,
            warning=512,
            cause="most updates are made on responses of an old policy",
            action="raise minibatch_size, or lower num_ppo_epochs",
            explains=("steps_too_large", "kl_jump"),
        ),
        source="N+: 16; lm-human-preferences: 32",
    ),
    Limit(
        name="rollout",
        what="responses a rollout",
        measure=lambda f: f.option("rollout_batch_size"),
        options=("rollout_batch_size",),
        low=Side(
            note=16,
            cause="advantages are whitened over so few responses that their size is noise",
            action="raise rollout_batch_size to 64 or more",
        ),
        source="InstructGPT, N+, lm-human-preferences: 512",
    ),
    Limit(
        name="value_clip",
        what="distance that clipped values can move in the run, in spreads of the score",
        measure=_value_reach,
        options=("clip_range_value",),
        low=Side(
            note=1,
            warning=0.3,
            critical=0.03,
            cause="values may move by clip_range_value a rollout, which is next to nothing beside the score",
            action="set clip_range_value to about a fifth of the score's spread, or scale the reward",
            explains=VALUE,
        ),
        source="lm-human-preferences, N+: 0.2 with a spread of 1",
    ),
    Limit(
        name="reward_clip",
        what="clip of the score, in its spreads",
        measure=lambda f: f.option("reward_clip") / f.spread if f.option("reward_clip") and f.spread else None,
        options=("reward_clip",),
        low=Side(
            note=0.5,
            warning=0.1,
            critical=0.01,
            cause="nearly all scores are cut to the same two numbers",
            action="set reward_clip to 1 to 10 spreads, or leave it out",
            explains=(
                "reward_constant",
                "reward_saturated",
                "advantages_vanished",
                "value_dead",
                "reward_scale",
                "kl_coef",
            ),
        ),
        source="OpenRLHF: 10; the demo: 1.2",
    ),
    Limit(
        name="kl_coef",
        what="spread of the (clipped) score over kl_coef",
        measure=lambda f: f.pull if f.option("kl_target") is None else None,
        extra=lambda f, pull: f"the KL at the optimum is half its square, {pull * pull / 2:.2g} nats a response",
        options=("kl_coef", "reward_clip"),
        low=Side(
            note=3,
            warning=0.45,
            critical=0.1,
            cause="the KL penalty outweighs the score: the best policy is the SFT model, give or take a tenth of a nat",
            action="lower kl_coef to a twentieth of the score's spread, or scale the reward",
            explains=("policy_unmoved", "same_as_sft", "reward_falling", "value_useless", "advantages_vanished"),
        ),
        high=Side(
            note=120,
            warning=2000,
            cause="beside the score the KL penalty is nothing: the reward is too large for kl_coef, or kl_coef too small",
            action="raise kl_coef to a twentieth of the score's spread, or scale the reward (reward_weights)",
            explains=LOOSE,
        ),
        source=f"{KL_OPTIMUM}. InstructGPT: 1 / 0.02; N+, Stiennon et al. 2020: 1 / 0.05",
    ),
    Limit(
        name="no_penalty",
        what="kl_coef, with a learned reward and neither kl_target nor max_kl",
        measure=_no_penalty,
        options=("kl_coef",),
        low=Side(
            note=0.005,
            warning=1e-9,
            cause="nothing holds the policy near the responses that the reward model was trained on",
            action="set kl_coef 0.02 to 0.1, or kl_target",
            explains=LOOSE,
        ),
        source="Gao et al. 2022; InstructGPT: 0.02",
    ),
    Limit(
        name="kl_target",
        what="target of the KL, nats a response",
        measure=lambda f: f.option("kl_target"),
        low=Side(
            note=1,
            warning=0.2,
            cause="the target is less than single updates move: the coefficient rises until nothing is learned",
            action="set kl_target 3 to 10",
            explains=("controller_saturated", "policy_unmoved", "same_as_sft", "reward_falling"),
        ),
        high=Side(note=50, cause="a target that holds nothing", action="set kl_target 3 to 10", explains=LOOSE),
        source="Ziegler et al. 2019: 6 to 10",
    ),
    Limit(
        name="kl_horizon",
        what="largest change of the adaptive kl_coef in the run",
        measure=_controller,
        options=("kl_horizon", "total_episodes", "kl_target"),
        percent=True,
        low=Side(
            note=0.3,
            warning=0.001,
            cause="the KL controller is too slow for this run: the coefficient stays where it starts",
            action="set kl_horizon to a tenth of total_episodes or less, or leave out kl_target",
            explains=("controller_saturated", "kl_high"),
        ),
        source="Ziegler et al. 2019, section 2.2: 10,000 of 2,000,000 episodes",
    ),
    Limit(
        name="max_approx_kl",
        what="KL a token that ends a rollout's updates",
        measure=lambda f: f.option("max_approx_kl"),
        low=Side(
            note=0.002,
            warning=1e-5,
            cause="nearly every rollout's updates end after the first",
            action="set max_approx_kl 0.01 to 0.05, or leave it out",
            explains=("policy_unmoved", "same_as_sft", "value_useless"),
        ),
        source="OpenAI's Spinning Up: 0.015",
    ),
    Limit(
        name="whiten_rewards",
        what="spread that token rewards are scaled to, and kl_coef with them",
        measure=lambda f: 1.0 if f.option("whiten_rewards") else None,
        options=("whiten_rewards",),
        high=Side(
            note=0.0,
            cause="score and KL penalty are scaled together by a factor that changes with each rollout, to more than their "
            "size where most tokens earn nothing: clip_range_value has another unit then",
            action="leave whiten_rewards out unless a recipe asks for it",
        ),
        source="lm-human-preferences, N+ (detail 24): off in TRL",
    ),
    Limit(
        name="temperature",
        what="sampling temperature",
        measure=lambda f: f.option("temperature"),
        low=Side(
            note=0.65,
            warning=0.4,
            critical=0.1,
            cause="responses to a prompt are nearly the same, so there is nothing to compare and to learn from",
            action="set temperature 0.7 to 1",
            explains=(
                "entropy_collapse",
                "responses_alike",
                "advantages_vanished",
                "policy_unmoved",
                "reward_saturated",
                "steps_too_large",
                "kl_high",
                "kl_jump",
                "repeated_text",
                "length_down",
                "value_useless",
            ),
        ),
        high=Side(
            note=1.3,
            warning=1.8,
            critical=5,
            cause="responses are drawn from a distribution so flat that most of them are noise",
            action="set temperature 0.7 to 1",
            explains=(
                "cut_off",
                "kl_high",
                "reward_scale",
                "value_useless",
                "length_up",
                "reward_falling",
                "length_rewarded",
            ),
        ),
        source="InstructGPT, lm-human-preferences: 1; N+: 0.7",
    ),
    Limit(
        name="min_response_length",
        what="least length without a penalty, as a share of response_length",
        measure=lambda f: (
            f.option("min_response_length") / f.option("response_length")
            if f.option("short_response_penalty")
            else None
        ),
        options=("min_response_length", "response_length", "short_response_penalty"),
        percent=True,
        high=Side(
            note=0.6,
            warning=0.999,
            cause="every response that ends by itself is penalised for being short",
            action="lower min_response_length",
            explains=("stop_rate_falling", "length_up", "cut_off", "length_rewarded"),
        ),
    ),
    Limit(
        name="short_penalty",
        what="largest penalty for a short response, in spreads of the score",
        measure=_short_penalty,
        options=("short_response_penalty", "min_response_length"),
        high=Side(
            note=5,
            warning=50,
            cause="the penalty for short responses outweighs the score",
            action="lower short_response_penalty",
            explains=("length_rewarded", "length_up", "value_useless"),
        ),
    ),
    Limit(
        name="missing_eos_penalty",
        what="penalty for a missing stop token, in spreads of the score",
        measure=_penalty,
        options=("missing_eos_penalty",),
        low=Side(
            note=-1e-9,
            warning=-0.2,
            cause="responses that do not stop are rewarded for it",
            action="set missing_eos_penalty 1",
            explains=("stop_rate_falling", "length_up", "cut_off", "length_rewarded"),
        ),
        high=Side(
            note=5,
            warning=50,
            cause="the penalty outweighs the score: the policy learns to stop and little else",
            action="set missing_eos_penalty 1",
            explains=("length_down", "length_rewarded", "value_useless"),
        ),
        source="N+ (detail 23), TRL: 1",
    ),
    Limit(
        name="ptx_coef",
        what="weight of the language-modelling loss",
        measure=lambda f: f.option("ptx_coef") or None,
        options=("ptx_coef", "ptx_ratio"),
        high=Side(
            note=100,
            warning=10_000,
            cause="the texts that are mixed in decide nearly all of the gradient",
            action="set ptx_coef up to 27.8",
            explains=("reward_falling", "policy_unmoved", "value_useless"),
        ),
        source="InstructGPT, appendix C.4: 27.8",
    ),
    Limit(
        name="ema_decay",
        what="updates that the moving average remembers, 1 / (1 - decay), as a share of the run",
        measure=_average,
        options=("ema_decay",),
        high=Side(
            note=1,
            warning=20,
            cause="the moving average is the SFT model, give or take the last steps",
            action="lower ema_decay",
            explains=("same_as_sft",),
        ),
        source="InstructGPT, appendix C.4: 0.992",
    ),
)
