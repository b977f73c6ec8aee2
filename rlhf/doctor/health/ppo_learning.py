"""Health checks of PPO: do the updates reach policy and value?"""

from __future__ import annotations

from rlhf.doctor.health.check import check
from rlhf.doctor.health.history import History


@check(
    severity="critical",
    shows="no gradient reaches the policy",
    causes={
        "frozen adapters": [],
        "advantages that are all equal": [],
        "a loss that was cut off from it": ["audit:gradient"],
    },
    action="see that the policy's adapter has requires_grad, and that objective/score_std is above 0",
    explains=("policy_unmoved", "same_as_sft"),
    needs=("ppo/grad_norm",),
)
def gradient_zero(h: History) -> str | None:
    """0 in the last 3 updates, 2 at least, after the value warm-up."""
    norms = h.values("ppo/grad_norm")[int(h.setting("value_warmup_updates")) :][-3:]
    return f"policy gradient norm 0 in {len(norms)} updates in a row" if len(norms) >= 2 and max(norms) == 0 else None


@check(
    severity="critical",
    shows="the policy that answers does not change",
    causes={
        "an optimiser that holds other weights than those that answer": ["audit:optimizer_step"],
        "steps that are far too small": [],
    },
    action="see that the optimiser holds the adapter that sampling uses; then raise learning_rate",
    explains=("same_as_sft",),
    needs=("objective/kl_k3", "ppo/lr"),
)
def policy_unmoved(h: History, *, kl: float = 1e-5, updates: int = 5) -> str | None:
    """Never above {kl:g} nats in {updates} updates after the value warm-up, with a step size above 0, and not
    `gradient_zero`."""
    kls, lr = h.values("objective/kl_k3"), h.values("ppo/lr")
    if len(kls) < h.setting("value_warmup_updates") + updates or max(kls) > kl or max(lr) == 0 or gradient_zero(h):
        return None
    return f"KL at most {max(kls):.1g} nats in {len(kls)} updates at learning rate {max(lr):.2g}"


@check(
    severity="critical",
    shows="the trained policy answers as the SFT model did",
    causes={
        "a policy that was not trained": ["audit:optimizer_step"],
        "an adapter that is not loaded or not switched on": [],
    },
    action="see objective/kl_full; at 0 the adapter is not in use, else the evaluation reads the wrong weights",
    data="`comparison.jsonl`",
)
def same_as_sft(h: History, *, share: float = 0.9, answers: int = 5) -> str | None:
    """At least {share:.0%} of {answers} or more answers are equal; both models draw with the same random numbers."""
    rows = h.comparison
    same = sum(row.get("sft_response") == row.get("ppo_response") for row in rows)
    if len(rows) < answers or same < share * len(rows):
        return None
    return f"{same} of {len(rows)} held-out answers are the SFT model's"


@check(
    severity="critical",
    shows="the value model is not trained",
    causes={
        "a value_learning_rate or vf_coef of 0": [],
        "a schedule that ended": ["audit:learning_rate"],
        "a value loss that was cut off from its weights": ["audit:gradient"],
    },
    action="set value_learning_rate and vf_coef above 0, and see that adapter and head of the value have requires_grad",
    explains=("value_dead", "value_useless"),
    needs=("ppo/value_grad_norm",),
    rows=3,
    data="`ppo/value_lr`, `ppo/value_grad_norm`",
)
def value_untrained(h: History) -> str | None:
    """Either is 0 in the last {rows} updates."""
    for name, quantity in (("ppo/value_lr", "step size"), ("ppo/value_grad_norm", "gradient norm")):
        values = h.values(name, 3)
        if len(values) >= 3 and max(values) == 0:
            return f"{quantity} of the value model 0 in {len(values)} updates in a row"
    return None
