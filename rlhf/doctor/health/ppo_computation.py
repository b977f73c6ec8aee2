"""Health checks of PPO: is what the optimiser gets computed rightly?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from rlhf.doctor.health.check import check
from rlhf.doctor.health.history import History


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
