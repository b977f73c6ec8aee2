"""Experiments with the policy of a PPO run: best-of-n, over-optimisation, endings, held-out prompts, the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from rlhf.base.errors import UserError
from rlhf.base.intervals import Array
from rlhf.data_prep.load import load_rows
from rlhf.doctor.statements import Statement
from rlhf.evaluation.frontier import best_of_n, best_of_n_kl
from rlhf.models.base import context_length
from rlhf.models.sequences import Sequences, pad
from rlhf.models.tokenization import encode_prompt, encode_response
from rlhf.ppo import forward
from rlhf.ppo.rollout import respond
from rlhf.stages.investigate.experiment import confirmed, correlation, experiment, mean, ruled_out, undecided
from rlhf.stages.investigate.subject import SAMPLES, Answered, PPOSubject

#: Share of answers that end by themselves, from which there is nothing to find out.
ENDING = 0.6
#: Probability of the stop token at the end of demonstrations, from which a model has learned to stop.
STOPS = 0.3
#: Demonstrations whose stop token is looked at, and answers that get twice the room.
DEMONSTRATIONS, LONGER = 32, 32


@experiment("ppo", settles=("wrong_reference", "kl_jump", "negative_kl"))
def reference(subject: PPOSubject) -> Iterator[Statement]:
    """Is the policy the reference before the first update?"""
    gap = subject.start_gap
    measured = f"before the first update, log-probabilities of policy and reference differ by {gap:.2g} nats at most"
    if gap <= 1e-2:
        yield ruled_out("reference", f"{measured}: they are one model")
    else:
        yield confirmed(
            "reference", measured, cause="the reference is not the model that PPO starts from",
            action="start policy and reference from the same sft/NAME@VERSION",
            explains=("wrong_reference", "kl_high", "kl_jump", "negative_kl"),
        )  # fmt: skip


@experiment("ppo", needs=("sft", "tuned"), settles=(
    "over_optimised", "reward_falling", "kl_high", "responses_alike", "repeated_text", "entropy_collapse", "policy_unmoved",
    "same_as_sft", "reward_saturated", "length_up", "reward_ignores_judge",
))  # fmt: skip
def best_of(subject: PPOSubject) -> Iterator[Statement]:
    """Is more score to be had near the SFT model, and is the judge's opinion bought or lost on the way?"""
    sft, tuned = subject.sft, subject.tuned
    groups, unit = sft.groups[::SAMPLES], float(sft.scores.std()) or 1.0
    gained = mean((tuned.scores - sft.scores) / unit, sft.groups)
    chosen = mean((_best(sft.scores, sft.scores) - _rows(sft.scores).mean(axis=1)) / unit, groups)
    at = f"best of {SAMPLES} (KL {best_of_n_kl(SAMPLES):.2f})"
    measured = (
        f"the policy (KL {tuned.kl:.2f}) scores {gained} standard deviations more than the SFT model, {at} {chosen}"
    )
    if gained.low > 0:
        yield ruled_out("score_gained", f"{measured}: training raises the score")
    elif tuned.kl < best_of_n_kl(SAMPLES) or gained.high > chosen.value / 2:
        yield undecided("score_gained", measured)
    else:
        yield confirmed(
            "score_gained", measured, severity="warning",
            cause="the policy has moved, and not to the better answers that the SFT model itself gives now and then: the updates "
            "are at fault, not the reward",
            action="look at the experiments with single updates; then at learning_rate and kl_coef",
            explains=("reward_falling", "policy_unmoved", "same_as_sft"),
        )  # fmt: skip
    if sft.gold is not None and tuned.gold is not None:
        yield _over_optimised(sft, sft.gold, tuned, tuned.gold, gained.low > 0)


def _over_optimised(sft: Answered, before: Array, tuned: Answered, after: Array, score_rose: bool) -> Statement:
    unit, groups = float(before.std()) or 1.0, sft.groups[::SAMPLES]
    judged = mean((after - before) / unit, sft.groups)
    chosen = mean((_best(sft.scores, before) - _rows(before).mean(axis=1)) / unit, groups)
    near, far = correlation(sft.scores, before, sft.groups), correlation(tuned.scores, after, tuned.groups)
    measured = (
        f"by the judge, the policy is {judged} standard deviations better than the SFT model, best of {SAMPLES} by the reward "
        f"{chosen}; reward and judge correlate by {near} on the SFT model's answers, by {far} on the policy's"
    )
    if judged.low > 0:
        return ruled_out("over_optimisation", f"{measured}: the reward still leads where the judge would go")
    if not (score_rose and judged.high < 0):
        return undecided("over_optimisation", measured)
    wrong_from_the_start = chosen.high < 0
    cause = (
        "the reward is wrong already among the SFT model's own answers, and training follows it"
        if wrong_from_the_start
        else "the score rose and the judge's opinion fell: the policy has learned what the reward gets wrong (over-optimisation)"
    )
    return confirmed(
        "over_optimisation", measured, cause=cause,
        action="mend the reward: its data, or its code" if wrong_from_the_start
        else "stop earlier or raise kl_coef; train the reward model on answers of this policy",
        explains=("over_optimised", "kl_high", "responses_alike", "repeated_text", "entropy_collapse", "reward_saturated",
                  "length_up", "length_rewarded", "reward_ignores_judge", "stop_rate_falling", "no_kl_penalty",
                  "reward_judge", "endings"),
    )  # fmt: skip


def _rows(values: Array) -> Array:
    """Return scores (M / S, S) of answers (M,), S of one prompt together."""
    return values.reshape(-1, SAMPLES)


def _best(proxy: Array, values: Array) -> Array:
    return best_of_n(_rows(proxy), _rows(values), SAMPLES)


@experiment(
    "ppo", needs=("sft", "tuned"), passes=0.3, settles=("cut_off", "stop_rate_falling", "length_up", "length_rewarded")
)
def endings(subject: PPOSubject) -> Iterator[Statement]:
    """Are answers cut off by the limit, or do they never end?"""
    start, now = float(subject.sft.stopped.mean()), float(subject.tuned.stopped.mean())
    measured = f"{start:.0%} of the SFT model's answers end by themselves, {now:.0%} of the policy's"
    if min(start, now) >= ENDING:
        yield ruled_out("endings", f"{measured}: answers end within response_length")
        return
    from_start = start < ENDING
    longer, stop = _with_twice_the_room(subject, reference=from_start), _stop_probability(subject)
    cut_off = longer >= ENDING or (from_start and (stop or 0.0) >= STOPS)
    measured += f"; with twice the room {longer:.0%} of the {'SFT model' if from_start else 'policy'}'s"
    measured += (
        "" if stop is None else f"; at the end of demonstrations the SFT model stops with probability {stop:.2f}"
    )
    unlearned = "the SFT model never learned to stop: the stop token was masked out of its loss, or its data lack it"
    cause, action = (
        ("response_length cuts off answers that would end", "raise response_length") if cut_off
        else (unlearned, "see that SFT's labels hold the stop token, and train it again") if from_start
        else ("the policy unlearned to stop: the reward pays for going on, or nothing is subtracted for it",
              "set missing_eos_penalty; look at what the reward pays for")
    )  # fmt: skip
    yield confirmed(
        "endings", measured, severity="warning", cause=cause, action=action,
        explains=("cut_off", "stop_rate_falling", "length_up", "length_rewarded"),
    )  # fmt: skip


def _with_twice_the_room(subject: PPOSubject, *, reference: bool) -> float:
    """Return the share of answers that end within twice the length, or within the model's context."""
    prompts = [subject.ids["validation"][i % len(subject.ids["validation"])] for i in range(LONGER)]
    room = min(2 * subject.config.response_length, context_length(subject.models.causal) - max(map(len, prompts)))
    options = dataclasses.replace(subject.trainer.sampling, max_new_tokens=room)
    _, sampled = respond(subject.models, prompts, options, reference=reference, seed=subject.config.seed + 12)
    return float(sampled.stopped.float().mean())


@torch.no_grad()
def _stop_probability(subject: PPOSubject) -> float | None:
    """Return the SFT model's probability of the stop token where held-out demonstrations end; None without any."""
    try:
        rows = load_rows(str(subject.policy.manifest.config["dataset"]), "validation", kind="demonstrations").rows
    except UserError:
        return None
    chosen = list(rows.select(range(min(DEMONSTRATIONS, len(rows)))))
    prompts, prompt_mask = pad(
        [encode_prompt(subject.tokenizer, row["prompt"]) for row in chosen],
        subject.trainer.sampling.pad_token_id,
        side="left",
    )
    answers = [encode_response(subject.tokenizer, row["prompt"], row["completion"]) for row in chosen]
    responses, mask = pad(answers, subject.trainer.sampling.pad_token_id, side="right")
    batch = Sequences(prompts=prompts, prompt_mask=prompt_mask, responses=responses, mask=mask).to(
        subject.models.compute.device
    )
    logprobs = forward.token_logprobs(subject.models, "reference", batch, 1.0)
    return float(logprobs.gather(1, batch.mask.sum(dim=1, keepdim=True) - 1).exp().mean())


@experiment("ppo", needs=("sft", "tuned"), passes=3.2, settles=("over_optimised", "reward_falling"))
def held_out_prompts(subject: PPOSubject) -> Iterator[Statement]:
    """Is the gain on training prompts there on held-out ones, too?"""
    trained = [subject.evaluate("train", reference=reference) for reference in (True, False)]
    unit = float(subject.sft.scores.std()) or 1.0
    inside = mean((trained[1].scores - trained[0].scores) / unit, trained[0].groups)
    outside = mean((subject.tuned.scores - subject.sft.scores) / unit, subject.sft.groups)
    measured = f"score gained on training prompts {inside}, on held-out prompts {outside} standard deviations"
    if inside.low > outside.high + 0.3:
        yield confirmed(
            "held_out_prompts", measured, severity="warning", cause="the policy learned its training prompts by heart",
            action="take more prompts, or fewer passes over them",
        )  # fmt: skip
    else:
        yield ruled_out("held_out_prompts", f"{measured}: not learned by heart")
