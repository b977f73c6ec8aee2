"""Callbacks: functions of users that are called after each update of a stage, and may end it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from rlhf.base import distributed
from rlhf.base.functions import name_of
from rlhf.ppo.state import Order
from rlhf.ppo.types import Rollout
from rlhf.reward.functions import RewardError, one_line_errors, settings_restored

_KINDS: list[tuple[Any, Any]] = list(product(("stop", "roll_back"), ("learning_rate", "kl_coef")))
"""Actions and remedies of orders, by the number under which process 0 sends them to the others."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """An update that a stage has made."""

    stage: str
    step: int
    """Updates done, this one included; in supervised stages a line of metrics may come without one, as of an evaluation."""
    metrics: Mapping[str, float]
    """A copy, by the names of `rlhf.run.metrics`."""
    rollout: Rollout | None = None
    """In PPO: tokens, log-probabilities, KL, values and scores that the update was made from."""
    samples: Sequence[Mapping[str, Any]] = ()
    """In PPO: `prompt`, `response`, `score` and `kl` of each response of the rollout."""


Callback = Callable[[Update], Order | None]


def call_back(callbacks: Sequence[Callback], update: Update) -> Order | None:
    """Call all callbacks, in process 0; return the first order in all of them. One that fails is an order to stop."""
    orders = [_order(callback, update) for callback in callbacks if distributed.rank() == 0]
    order = next((order for order in orders if order is not None), None)
    number = _KINDS.index((order.action, order.remedy)) if order else -1
    number = int(distributed.from_main(torch.tensor(number)))
    if order is not None or number < 0:
        return order
    action, remedy = _KINDS[number]
    return Order(action=action, reason="ordered by a callback", remedy=remedy)


def _order(callback: Callback, update: Update) -> Order | None:
    name = f"callback {name_of(callback)}"
    try:
        with one_line_errors(name), settings_restored():
            order = callback(update)
            if order is not None and (not isinstance(order, Order) or (order.action, order.remedy) not in _KINDS):
                raise TypeError(f"returned {order!r:.80}; a callback returns None or an Order to stop or roll back")
            return order
    except RewardError as error:
        return Order(action="stop", reason=str(error))
