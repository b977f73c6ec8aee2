"""The health checks of PPO. Why each threshold is where it is, and where the idea comes from: docs/health.md."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

from rlhf.doctor.health_check import check
from rlhf.doctor.history import History

# ---- PPO: what is computed ------------------------------------------------------------------------------------------


@check(
    "ppo",
    severity="critical",
    cause="the reference is not the model that PPO starts from: the base before SFT, another SFT version, or an adapter that "
    "was merged for one of the two only",
    action="start policy and reference from the same sft/NAME@VERSION",
    needs=("objective/kl_k3",),
)
def wrong_reference(h: History) -> str | None:
    """KL of the first rollout, before any update; 0 if reference and policy are the same model."""
    kl = h.at("objective/kl_k3", 1)
    return f"KL to the reference is {kl:.3g} nats in the first rollout, not 0" if kl is not None and kl > 0.01 else None


@check(
    "ppo",
    severity="critical",
    cause="the chat template was applied twice: the data holds rendered prompts, or a caller renders them again",
    action="store plain messages in the data and let the stage apply the template once",
)
def template_twice(h: History) -> str | None:
    """Words that all prompts begin with, or end in: both are written twice."""
    prompts = [str(row.get("prompt", "")).split() for row in h.samples]
    if len({tuple(words) for words in prompts}) < 2:
        return None
    head, tail = _common(prompts), _common([words[::-1] for words in prompts])[::-1]
    twice = [words for words in (_doubled(head), _doubled(tail[::-1])[::-1]) if words]
    return f"prompts begin with {' '.join(head)!r} and end in {' '.join(tail)!r}" if len(twice) == 2 else None


@check(
    "ppo",
    severity="critical",
    cause="the pad token is also the stop token: masks made from `token != pad` drop the end of every response",
    action="give the tokenizer a pad token of its own, in all three stages",
    needs=(
        "rollout/pad_tokens",
        "response/stop_rate",
    ),
    rows=2,
)
def pad_is_stop(h: History) -> str | None:
    """As many pad tokens among the tokens that count as responses with a stop token, in the first rollouts: later ones may
    hold a pad token by chance."""
    pads, stops = h.first("rollout/pad_tokens", 2), h.first("response/stop_rate", 2)
    if sum(stops) == 0 or any(abs(p - s) > 1e-6 for p, s in zip(pads, stops, strict=True)):
        return None
    return f"each of the {stops[-1]:.0%} stopped responses holds one pad token among the tokens that count"


@check(
    "ppo",
    severity="critical",
    cause="padding counts as text: prompts padded on the wrong side or without a mask, or a mask turned round",
    action="pad prompts on the left, and carry masks along from the lengths",
    needs=("rollout/pad_tokens",),
    rows=2,
)
def padding_counted(h: History) -> str | None:
    """Pad tokens among the tokens of prompts and responses that count."""
    pads = h.values("rollout/pad_tokens", 2)
    if min(pads) < 0.75 or pad_is_stop(h):
        return None
    return f"{pads[-1]:.3g} pad tokens a response among the tokens that count"


@check(
    "ppo",
    severity="critical",
    cause="tokens are not drawn from the distribution that is scored: another temperature, top-k, top-p, a repetition penalty, "
    "or a generation config of the model's own",
    action="sample with the temperature that divides the scored logits, and nothing else",
    needs=("rollout/logprob_gap",),
)
def sampler_mismatch(h: History) -> str | None:
    """Surprise of the sampled tokens against the entropy, and the sampler's log-probabilities in the first rollouts."""
    gap = h.first("rollout/logprob_gap", 2)
    if min(gap) > 0.15:
        return f"sampler and training forward differ by {min(gap):.3g} nats a token from the first rollout on"
    gaps, errors = h.values("rollout/surprise_gap", 8), h.values("rollout/surprise_error", 8)
    if len(gaps) < 3:
        return None
    mean, error = statistics.fmean(gaps), math.sqrt(sum(e * e for e in errors)) / len(errors)
    if abs(mean) < max(0.08, 5 * error):
        return None
    side = "likelier" if mean < 0 else "rarer"
    return f"sampled tokens are {abs(mean):.3g} nats {side} than the policy's entropy says ({abs(mean) / error:.0f} errors)"


@check(
    "ppo",
    severity="critical",
    cause="the sampler's weights are not the policy's: the adapter is merged twice, not at all, or not renewed after updates",
    action="merge the newest adapter once for sampling and undo it exactly; in bf16 try dtype float32",
    needs=("rollout/logprob_gap",),
    rows=3,
)
def sampler_drift(h: History) -> str | None:
    """The gap between sampler and training forward, grown since the first rollout."""
    gaps = h.values("rollout/logprob_gap")
    if gaps[0] > 0.15:
        return None
    now = statistics.fmean(gaps[-2:])
    if now < max(0.1, 4 * gaps[0]):
        return None
    return f"sampler and training forward differ by {now:.3g} nats a token, {gaps[0]:.2g} in the first rollout"


@check(
    "ppo",
    severity="critical",
    cause="old log-probabilities were not made by the forward pass that is trained: stale, of the sampler, or with dropout",
    action="compute them anew for each rollout in the mode, type and batches of the update",
    needs=("ppo/first_ratio_error",),
)
def stale_logprobs(h: History) -> str | None:
    """The first probability ratio of a rollout, which is 1."""
    errors = h.values("ppo/first_ratio_error", 3)
    return f"the first ratio of a rollout is off 1 by {max(errors):.3g}" if max(errors) > 0.1 else None


@check(
    "ppo",
    severity="critical",
    cause="advantages are not centred: the mean was added back, or they were whitened over other tokens than are trained",
    action="subtract the mean over exactly the tokens of the loss",
    needs=("ppo/advantage_mean",),
)
def advantages_not_centred(h: History) -> str | None:
    """The mean of the advantages that the optimiser got."""
    means = h.values("ppo/advantage_mean", 3)
    worst = max(means, key=abs)
    return f"mean advantage {worst:.3g} after whitening, not 0" if abs(worst) > 0.01 else None


# ---- PPO: what is trained -------------------------------------------------------------------------------------------


@check(
    "ppo",
    severity="critical",
    cause="no gradient reaches the policy: frozen adapters, all advantages equal, or a loss that was cut off from it",
    action="see that the policy's adapter has requires_grad, and that objective/score_std is above 0",
    needs=("ppo/grad_norm",),
    rows=2,
)
def gradient_zero(h: History) -> str | None:
    """A gradient norm of 0 once the value warm-up is over."""
    norms = h.values("ppo/grad_norm")[int(h.settings.get("value_warmup_updates") or 0) :][-3:]
    return f"policy gradient norm 0 in {len(norms)} updates in a row" if len(norms) >= 2 and max(norms) == 0 else None


@check(
    "ppo",
    severity="critical",
    cause="the policy that answers is not the one that is trained, or its steps are far too small to matter",
    action="see that the optimiser holds the adapter that sampling uses; then raise learning_rate",
    needs=(
        "objective/kl_k3",
        "ppo/lr",
    ),
    rows=5,
)
def policy_unmoved(h: History) -> str | None:
    """KL still 0 after updates with a gradient and a step size."""
    warmup = int(h.settings.get("value_warmup_updates") or 0)
    kl, lr = h.values("objective/kl_k3"), h.values("ppo/lr")
    if len(kl) < warmup + 5 or max(lr) == 0 or max(kl) > 1e-5 or gradient_zero(h):
        return None
    return f"KL at most {max(kl):.1g} nats in {len(kl)} updates at learning rate {max(lr):.2g}"


@check(
    "ppo",
    severity="critical",
    cause="the policy answers as the SFT model did: it was not trained, not loaded, or not switched on",
    action="see objective/kl_full; at 0 the adapter is not in use, else the evaluation reads the wrong weights",
)
def same_as_sft(h: History) -> str | None:
    """Held-out answers before and after PPO, drawn with the same random numbers."""
    rows = h.comparison
    same = sum(row.get("sft_response") == row.get("ppo_response") for row in rows)
    return (
        f"{same} of {len(rows)} held-out answers are the SFT model's"
        if len(rows) >= 5 and same >= 0.9 * len(rows)
        else None
    )


@check(
    "ppo",
    severity="critical",
    cause="the value model is not trained: its step size or its gradient is 0",
    action="set value_learning_rate and vf_coef above 0, and see that adapter and head of the value have requires_grad",
    needs=("ppo/value_grad_norm",),
    rows=3,
)
def value_untrained(h: History) -> str | None:
    """The value's step size and gradient norm."""
    for name, what in (("ppo/value_lr", "step size"), ("ppo/value_grad_norm", "gradient norm")):
        values = h.values(name, 3)
        if len(values) >= 3 and max(values) == 0:
            return f"{what} of the value model 0 in {len(values)} updates in a row"
    return None


@check(
    "ppo",
    severity="warning",
    cause="the value head is dead: it gives every token the same value",
    action="start it from the reward model, raise value_learning_rate, or set value_warmup_updates",
    needs=(
        "ppo/value_std",
        "ppo/advantage_std",
    ),
    rows=8,
)
def value_dead(h: History) -> str | None:
    """The spread of the values against that of the advantages."""
    values, advantages = h.values("ppo/value_std", 3), h.values("ppo/advantage_std", 3)
    if statistics.fmean(values) > 0.02 * statistics.fmean(advantages):
        return None
    return f"spread of the values {statistics.fmean(values):.2g}, of the advantages {statistics.fmean(advantages):.2g}"


@check(
    "ppo",
    severity="warning",
    cause="the values mislead the policy: they explain less of the returns than a constant would",
    action="raise value_learning_rate or clip_range_value, set value_warmup_updates, or start the value from the reward model",
    needs=("ppo/explained_variance",),
    rows=10,
)
def value_useless(h: History) -> str | None:
    """Explained variance below 0 for long."""
    values = h.values("ppo/explained_variance", 10)
    before, recent, warmup = values[:5], values[5:], int(h.settings.get("value_warmup_updates") or 0)
    if h.count("ppo/explained_variance") < warmup + 10 or max(recent) > -0.02:
        return None
    if statistics.fmean(recent) > 0.5 * statistics.fmean(before):
        return None  # it is on its way up
    return f"explained variance {min(recent):.2g} to {max(recent):.2g} in the last {len(recent)} updates"


# ---- PPO: the reward ------------------------------------------------------------------------------------------------


@check(
    "ppo",
    severity="critical",
    cause="the reward gives every response the same score: a constant function, a head that was not loaded, or a clip that "
    "all scores are beyond",
    action="score a good and a bad answer by hand; look at the reward's report card",
    needs=("objective/score_std",),
    rows=2,
)
def reward_constant(h: History) -> str | None:
    """The spread of the scores in the first rollouts; where it vanishes later, the policy has found what pays."""
    spread = h.first("objective/score_std", 2)
    return f"spread of the scores {max(spread):.2g}" if max(spread) < 1e-6 else None


@check(
    "ppo",
    severity="critical",
    cause="the reward model does not score as it did when it was registered: head or adapter not loaded or merged twice, "
    "another template or tokenizer, or a score read at another token",
    action="run the reward model's report card on its own data again and compare; verify the registry",
    needs=(
        "objective/raw_score",
        "objective/score_std",
    ),
)
def reward_scale(h: History) -> str | None:
    """Mean and spread of the first rollout's scores, in standard deviations of the demonstrations' scores."""
    reward = h.settings.get("reward") or []
    if len(reward) != 1 or not str(reward[0]).startswith("reward/"):
        return None  # only a registered reward model has a zero and a unit
    mean, spread = h.at("objective/raw_score", 1), h.at("objective/score_std", 1)
    if mean is None or spread is None or spread < 1e-6 or (abs(mean) <= 5 and 0.05 <= spread <= 5):
        return None  # equal scores are another check's
    return (
        f"scores of the SFT model's responses are {mean:.3g} +- {spread:.3g}, where 0 +- 1 is what demonstrations get"
    )


@check(
    "ppo",
    severity="critical",
    cause="the reward prefers what the independent judge likes least: its sign is flipped, or its labels were swapped",
    action="look at pairs with their scores; turn the sign or the labels, and train the reward model again",
    needs=("objective/gold_correlation",),
    rows=5,
)
def reward_opposes_judge(h: History) -> str | None:
    """Correlation of reward and judge among the responses of the first rollouts."""
    mean, needed = _judge_correlation(h, 5)
    return f"reward and judge correlate by {mean:.2f} in the first rollouts" if mean < -0.1 - needed else None


@check(
    "ppo",
    severity="warning",
    cause="the reward knows nothing of what the independent judge looks at: shuffled labels, a random head, or another task",
    action="compare the reward model with the judge on its own data: its report card, gold accuracy",
    needs=("objective/gold_correlation",),
    rows=10,
)
def reward_ignores_judge(h: History) -> str | None:
    """The same correlation, over the first ten rollouts."""
    mean, needed = _judge_correlation(h, 10)
    return (
        f"reward and judge correlate by {mean:.2f} in the first rollouts" if abs(mean) < 0.1 and needed < 0.15 else None
    )


@check(
    "ppo",
    severity="critical",
    cause="over-optimisation: the policy has learned what the reward model gets wrong",
    action="stop at the judge's best update; raise kl_coef, set kl_target, or train the reward model on the new responses",
    remedy="kl_coef",
    needs=(
        "objective/gold",
        "objective/raw_score",
        "objective/score_std",
    ),
    rows=12,
)
def over_optimised(h: History) -> str | None:
    """The reward goes on rising while an independent judge falls, or stands still."""
    gold, score = h.values("objective/gold"), h.values("objective/raw_score")
    if len(gold) != len(score):
        return None
    smooth_gold, smooth_score, noise = _smooth(gold), _smooth(score), _noise(gold)
    best = max(range(len(smooth_gold)), key=smooth_gold.__getitem__)
    spread = statistics.fmean(h.first("objective/score_std", 3))
    if smooth_gold[-1] < smooth_gold[best] - 6 * noise and smooth_score[-1] > smooth_score[best]:
        return (
            f"the judge fell from {smooth_gold[best]:.3g} to {smooth_gold[-1]:.3g} while the score rose from "
            f"{smooth_score[best]:.3g} to {smooth_score[-1]:.3g}"
        )
    if len(smooth_gold) <= 10:
        return None
    risen, gained = smooth_score[-1] - smooth_score[-11], smooth_gold[-1] - smooth_gold[-11]
    stalled = risen > max(spread, 6 * _noise(score)) and gained < 0
    return f"the score rose by {risen:.3g} in ten updates, the judge by {gained:.2g}" if stalled else None


@check(
    "ppo",
    severity="warning",
    cause="the reward pays for length itself, and the policy has found out",
    action="look at the length bias on the reward model's report card; balance its data, or set response_length tighter",
    remedy="kl_coef",
    needs=(
        "objective/length_correlation",
        "response/length",
    ),
    rows=6,
)
def length_rewarded(h: History) -> str | None:
    """A strong correlation of reward and length that has risen, or that the length follows."""
    (at_first, mean), (before, now) = (
        h.change("objective/length_correlation"),
        h.change("response/length"),
    )
    followed = now > 1.25 * before if mean > 0 else now < 0.75 * before
    if abs(mean) < 0.6 or not (followed or abs(mean) - abs(at_first) > 0.4):
        return None
    return (
        f"correlation of reward and length {mean:.2f}, {at_first:.2f} at the start; length went from {before:.3g} to "
        f"{now:.3g} tokens"
    )


# ---- PPO: how it is set ---------------------------------------------------------------------------------------------


@check(
    "ppo",
    severity="warning",
    cause="nothing holds the policy near the SFT model: kl_coef is 0",
    action="set kl_coef (0.02 to 0.2), or kl_target",
    remedy="kl_coef",
    needs=(
        "objective/kl_coef",
        "objective/kl_k3",
        "response/length",
    ),
    rows=3,
)
def no_kl_penalty(h: History) -> str | None:
    """A KL coefficient of 0 with a KL that grows."""
    coefficient, length, kl = h.values("objective/kl_coef"), h.values("response/length", 3), _kl(h, 3)
    mean = statistics.fmean(kl)
    if max(coefficient) > 0 or mean < min(5, 0.25 * statistics.fmean(length)):
        return None
    return f"kl_coef is 0 and the KL {mean:.3g} nats a response"


@check(
    "ppo",
    severity="critical",
    cause="steps are too large: the policy changes more in one rollout's updates than the clip can hold",
    action="lower learning_rate or num_ppo_epochs, set warmup_steps or max_approx_kl",
    needs=(
        "ppo/approx_kl",
        "ppo/clipfrac",
        "ppo/ratio_max",
    ),
)
def steps_too_large(h: History) -> str | None:
    """Bursts of the ratio, the clip and the KL of one rollout's updates."""
    approx, clipped, ratios = (h.values(f"ppo/{name}", 3) for name in ("approx_kl", "clipfrac", "ratio_max"))
    burst = approx[-1] > 0.2 or clipped[-1] > 0.5
    lasting = len(approx) >= 3 and (sorted(approx)[1] > 0.08 or sorted(clipped)[1] > 0.35 or sorted(ratios)[1] > 100)
    if not (burst or lasting):
        return None
    worst = f"{max(clipped):.0%} of tokens clipped, largest ratio {max(ratios):.3g}"
    return f"approx_kl {max(approx):.2g} nats a token, {worst}"


@check(
    "ppo",
    severity="critical",
    cause="the policy jumped away from the SFT model in one rollout's updates: the step size is too large, or had no warm-up",
    action="lower learning_rate, set warmup_steps",
    needs=("objective/kl_k3",),
    rows=2,
)
def kl_jump(h: History) -> str | None:
    """KL of a rollout against the rollouts before it."""
    kl = _kl(h, 6)
    before = max(kl[:-1])
    return f"KL went from {before:.3g} to {kl[-1]:.3g} nats in one update" if kl[-1] > 3 + 3 * before else None


@check(
    "ppo",
    severity="warning",
    cause="one batch had a gradient far out of the usual: an outlier among the scores, or ratios that ran away",
    action="set reward_clip; max_grad_norm holds the step, but look at the samples of that update",
    needs=("ppo/grad_norm",),
    rows=8,
)
def gradient_spike(h: History) -> str | None:
    """A gradient norm far above the usual one, and above the limit that it is clipped to."""
    *before, norm = h.values("ppo/grad_norm", 20)
    usual, limit = statistics.median(before), float(h.settings.get("max_grad_norm") or 1.0)
    spike = norm > max(10 * usual, 3 * max(before), limit)
    return f"gradient norm {norm:.3g}, usually {usual:.3g}, {max(before):.3g} at most" if spike else None


@check(
    "ppo",
    severity="warning",
    cause="KL cannot be negative: tokens are not drawn from the policy that is scored, or reference and policy are swapped",
    action="look at rollout/surprise_gap and rollout/logprob_gap; a repetition penalty or a minimum length does this, too",
    needs=(
        "objective/kl",
        "objective/kl_full",
    ),
    rows=5,
)
def negative_kl(h: History) -> str | None:
    """The sampled KL below 0 by more than its noise, or below the exact KL."""
    kl, exact = h.values("objective/kl", 5), h.values("objective/kl_full", 5)
    mean, true = statistics.fmean(kl), statistics.fmean(exact)
    # The log-ratio of a response has about twice its KL as variance.
    error = math.sqrt(2 * max(true, 0.0) / max(_responses(h) * len(kl), 1))
    return (
        f"KL {mean:.3g} nats a response over {len(kl)} updates (exact {true:.3g})"
        if mean < -max(0.05, 4 * error)
        else None
    )


@check(
    "ppo",
    severity="warning",
    cause="the policy is far from the SFT model: what the reward model says of such text was never learned",
    action="raise kl_coef or set kl_target; lower learning_rate if the score no longer rises",
    remedy="kl_coef",
    needs=(
        "objective/kl_k3",
        "response/length",
    ),
    rows=3,
)
def kl_high(h: History) -> str | None:
    """KL a token."""
    kl, length = _kl(h, 3), h.values("response/length", 3)
    total, tokens = statistics.fmean(kl), statistics.fmean(length)
    return f"KL {total:.3g} nats in {tokens:.3g} tokens" if total > max(2.0, 1.0 * tokens) else None


@check(
    "ppo",
    severity="warning",
    cause="the KL controller cannot hold its target: it changes too slowly, or the step size outruns any coefficient",
    action="lower kl_horizon or learning_rate, or start from a higher kl_coef",
    remedy="kl_coef",
    needs=(
        "objective/kl",
        "objective/kl_coef",
    ),
    rows=10,
)
def controller_saturated(h: History) -> str | None:
    """KL beyond twice its target over ten updates, of which one may be low by chance."""
    target = h.settings.get("kl_target")
    kl, coefficient = h.values("objective/kl", 10), h.values("objective/kl_coef", 10)
    if not target or statistics.median(kl) < 2 * float(target) or sorted(kl)[1] < float(target):
        return None
    return (
        f"KL {min(kl):.3g} to {max(kl):.3g} nats for {len(kl)} updates at a target of {float(target):.3g}, "
        f"kl_coef {coefficient[0]:.2g} to {coefficient[-1]:.2g}"
    )


# ---- PPO: what comes out --------------------------------------------------------------------------------------------


@check(
    "ppo",
    severity="warning",
    cause="most responses are cut off at response_length and scored unfinished: the SFT model never learned to stop (a stop "
    "token masked out of its loss), or the limit is too low",
    action="raise response_length; look whether SFT answers end in the stop token; set missing_eos_penalty",
    needs=("response/stop_rate",),
    rows=3,
)
def cut_off(h: History) -> str | None:
    """The share of responses that end by themselves in the first rollouts."""
    rates = h.first("response/stop_rate", 3)
    mean = statistics.fmean(rates)
    return f"{mean:.0%} of the first rollouts' responses end in a stop token" if mean < 0.35 else None


@check(
    "ppo",
    severity="critical",
    cause="the policy unlearns to stop: the reward likes unfinished or long texts",
    action="raise missing_eos_penalty or kl_coef; lower learning_rate",
    remedy="kl_coef",
    needs=("response/stop_rate",),
    rows=6,
)
def stop_rate_falling(h: History) -> str | None:
    """The share of responses with a stop token, against the start."""
    change = h.change("response/stop_rate")
    if change[1] > change[0] - 0.3:
        return None
    return f"share of responses with a stop token fell from {change[0]:.0%} to {change[1]:.0%}"


@check(
    "ppo",
    severity="critical",
    cause="entropy collapse: the policy has one answer left, and nothing to explore",
    action="raise kl_coef, lower learning_rate; check that the reward tells good answers apart",
    remedy="kl_coef",
    needs=("objective/entropy",),
    rows=6,
)
def entropy_collapse(h: History) -> str | None:
    """Entropy against the start."""
    change = h.change("objective/entropy")
    if change[1] > 0.2 * change[0]:
        return None
    return f"entropy fell from {change[0]:.3g} to {change[1]:.3g} nats a token"


@check(
    "ppo",
    severity="warning",
    cause="all responses grow alike: the policy repeats the few texts that the reward model likes best (over-optimisation)",
    action="raise kl_coef or set kl_target, stop earlier",
    remedy="kl_coef",
    needs=("response/distinct_2",),
    rows=6,
)
def responses_alike(h: History) -> str | None:
    """Distinct word pairs of a rollout, against the start."""
    change = h.change("response/distinct_2")
    if change[1] > 0.6 * change[0]:
        return None
    return f"distinct word pairs fell from {change[0]:.0%} to {change[1]:.0%}"


@check(
    "ppo",
    severity="warning",
    cause="responses repeat themselves: the reward model pays for words, however often they come",
    action="raise kl_coef; show the reward model repeated texts as bad ones",
    remedy="kl_coef",
    needs=("response/repetition",),
    rows=6,
)
def repeated_text(h: History) -> str | None:
    """Word triples that a response has used before, against the start."""
    change = h.change("response/repetition")
    if change[1] < change[0] + 0.15:
        return None
    return f"{change[1]:.0%} of word triples are repetitions, {change[0]:.0%} at the start"


@check(
    "ppo",
    severity="warning",
    cause="responses grow longer and longer: the reward likes length, or stopping became rare",
    action="look at objective/length_correlation; balance the reward model by length, raise kl_coef",
    remedy="kl_coef",
    needs=("response/length",),
    rows=6,
)
def length_up(h: History) -> str | None:
    """Response length against the start."""
    change = h.change("response/length")
    if change[1] < 2 * change[0] or change[1] < change[0] + 4:
        return None
    return f"length rose from {change[0]:.3g} to {change[1]:.3g} tokens"


@check(
    "ppo",
    severity="warning",
    cause="responses shrink: fewer tokens cost less KL, or the reward likes short answers",
    action="set min_response_length and short_response_penalty; lower kl_coef if it is what they save",
    remedy="learning_rate",
    needs=("response/length",),
    rows=6,
)
def length_down(h: History) -> str | None:
    """Response length against the start."""
    change = h.change("response/length")
    if change[1] > 0.4 * change[0]:
        return None
    return f"length fell from {change[0]:.3g} to {change[1]:.3g} tokens"


@check(
    "ppo",
    severity="warning",
    cause="the reward is saturated: nearly all responses get the same score, and the rest is noise",
    action="stop here, or make the reward finer; more updates only move the policy away",
    remedy="kl_coef",
    needs=("objective/score_std",),
    rows=6,
)
def reward_saturated(h: History) -> str | None:
    """Spread of the scores against the start."""
    change = h.change("objective/score_std")
    if change[1] > 0.15 * change[0] or reward_constant(h):
        return None
    return f"spread of the scores fell from {change[0]:.3g} to {change[1]:.3g}"


@check(
    "ppo",
    severity="warning",
    cause="advantages are all but equal, and whitening blows what is left up to full size: noise is trained on",
    action="look at objective/score_std; stop, or sample wider (more prompts, higher temperature)",
    needs=("ppo/advantage_std",),
    rows=6,
)
def advantages_vanished(h: History) -> str | None:
    """Spread of the advantages before whitening, against the start."""
    change = h.change("ppo/advantage_std")
    if change[1] > 0.1 * change[0]:
        return None
    return f"spread of the advantages fell from {change[0]:.3g} to {change[1]:.3g}"


@check(
    "ppo",
    severity="warning",
    cause="PPO lowers its own reward: steps too large, values that mislead, or an advantage with the wrong sign",
    action="lower learning_rate; look at ppo/explained_variance and ppo/approx_kl",
    needs=(
        "objective/score",
        "objective/score_std",
    ),
    rows=10,
)
def reward_falling(h: History) -> str | None:
    """The score against the start, in spreads of the first rollouts."""
    change = h.change("objective/score", start=3, recent=5)
    spread = statistics.fmean(h.first("objective/score_std", 3))
    if change[1] > change[0] - max(0.6 * spread, 1e-6):
        return None
    return f"the score fell from {change[0]:.3g} to {change[1]:.3g}, spread {spread:.2g}"


@check(
    "ppo",
    severity="warning",
    cause="the machine has become slower: another process, swapping, a throttled GPU, or a leak",
    action="look at the machine's load and memory; the run itself may be fine",
    needs=(
        "time/rollout",
        "time/score",
        "time/optimise",
        "response/length",
    ),
    rows=18,
)
def slowing_down(h: History) -> str | None:
    """Seconds a token of whole updates, against the first ones."""
    parts = [h.values(f"time/{name}") for name in ("rollout", "score", "optimise")]
    lengths = h.values("response/length")
    if len({len(lengths), *map(len, parts)}) > 1:
        return None
    seconds = [sum(times) / length for *times, length in zip(*parts, lengths, strict=True)]
    first, now = statistics.median(seconds[1:9]), statistics.median(seconds[-8:])
    return f"an update takes {now / first:.1f} times as long a token as at the start" if now > 3 * first else None


# ---- small things ---------------------------------------------------------------------------------------------------


def _kl(h: History, last: int) -> list[float]:
    """The exact KL, nats a response; of older logs, the estimate with the least noise."""
    return h.values("objective/kl_full", last) or h.values("objective/kl_k3", last)


def _responses(h: History) -> float:
    """Responses of a rollout."""
    episodes, steps = h.values("episodes", 1), max(h.step, 1)
    return episodes[-1] / steps if episodes else float(h.settings.get("rollout_batch_size") or 1)


def _judge_correlation(h: History, rollouts: int) -> tuple[float, float]:
    """Mean correlation of reward and judge in the first rollouts, and three standard errors of it."""
    values = h.first("objective/gold_correlation", rollouts)
    return statistics.fmean(values), 3 / math.sqrt(max(_responses(h) * rollouts, 1))


def _smooth(values: Sequence[float], width: int = 5) -> list[float]:
    """Running means."""
    return [statistics.fmean(values[i : i + width]) for i in range(len(values) - width + 1)]


def _noise(values: Sequence[float], width: int = 5) -> float:
    """Standard error of a running mean, from the differences of neighbours, which a trend hardly touches."""
    differences = [b - a for a, b in itertools.pairwise(values)]
    return statistics.pstdev(differences) / math.sqrt(2 * width)


def _common(rows: Sequence[Sequence[str]]) -> list[str]:
    """The words that all rows begin with."""
    shared: list[str] = []
    for words in zip(*rows, strict=False):
        if len(set(words)) > 1:
            break
        shared.append(words[0])
    return shared


def _doubled(words: Sequence[str]) -> list[str]:
    """What the words begin with twice in a row, if anything."""
    half = next((k for k in range(len(words) // 2, 0, -1) if words[:k] == words[k : 2 * k]), 0)
    return list(words[:half])
