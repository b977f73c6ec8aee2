"""Faults that are put into the trainer's own functions: a run's audit names the quantity that each is in."""

from __future__ import annotations

import contextlib
import dataclasses
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from audit_runs import Start, start, statements, wrong

from rlhf.models.roles import SharedModels

__all__ = ["start"]

Patch = tuple[str, Callable[[Any], Any]]


def after(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Changes what a function returns."""
    return lambda original: lambda *a, **k: change(original(*a, **k))


def replaced(**changes: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Changes fields of the dataclass that a function returns."""
    return after(
        lambda r: dataclasses.replace(r, **{name: change(getattr(r, name)) for name, change in changes.items()})
    )


def rolled(x: Any) -> Any:
    return x.roll(1, 0)


def _stale(original: Any) -> Any:
    """Samples with the weights of the first rollout for ever."""
    first: dict[Any, Any] = {}

    @contextlib.contextmanager
    def merged(models: SharedModels) -> Iterator[Any]:
        policy = models.trainable("policy")
        now = {name: p.data for name, p in policy.items()}
        old = first.setdefault(models, {name: p.data.clone() for name, p in policy.items()})
        for name, p in policy.items():
            p.data = old[name]
        with original(models) as model:
            for name, p in policy.items():
                p.data = now[name]
            yield model

    return merged


def _with(**fixed: Any) -> Callable[[Any], Any]:
    """Gives a function other arguments than it is called with."""
    return lambda original: lambda *a, **k: original(*a, **{**k, **fixed})


def _own_tokens(original: Any) -> Any:
    def train(m: Any, c: Any, batch: Any, advantages: Any, returns: Any, statistics: Any, **k: Any) -> Any:
        own = dataclasses.replace(statistics, tokens=int(batch.mask.sum()))  # its lists are the same
        return original(m, c, batch, advantages, returns, own, **k)

    return train


def _lost(original: Any) -> Any:
    """Half of the policy's gradients never arrive."""

    def accumulate(models: Any, *a: Any, **k: Any) -> Any:
        statistics = original(models, *a, **k)
        for p in list(models.trainable("policy").values())[::2]:
            p.grad = None
        return statistics

    return accumulate


def _base_moves(original: Any) -> Any:
    def step(trainer: Any, *a: Any, **k: Any) -> Any:
        next(p for p in trainer.models.parameters() if not p.requires_grad).data.mul_(1.001)
        return original(trainer, *a, **k)

    return step


def _weights_move(original: Any) -> Any:
    def collect(trainer: Any) -> Any:
        for p in trainer.state.parameters("policy"):
            p.data.mul_(1.01)
        return original(trainer)

    return collect


#: The quantity, and what is patched in which way.
FAULTS: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    "prompts cut on the left": ("prompts", "rlhf.stages.ppo.encode_prompt", after(lambda ids: ids[2:])),
    "prompts cut on the right": ("prompts", "rlhf.stages.ppo.encode_prompt", after(lambda ids: ids[:-2])),
    "prompts rolled": ("prompts", "rlhf.stages.ppo.encode_prompts", after(lambda rows: rows[1:] + rows[:1])),
    "seeds frozen": (
        "random_numbers", "rlhf.ppo.draws.draw_seed", lambda f: lambda seed, at, *, stream: f(seed, 0, stream=stream)
    ),
    "mask without the stop token": (
        "response_mask", "rlhf.ppo.rollout.evaluate_sequences", replaced(stopped=lambda x: ~x)
    ),
    "colder sampling": ("sampling", "rlhf.ppo.rollout.sample", _with(temperature=0.5)),
    "sampler of the first weights": ("sampling", "rlhf.models.roles.SharedModels.merged_policy", _stale),
    "warmer log-probabilities": ("old_logprobs", "rlhf.models.logprobs._tempered", lambda f: lambda x, t: f(x, 1.1 * t)),
    "reference rolled": ("ref_logprobs", "rlhf.ppo.rollout.evaluate_sequences", replaced(ref_logprobs=rolled)),
    "values a token late": (
        "values", "rlhf.ppo.rollout.evaluate_sequences", replaced(values=lambda v: torch.cat([v[:, 1:], v[:, :1]], 1))
    ),
    "scores rolled": ("raw_scores", "rlhf.reward.sources.AdapterReward.__call__", after(rolled)),
    "scores negated": ("raw_scores", "rlhf.reward.sources.AdapterReward.__call__", after(lambda x: -x)),
    "penalty added": (
        "scores", "rlhf.ppo.rollout.Penalties.apply", lambda f: lambda self, raw, *rest: 2 * raw - f(self, raw, *rest)
    ),
    "KL sign": (
        "token_rewards", "rlhf.ppo.functional.token_rewards",
        lambda original: lambda scores, logprobs, ref, mask, *, kl_coef: original(scores, ref, logprobs, mask, kl_coef=kl_coef),
    ),
    "score at the first token": ("token_rewards", "rlhf.ppo.functional.token_rewards", after(lambda r: r.flip(1))),
    "rewards centred": ("whitened_rewards", "rlhf.ppo.functional.whiten_rewards", after(lambda r: r - r.mean())),
    "gamma": ("advantages", "rlhf.ppo.functional.gae", _with(gamma=0.9)),
    "lambda": ("advantages", "rlhf.ppo.functional.gae", _with(lam=0.9)),
    "returns of whitened advantages": (
        "returns", "rlhf.ppo.credit.Gae.__call__", replaced(returns=lambda x: x * 1.1)
    ),
    "advantages negated": ("whitened_advantages", "rlhf.ppo.functional.whiten", after(lambda x: -x)),
    "rows left out": (
        "minibatches", "rlhf.ppo.draws.minibatches", lambda original: lambda *a, **k: [original(*a, **k)[0]] * 2
    ),
    "gradients kept": (
        "gradients_zeroed", "torch.optim.AdamW.zero_grad", lambda original: lambda self, set_to_none=True: None
    ),
    "policy loss without its clip": ("policy_loss", "rlhf.ppo.functional.policy_loss", _with(clip_range=9.0)),
    "value loss with the sign of the returns": (
        "value_loss", "rlhf.ppo.functional.value_loss",
        lambda original: lambda v, old, returns, mask, **k: original(v, old, -returns, mask, **k),
    ),
    "loss divided by microbatch": ("gradient", "rlhf.ppo.gradients._train", _own_tokens),
    "gradients that do not arrive": ("gradient", "rlhf.ppo.trainer.accumulate", _lost),
    "no clipping of the norm": ("gradient_clipping", "torch.nn.utils.clip_grad_norm_", lambda f: lambda p, m: f(p, 1e9)),
    "schedule not stepped": (
        "learning_rate", "torch.optim.lr_scheduler.LambdaLR.step",
        lambda f: lambda self, *a: f(self) if self.last_epoch < 0 else None,
    ),
    "weight decay": ("optimizer_step", "rlhf.run.optim.torch.optim.AdamW", _with(weight_decay=0.1)),
    "base changed": ("frozen_weights", "rlhf.ppo.trainer.PPOTrainer.optimise", _base_moves),
    "weights changed in between": ("weights_kept", "rlhf.ppo.trainer.PPOTrainer.collect", _weights_move),
    "coefficient fixed": ("kl_coef", "rlhf.ppo.functional.adapted_kl_coef", lambda original: lambda coef, *a, **k: coef),
}  # fmt: skip
#: Options that a fault needs to have an effect.
OPTIONS: dict[str, dict[str, Any]] = {
    "no clipping of the norm": {"max_grad_norm": 0.01},
    "policy loss without its clip": {"clip_range": 0.001, "num_ppo_epochs": 2},
    "schedule not stepped": {"warmup_steps": 6},
}


@contextlib.contextmanager
def patched(target: str, make: Callable[[Any], Any]) -> Iterator[None]:
    owner_name, _, name = target.rpartition(".")
    owner: Any = pkgutil.resolve_name(owner_name)
    with mock.patch.object(owner, name, make(getattr(owner, name))):
        yield


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_trainer_is_located(fault: str, start: Start) -> None:
    """Catches: a fault that the recomputation has as well, and one that is called by another's name."""
    quantity, target, make = FAULTS[fault]
    with patched(target, make):
        folder = start(may_fail=True, **OPTIONS.get(fault, {}))
    rows = statements(folder)
    first = next((wrong(rows, step) for step in (1, 2, 3) if wrong(rows, step)), [])
    assert first == [quantity]
