"""Health checks of PPO: is the data that the optimiser gets computed rightly?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from rlhf.doctor.health.check import check
from rlhf.doctor.health.history import History

#: Nats a token by which sampler and training forward may differ in the first rollouts; beyond, it is no drift.
FIRST_GAP = 0.15


@check(
    severity="critical",
    shows="the reference is not the model that PPO starts from",
    causes={
        "the base before SFT, or another SFT version": [],
        "an adapter that was merged for one of the two only": [],
    },
    action="start policy and reference from the same sft/NAME@VERSION",
    explains=("negative_kl", "kl_jump", "kl_high"),
    needs=("objective/kl_k3",),
    source="lm-human-preferences (reference is a copy of the start)",
)
def wrong_reference(h: History, *, kl: float = 0.01) -> str | None:
    """First rollout: above {kl:g} nats a response; it is 0 with one model."""
    first = h.at("objective/kl_k3", 1)
    if first is None or first <= kl:
        return None
    return f"KL to the reference is {first:.3g} nats in the first rollout, not 0"


@check(
    severity="critical",
    shows="the chat template was applied twice",
    causes={
        "rendered prompts in the data": [],
        "a caller that renders them again": [],
    },
    action="store plain messages in the data and let the stage apply the template once",
    data="prompts in `samples.jsonl`",
)
def template_twice(h: History) -> str | None:
    """The beginning and the end that all prompts share are both written twice."""
    prompts = [str(row.get("prompt", "")).split() for row in h.samples]
    if len({tuple(words) for words in prompts}) < 2:
        return None
    head, tail = _shared_start(prompts), _shared_start([words[::-1] for words in prompts])
    if not (_starts_twice(head) and _starts_twice(tail)):
        return None
    return f"prompts begin with {' '.join(head)!r} and end in {' '.join(tail[::-1])!r}"


@check(
    severity="critical",
    shows="the pad token is also the stop token, so masks made from `token != pad` drop the end of every response",
    causes={
        "a tokenizer without a pad token of its own": [],
    },
    action="give the tokenizer a pad token of its own, in all three stages",
    needs=("rollout/pad_tokens", "response/stop_rate"),
    rows=2,
    source="N+, detail 3",
)
def pad_is_stop(h: History, *, difference: float = 1e-6) -> str | None:
    """Equal within {difference:g} in the first 2 rollouts, and above 0; later ones may hold a pad token by chance."""
    pads, stops = h.first("rollout/pad_tokens", 2), h.first("response/stop_rate", 2)
    if sum(stops) == 0 or any(abs(p - s) > difference for p, s in zip(pads, stops, strict=True)):
        return None
    return f"each of the {stops[-1]:.0%} stopped responses holds one pad token among the tokens that count"


@check(
    severity="critical",
    shows="padding counts as text",
    causes={
        "prompts padded on the wrong side or without a mask": ["audit:old_logprobs"],
        "a mask that is turned round": ["audit:response_mask"],
    },
    action="pad prompts on the left, and carry masks along from the lengths",
    explains=("length_rewarded", "value_useless", "negative_kl"),
    needs=("rollout/pad_tokens",),
    rows=2,
)
def padding_counted(h: History, *, pads: float = 0.75) -> str | None:
    """At least {pads:g} a response in the last 2 rollouts, and not `pad_is_stop`."""
    recent = h.values("rollout/pad_tokens", 2)
    if min(recent) < pads or pad_is_stop(h):
        return None
    return f"{recent[-1]:.3g} pad tokens a response among the tokens that count"


@check(
    severity="critical",
    shows="tokens are not drawn from the distribution that is scored",
    causes={
        "another temperature, top-k or top-p": ["audit:sampling"],
        "a repetition penalty, or a generation config of the model's own": [],
        "log-probabilities that are computed wrongly": ["audit:old_logprobs"],
    },
    action="sample with the temperature that divides the scored logits, and nothing else",
    explains=("negative_kl", "sampler_drift"),
    needs=("rollout/logprob_gap",),
    data="`rollout/logprob_gap`, `rollout/surprise_gap`, `rollout/surprise_error`",
    source="E[-log pi(x)] is the entropy of pi for x drawn from pi",
)
def sampler_mismatch(h: History, *, gap: float = FIRST_GAP, surprise: float = 0.08, errors: float = 5) -> str | None:
    """Gap above {gap:g} nats a token in both of the first rollouts; or the surprise gap of the last 8 rollouts at least
    {surprise:g} nats and {errors:g} standard errors."""
    first = h.first("rollout/logprob_gap", 2)
    if min(first) > gap:
        return f"sampler and training forward differ by {min(first):.3g} nats a token from the first rollout on"
    gaps, deviations = h.values("rollout/surprise_gap", 8), h.values("rollout/surprise_error", 8)
    if len(gaps) < 3 or len(gaps) != len(deviations):
        return None
    mean, error = statistics.fmean(gaps), math.sqrt(sum(e * e for e in deviations)) / len(deviations)
    if abs(mean) < max(surprise, errors * error):
        return None
    side = "likelier" if mean < 0 else "rarer"
    return (
        f"sampled tokens are {abs(mean):.3g} nats {side} than the policy's entropy implies (standard error {error:.2g})"
    )


@check(
    severity="critical",
    shows="the sampler's weights are no longer the policy's",
    causes={
        "an adapter that is merged twice, not at all, or not renewed after updates": ["audit:sampling"],
        "rounding of the merged weights": [],
    },
    action="merge the newest adapter once for sampling and undo it exactly; in bf16 try dtype float32",
    explains=("negative_kl",),
    needs=("rollout/logprob_gap",),
    rows=3,
)
def sampler_drift(h: History, *, gap: float = 0.1, growth: float = 4, first: float = FIRST_GAP) -> str | None:
    """Mean of the last 2 at least {gap:g} nats a token and {growth:g} x the first rollout's, which is at most {first:g}."""
    start, now = h.values("rollout/logprob_gap")[0], statistics.fmean(h.values("rollout/logprob_gap", 2))
    if start > first or now < max(gap, growth * start):
        return None
    return f"sampler and training forward differ by {now:.3g} nats a token, {start:.2g} in the first rollout"


@check(
    severity="critical",
    shows="the policy that is trained does not give the old log-probabilities at its first step",
    causes={
        "old log-probabilities that are stale or the sampler's": ["audit:old_logprobs"],
        "dropout in the update": [],
        "a narrow compute type in batches of other shapes": [],
    },
    action="compute them anew for each rollout in the mode, type and batches of the update",
    explains=("steps_too_large",),
    needs=("ppo/first_ratio_error",),
)
def stale_logprobs(h: History, *, error: float = 0.1) -> str | None:
    """Above {error:g} in one of the last 3 updates (fp32 runs refuse it from 0.001 on)."""
    worst = max(h.values("ppo/first_ratio_error", 3))
    return f"the first ratio of a rollout is off 1 by {worst:.3g}" if worst > error else None


@check(
    severity="critical",
    shows="advantages that were whitened have a mean",
    causes={
        "a mean that was added back": ["audit:whitened_advantages"],
        "whitening over other tokens than are trained": ["audit:whitened_advantages"],
    },
    action="subtract the mean over exactly the tokens of the loss",
    needs=("ppo/advantage_mean",),
)
def advantages_not_centred(h: History, *, mean: float = 0.01) -> str | None:
    """More than {mean:g} from 0 in one of the last 3 updates."""
    worst = max(h.values("ppo/advantage_mean", 3), key=abs)
    return f"mean advantage {worst:.3g} after whitening, not 0" if abs(worst) > mean else None


def _shared_start(rows: Sequence[Sequence[str]]) -> list[str]:
    shared: list[str] = []
    for words in zip(*rows, strict=False):
        if len(set(words)) > 1:
            break
        shared.append(words[0])
    return shared


def _starts_twice(words: Sequence[str]) -> bool:
    """Return whether the words begin with a sequence and its repetition."""
    return any(words[:k] == words[k : 2 * k] for k in range(1, len(words) // 2 + 1))
