"""The table of metrics, from which all views of a run are made.

These are the terminal view, the run's page, the page that compares runs, the W&B workspace, and the tables in `docs/ppo.md`
(`python tests/test_docs.py` writes them). A new metric is one entry here, and the code that logs it under its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal, NamedTuple, TypedDict

from rlhf.base.json_files import finite_number

Stage = Literal["pretrain", "sft", "reward", "ppo"]

Place = Literal["terminal", "report", "comparison", "outcome", "health"]
"""Terminal view, run's page, page of several runs, and the first and the health section of the W&B workspace."""

UPDATES, EPISODES = "updates", "episodes"
"""The two axes that mean the same in every run of a stage, whatever its batch sizes and logging steps."""

_SUPERVISED: dict[str, Stage] = {"pretrain": "pretrain", "sft": "sft", "reward": "reward", "card": "reward"}
"""Families of metrics outside PPO, each with its stage."""


class LogRow(TypedDict, total=False):
    """A line of `metrics.jsonl`; its other keys are the figures by name."""

    step: int


class Sign(NamedTuple):
    """A line of the comparison's health table: one number for a metric's course over a run."""

    label: str
    summary: Callable[[Sequence[float]], float]
    note: str


@dataclass(frozen=True)
class Metric:
    """An entry of the table."""

    name: str
    """Name in `metrics.jsonl` and W&B: family/figure."""
    label: str
    """Short name in lists and legends, where the stage is known."""
    meaning: str
    """Definition and healthy values, for the docs."""
    trouble: str = "-"
    """Bad values and their remedy, for the docs."""
    unit: str = ""
    shown: tuple[Place, ...] = ()
    """Places besides the docs, and besides the section of its stage in the workspace, which has all metrics."""
    title: str = ""
    """Title of its own plot."""
    chart: str = ""
    """Title of the plot in the run's page, where metrics share one; default: its own."""
    note: str = ""
    """What to look for in the plot."""
    fallback: str = ""
    """Metric that takes its place in the comparison for a run that has not logged it."""
    signs: tuple[Sign, ...] = ()

    @property
    def family(self) -> str:
        """The part of the name before the slash."""
        return self.name.partition("/")[0]

    @property
    def stage(self) -> Stage:
        """The stage that logs it."""
        return _SUPERVISED.get(self.family, "ppo")


_last: Callable[[Sequence[float]], float] = itemgetter(-1)

# Pages keep this order. KL is summed over a response and averaged over responses, in nats.
# fmt: off
_TABLE = (
    Metric("pretrain/loss", "loss", "cross-entropy of the training blocks; falls fast, then slowly",
           "rises: lower `learning_rate`", "nats a token", ("report",), chart="Pretraining loss"),
    Metric("pretrain/eval_loss", "held-out loss", "cross-entropy of the held-out text; depends on the tokenizer",
           "turns up: the text was read too often; stop earlier", "nats a token", ("report",), chart="Pretraining loss",
           note="Held out should fall with training, fast and then slowly. If it turns up, the text was read too often."),
    Metric("pretrain/eval_bits_per_character", "held-out bits per character",
           "held-out nats over ln 2 and the number of characters; compares models with different tokenizers",
           "near 8: plain bytes cost as much", shown=("report",), title="Pretraining, bits per character",
           note="What a held-out character costs, whatever the tokenizer. Plain bytes cost 8 bits."),

    Metric("objective/score", "score",
           "mean score, clip and penalties included, in standard deviations of the demonstrations; rises, then levels off",
           "flat: look at `objective/score_std` and `ppo/grad_norm`, then raise `learning_rate` or lower `kl_coef`. Rising "
           "while an independent judge falls: over-optimised (Gao et al. 2022), raise `kl_coef` or stop earlier",
           shown=("terminal", "report", "comparison", "outcome"), title="Reward score", note="Should rise, then flatten."),
    Metric("objective/rlhf_reward", "score less KL cost", "score - kl_coef * KL, which PPO maximises; rises",
           "falls while the score rises: KL costs more than it earns; lower `learning_rate` or `num_ppo_epochs`",
           shown=("terminal", "report", "comparison", "outcome"), title="Score less KL cost", chart="Reward score",
           note="What PPO maximises."),
    Metric("objective/kl", "KL",
           "the penalised KL: log pi - log pi_ref on sampled tokens (k1), nats a response; exactly 0 in the first rollout, then "
           "grows; single rollouts may be noisy. lm-hp steered to 6",
           "not 0 at first: reference and start differ. Negative for long: its mean cannot be below 0 if tokens are drawn from "
           "the policy that is scored; look at `rollout/logprob_gap`. Growing without a gain in score: raise `kl_coef` or set "
           "`kl_target`", "nats a response", ("terminal", "report", "outcome"), chart="KL from the SFT model",
           note="Should grow slowly. A jump means the policy is leaving the language it knew.",
           signs=(Sign("Largest KL", max, "Far from the SFT model, the reward model is out of its depth."),
                  Sign("Lowest KL", min, "Clearly below 0: the reference is not the model that PPO started from."))),
    Metric("objective/kl_k3", "KL, k3 estimate",
           "KL by the low-variance estimator k3, nats a response; never negative, little noise while policies are near",
           "far above `objective/kl_full` in single rollouts: a few tokens that the reference likes much better than the policy",
           "nats a response", ("report",), chart="KL from the SFT model"),
    Metric("objective/kl_full", "exact KL",
           "KL over the whole vocabulary at each sampled prefix, nats a response; has the least noise: read this one",
           "`objective/kl` on one side of it for long: tokens are not drawn from the policy; see `rollout/logprob_gap`",
           "nats a response", ("comparison", "health"), title="KL from the SFT model", fallback="objective/kl",
           note="Should grow slowly. A jump means the policy is leaving the language it knew."),
    Metric("objective/kl_coef", "KL coefficient", "coefficient used in this rollout",
           "with `kl_target`, still rising at the end: the KL has not come down to its target; lower `learning_rate`. Near 0: "
           "the target is too generous to bind"),
    Metric("objective/entropy", "entropy", "nats a token at `temperature`; log(vocabulary) at most; usually falls slowly",
           "towards 0: nearly one answer a prompt, nothing left to explore; raise `kl_coef`, lower `learning_rate`. Rising far "
           "above its start: steps too large, text falls apart",
           "nats a token", ("terminal", "report", "comparison", "health"), title="Entropy",
           note="How undecided the policy is. Near 0 it has one answer left.",
           signs=(Sign("Lowest entropy", min, "Near 0 the policy has collapsed."),)),
    Metric("objective/raw_score", "raw score", "mean score before clip and penalties",
           "falls while `objective/score` rises: only penalties are learnt; lower `missing_eos_penalty` or "
           "`short_response_penalty`"),
    Metric("objective/score_std", "spread of scores", "spread of the raw scores in the rollout",
           "near 0: all answers score the same, and whitening blows the rest up to full size. Stop, or sample wider: more "
           "prompts, higher `temperature`", shown=("health",),
           signs=(Sign("Spread of scores, last", _last, "Near 0 there is nothing to learn from."),)),
    Metric("objective/length_correlation", "score and length", "Pearson correlation of raw scores and lengths of the rollout",
           "beyond 0.6 while the length follows: the reward pays for length; see the reward model's report card"),
    Metric("objective/gold", "judge", "mean score of the independent judge `gold`, in its own units; rises",
           "falls while `objective/score` rises: over-optimised; raise `kl_coef` or stop earlier", shown=("report", "outcome"),
           chart="Independent judge"),
    Metric("objective/gold_correlation", "judge and score", "Pearson correlation of the judge's scores and the raw ones",
           "near 0 or below: the reward does not measure what the judge does; see `docs/health.md`"),

    Metric("eval/score", "held-out score",
           "mean raw score of answers to the first `num_eval_prompts` held-out prompts, the same ones and the same random "
           "numbers each time; at update 0 that of the SFT policy. Rises",
           "falls while `objective/raw_score` rises: the training prompts are learned by heart; use more of them",
           shown=("terminal", "report", "comparison", "outcome"), title="Held-out score", chart="Reward score",
           note="Raw score on held-out prompts; it should follow the training score."),
    Metric("eval/gold", "judge, held-out", "mean score of the independent judge on these answers; rises",
           "at its best and falling: stop here, or raise `kl_coef`", shown=("terminal", "report", "comparison", "outcome"),
           title="Independent judge, held-out", chart="Independent judge",
           note="A judge that nothing is trained on. It should rise with the score; if it turns down, the reward is gamed."),
    Metric("eval/kl", "held-out KL", "log pi - log pi_ref on the tokens of these answers (k1); 0 at update 0",
           "far above `objective/kl`: the policy moves most on prompts that it has not seen", "nats a response",
           ("report", "outcome"), chart="KL from the SFT model"),
    Metric("eval/length", "held-out length", "mean length of these answers", "as `response/length`", "tokens", ("report",),
           chart="Response length"),
    Metric("eval/stop_rate", "held-out stop rate", "share of these answers that end by themselves", "as `response/stop_rate`"),
    Metric("eval/distinct_2", "held-out word pairs", "distinct word pairs over all of these answers",
           "as `response/distinct_2`"),

    Metric("response/length", "response length", "tokens, stop token included",
           "growing with the score: reward models like length (Singhal et al. 2023), compare at equal length. Shrinking: fewer "
           "tokens cost less KL, and the reward model may like short answers; `short_response_penalty`",
           "tokens", ("terminal", "report", "comparison", "outcome"), title="Response length",
           note="A steady climb or fall can be a trick played on the reward model."),
    Metric("response/stop_rate", "stop rate", "share of responses that end by themselves; near 1",
           "falls: answers are cut off; raise `response_length` or `missing_eos_penalty`",
           shown=("terminal", "comparison", "health"), title="Stop rate", note="Share of responses that end by themselves.",
           signs=(Sign("Stop rate, last", _last, "Answers that are cut off."),)),
    Metric("response/distinct_2", "distinct word pairs",
           "distinct word pairs over all; compare only rollouts of one size, and mind that shorter texts repeat less",
           "falls steadily: answers become similar; raise `kl_coef`, stop earlier",
           shown=("terminal", "comparison", "health"), title="Distinct word pairs", note="Falls when answers become similar.",
           signs=(Sign("Distinct word pairs, last", _last, "Answers that become similar."),)),
    Metric("response/repetition", "repeated word triples",
           "share of a response's word triples that it has used before, mean over responses; near 0",
           "rises: the reward pays for words however often they come; raise `kl_coef`"),

    Metric("ppo/policy_loss", "policy loss",
           "0 up to rounding with one step a rollout, as whitened advantages have mean 0; else near 0",
           "is no measure of progress. Large: ratios ran away, see `ppo/ratio_max`", shown=("report",), chart="PPO losses",
           note="The policy loss hovers near 0. The value loss should fall."),
    Metric("ppo/value_loss", "value loss",
           "half the squared error, without `vf_coef`, in squared units of the score; falls, then follows the returns",
           "grows for long: values lose the returns; raise `value_learning_rate`, set `value_warmup_updates`, or hold the "
           "returns with `reward_clip`", shown=("report", "comparison"), title="Value loss", chart="PPO losses",
           note="Should fall."),
    Metric("ppo/clipfrac", "clipped tokens",
           "share of tokens whose policy gradient the clip removes; 0 with one step a rollout",
           "high: later steps are mostly void; lower `learning_rate` or `num_ppo_epochs`. 0 with many steps: step size too "
           "small", "share", ("terminal", "comparison", "health"), title="Clipped tokens", note="High: steps are too large.",
           signs=(Sign("Clipped tokens, most", max, "Steps that are too large."),)),
    Metric("ppo/value_clipfrac", "clipped values", "share of tokens whose value gradient the clip removes",
           "high for long: values cannot follow the returns; raise `clip_range_value`", "share"),
    Metric("ppo/approx_kl", "KL of an update", "k3 of rollout policy and current one, nats a token; 0 with one step a rollout",
           "well above 0.01 to 0.05 (`target_kl` of OpenAI's Spinning Up): lower `learning_rate` or `num_ppo_epochs`, or set "
           "`max_approx_kl`", "nats a token"),
    Metric("ppo/ratio_mean", "mean ratio", "mean ratio new/old; its expectation is 1 as tokens come from the old policy",
           "far from 1: single ratios dominate; see `ppo/ratio_max`"),
    Metric("ppo/ratio_max", "largest ratio", "largest ratio, not clamped",
           "large: for A < 0 the clip does not bound the loss -A ratio, one token can fill the gradient. Lower "
           "`learning_rate`; or `dtype` float32", shown=("health",),
           signs=(Sign("Largest ratio", max, "One token that moved too far."),)),
    Metric("ppo/first_ratio_error", "error of the first ratio",
           "largest distance of the ratio from 1 before the first step; 0 up to rounding",
           "the run stops by itself above 1e-9, 1e-3, 0.1 in float64, float32, bf16: old log-probabilities are stale, a bug "
           "and no setting", shown=("health",),
           signs=(Sign("First ratio off 1 by", max, "Stale log-probabilities, if more than rounding."),)),
    Metric("ppo/explained_variance", "explained variance",
           "1 - Var(A before whitening) / Var(R). For `lam` < 1 R contains V itself, so a high figure is easier than it looks; "
           "it should rise",
           "below 0 for long: worse than a constant; raise `value_learning_rate` or `value_warmup_updates`, check "
           "`ppo/value_clipfrac`", shown=("terminal", "report", "comparison", "health"), title="Explained variance",
           note="How well the value head foresees the reward. 1 is perfect; 0 or less is no use.",
           signs=(Sign("Explained variance, last", _last, "Below 0 the value model misleads."),)),
    Metric("ppo/value_std", "spread of values", "spread of the values over tokens, units of the score",
           "near 0: a dead head, no baseline; raise `value_learning_rate`"),
    Metric("ppo/advantage_std", "spread of advantages",
           "spread before whitening, units of the score; falls as values learn",
           "far below its start with a flat score: noise is whitened to full size and trained on"),
    Metric("ppo/advantage_mean", "mean advantage", "after whitening; 0 up to rounding",
           "anything else is a bug: all tokens are pushed up, or down"),
    Metric("ppo/grad_norm", "policy's gradient",
           "norm of the policy's gradient before clipping, largest of the update; 0 in the value warm-up",
           "always above `max_grad_norm`: all steps are cut. Single peaks: see `ppo/ratio_max`. 0: nothing trains"),
    Metric("ppo/value_grad_norm", "value's gradient", "norm of the value model's gradient, `vf_coef` included",
           "as above; peaks follow jumps of the returns: `reward_clip`"),
    Metric("ppo/lr", "policy's step size", "step size of the policy after the update, so for the next one",
           "not the intended course: `lr_scheduler_type`, `warmup_steps`"),
    Metric("ppo/value_lr", "value's step size", "step size of the value model after the update", "0: set `value_learning_rate`"),
    Metric("ppo/ptx_loss", "PPO-ptx loss",
           "PPO-ptx: nats a token of the mixed-in texts; stays near where SFT left it. 0 without `ptx_coef`",
           "rises: PPO costs what SFT had taught; raise `ptx_coef`", "nats a token"),
    Metric("ppo/early_stop", "early stop", "1 if steps were left out at `max_approx_kl`",
           "often 1: planned steps are rarely made; lower `learning_rate` or `num_ppo_epochs`"),
    Metric("ppo/roll_backs", "roll-backs", "times the run has gone back, at `max_kl` or on the doctor's order",
           "above 0: the step size is too large for this `kl_coef`; the run gives up at the fourth time"),

    Metric("rollout/tokens_per_second", "sampling speed", "sampled tokens a second",
           "falls with growing length; a sudden drop is the machine", "tokens a second"),
    Metric("rollout/logprob_gap", "sampler's error",
           "mean distance of sampler and training forward, nats a token; rounding only",
           "near the KL a token, or growing: tokens are drawn from another policy than the one scored. bf16 rounds what the "
           "adapter adds to each weight: try `merge_adapter` false or `dtype` float32", "nats a token", ("health",),
           signs=(Sign("Sampler off by", max, "Sampler and training forward disagree."),)),
    Metric("rollout/surprise_gap", "surprise less entropy",
           "mean of -log pi - entropy of the sampled tokens, nats a token; 0 within a few `rollout/surprise_error` if tokens "
           "come from the policy that is scored", "below 0: drawn too cold, top-k or top-p; above 0: too hot", "nats a token"),
    Metric("rollout/surprise_error", "its standard error", "standard error of `rollout/surprise_gap`, nats a token",
           unit="nats a token"),
    Metric("rollout/pad_tokens", "padding that counts", "pad tokens among the tokens that count, a response; 0",
           "equal to `response/stop_rate`: pad is the stop token. Else: padding is read as text", "tokens a response"),

    Metric("time/rollout", "sampling", "seconds of sampling",
           "as many steps as the longest response has tokens: `response_length`", "seconds"),
    Metric("time/score", "scoring", "seconds of the passes without gradient",
           "raise `microbatch_size` if memory allows", "seconds"),
    Metric("time/optimise", "optimising", "seconds of the optimiser steps; grows with `num_ppo_epochs`",
           "raise `microbatch_size`", "seconds"),

    Metric("sft/loss", "loss", "cross-entropy of the answers' tokens; falls", "flat or rising: see `docs/health.md`",
           "nats a token", ("terminal", "report", "comparison"), title="SFT loss, training", chart="SFT loss"),
    Metric("sft/eval_loss", "held-out loss", "cross-entropy of the held-out answers; falls, then levels off",
           "turns up: overfitting; train for fewer epochs", "nats a token", ("terminal", "report", "comparison"),
           title="SFT loss, held out", chart="SFT loss",
           note="Held out should fall with training. If it turns up, that is overfitting."),
    Metric("sft/token_accuracy", "token accuracy", "share of tokens that are the most likely one; rises", shown=("terminal",)),
    Metric("sft/grad_norm", "gradient", "norm of the gradient before clipping",
           "always above `max_grad_norm`: all steps are cut"),
    Metric("sft/lr", "step size", "step size of the optimiser"),

    Metric("reward/loss", "loss", "negative log-likelihood of people's preferences; ln 2 at first, falls",
           "stays at ln 2: it ranks no better than a coin", shown=("terminal", "comparison"),
           title="Reward model's loss, training"),
    Metric("reward/eval_loss", "held-out loss", "the loss on held-out pairs",
           "turns up: overfitting; train for fewer epochs"),
    Metric("reward/accuracy", "accuracy", "share of pairs whose preferred answer has the higher score; rises from 0.5",
           "far above the held-out one: the pairs are learned by heart", shown=("terminal", "report"),
           chart="Reward model's accuracy"),
    Metric("reward/eval_accuracy", "held-out accuracy", "accuracy on held-out pairs; its ceiling is how often people agree",
           "at 0.5: a coin; below: labels are swapped", shown=("terminal", "report", "comparison"),
           title="Reward model's accuracy", fallback="reward/accuracy",
           note="Share of pairs in which the preferred answer gets the higher score. 0.5 is a coin."),
    Metric("reward/margin", "margin", "mean difference of the two scores of a pair; rises", shown=("terminal",)),
    Metric("card/accuracy", "accuracy", "accuracy on held-out pairs, from the report card (`docs/reward.md`)"),
    Metric("card/accuracy_held_out_raters", "accuracy, new raters", "accuracy by the judgement of raters it never saw",
           "far below `card/accuracy`: it has learned the raters"),
    Metric("card/human_ceiling", "human ceiling", "accuracy of one person's ratings as a judge of another's"),
)
# fmt: on

METRICS = {metric.name: metric for metric in _TABLE}


def shown(place: Place) -> list[Metric]:
    """Return the metrics of one place."""
    return [metric for metric in METRICS.values() if place in metric.shown]


def of_stage(stage: Stage) -> list[Metric]:
    """Return the metrics that one stage logs."""
    return [metric for metric in METRICS.values() if metric.stage == stage]


def axes() -> dict[str, str]:
    """Return the axis over which W&B draws each family of metrics, e.g. `{"sft/*": "updates"}`; panels can choose the other."""
    families = dict.fromkeys(metric.family for metric in METRICS.values())
    families |= dict.fromkeys(["histogram"])
    return {f"{family}/*": UPDATES if family in _SUPERVISED else EPISODES for family in families}


def reward_kl_points(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Return the points (`step`, `sqrt_kl`, `score`) of a PPO run's log lines; KL in nats a response, exact where logged.

    An estimate of a KL near 0 can come out below it: those points have no root and are left out.
    """
    points = []
    for row in rows:
        kl = finite_number(row.get("objective/kl_full", row.get("objective/kl")))
        score = finite_number(row.get("objective/score"))
        if kl is not None and score is not None and kl >= 0:
            points.append({"step": float(row.get("step") or 0), "sqrt_kl": math.sqrt(kl), "score": score})
    return points
