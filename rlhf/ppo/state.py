"""Training state of PPO: everything that a checkpoint holds, and going back to one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from torch import Tensor, nn

from rlhf.base import distributed
from rlhf.base.errors import UserError
from rlhf.config import PPOConfig
from rlhf.models.roles import RoleModels
from rlhf.run import checkpoint, optim
from rlhf.run.timing import PhaseTimer
from rlhf.run.tracker import Tracker

#: Times that a run may go back to a checkpoint before it gives up.
MAX_ROLL_BACKS = 3

TrainedRole = Literal["policy", "value"]
TRAINED: tuple[TrainedRole, TrainedRole] = ("policy", "value")


@dataclass(frozen=True, kw_only=True)
class Order:
    """An observer's order to the trainer after an update."""

    action: Literal["stop", "roll_back"]
    """stop: save and end the run. roll_back: return to the last good checkpoint, with a remedy."""
    reason: str
    remedy: Literal["learning_rate", "kl_coef"] = "learning_rate"
    """Halve the learning rate, or double the KL coefficient."""


class Saved(TypedDict):
    """State in a checkpoint of PPO, beside its tensors."""

    optimizer: checkpoint.OptimizerSettings
    scheduler: dict[str, Any]
    kl_coef: float
    step: int
    learning_rate_scale: float
    roll_backs: int
    log: dict[str, int]


@dataclass(kw_only=True)
class Outputs:
    """The tracker, checkpoint folder and timer that a run writes to."""

    tracker: Tracker
    folder: Path
    """Holds the checkpoints and snapshots."""
    timer: PhaseTimer


class TrainingState:
    """Trained weights with their optimiser and schedule, the KL coefficient, and counters."""

    def __init__(self, models: RoleModels, config: PPOConfig, outputs: Outputs) -> None:
        self.models, self.config, self.outputs = models, config, outputs
        policy, value = (list(models.trainable(role).values()) for role in TRAINED)
        value_lr = config.value_learning_rate if config.value_learning_rate is not None else config.learning_rate
        self.optimizer = optim.build_optimizer([{"params": policy}, {"params": value, "lr": value_lr}], config)
        steps = config.num_updates * config.num_ppo_epochs * (config.rollout_batch_size // config.minibatch_size)
        self.scheduler = optim.build_scheduler(self.optimizer, config, steps)
        self.configured_rates = list(self.scheduler.base_lrs)
        self.learning_rate_scale = 1.0
        self.updates_done = 0
        self.kl_coef = config.kl_coef
        self.roll_backs = 0
        self.average: dict[str, Tensor] = {}
        """Running mean of the policy's weights, with an `ema_decay`."""
        if config.ema_decay is not None:
            self.average = {name: p.detach().clone() for name, p in models.trainable("policy").items()}

    def parameters(self, role: TrainedRole) -> list[nn.Parameter]:
        """Return the parameters that a role's loss changes."""
        parameters: list[nn.Parameter] = self.optimizer.param_groups[role == "value"]["params"]
        return parameters

    def weights(self) -> dict[str, nn.Parameter]:
        """Return all trained parameters by name."""
        return {**self.models.trainable("policy"), **self.models.trainable("value")}

    def update_average(self) -> None:
        """Move the running mean of the policy's weights towards the weights, if there is one."""
        if self.config.ema_decay is not None:
            for name, parameter in self.models.trainable("policy").items():
                self.average[name].lerp_(parameter.detach(), 1 - self.config.ema_decay)

    @contextlib.contextmanager
    def averaged_policy(self) -> Iterator[None]:
        """Inside, the policy has the running mean of its weights (`ema_decay`)."""
        policy = self.models.trainable("policy")
        weights = {name: parameter.data for name, parameter in policy.items()}
        try:
            for name, parameter in policy.items():
                parameter.data = self.average[name]
            yield
        finally:
            for name, parameter in policy.items():
                parameter.data = weights[name]

    def save(self) -> Path:
        """Write a checkpoint, from which `resume` goes on as if nothing had happened; process 0 writes it."""
        if distributed.rank() > 0:
            distributed.wait()
            return self.outputs.folder
        moments, settings = checkpoint.pack_optimizer(self.optimizer)
        tensors: dict[str, dict[str, Tensor]] = {"weights": {**self.weights()}, "optimizer": moments}
        path = checkpoint.save(
            self.outputs.folder,
            self.updates_done,
            tensors | ({"average": self.average} if self.average else {}),
            {
                "optimizer": settings,
                "scheduler": self.scheduler.state_dict(),
                "kl_coef": self.kl_coef,
                "learning_rate_scale": self.learning_rate_scale,
                "roll_backs": self.roll_backs,
                "log": self.outputs.tracker.position(),
            },
        )
        distributed.wait()
        return path

    def load(self, path: Path) -> None:
        """Take over a checkpoint, and cut the logs back to where they were."""
        tensors, state = checkpoint.load(path, Saved)
        for name, parameter in self.weights().items():
            parameter.data.copy_(tensors["weights"][name])
        for name, mean in self.average.items():
            mean.copy_(tensors["average"][name])
        checkpoint.unpack_optimizer(self.optimizer, tensors["optimizer"], state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.kl_coef, self.updates_done = state["kl_coef"], state["step"]
        self.learning_rate_scale, self.roll_backs = state["learning_rate_scale"], state["roll_backs"]
        self.outputs.tracker.rewind(state["log"])

    def resume(self) -> int:
        """Load the newest checkpoint, if there is one; return the number of updates done."""
        path = checkpoint.latest(self.outputs.folder)
        if path is not None:
            if distributed.rank() == 0:
                checkpoint.prune(self.outputs.folder)
            self.load(path)
        else:
            self.outputs.tracker.rewind({})  # killed before its first checkpoint: all of it comes again
        return self.updates_done

    def snapshot(self) -> None:
        """Write the policy's adapter as it is now, to be kept for good; process 0 writes it."""
        if distributed.rank() == 0:
            checkpoint.save_snapshot(
                self.outputs.folder,
                self.updates_done,
                lambda folder: self.models.save_policy(folder, base_model=self.config.policy),
            )
        distributed.wait()

    def roll_back(self, order: Order) -> int:
        """Return to the last good checkpoint, apply the order's remedy, and save.

        Returns: the number of updates by which the run moved, negative.

        Raises:
            UserError: there is no such checkpoint, or going back has not helped.
        """
        # The newest checkpoint may be of the very weights that passed the limit.
        reached, path = self.updates_done, checkpoint.last_before(self.outputs.folder, self.updates_done)
        if self.roll_backs == MAX_ROLL_BACKS or path is None:
            raise self.beyond_repair(order.reason)
        scale, count = self.learning_rate_scale, self.roll_backs + 1
        self.load(path)
        self.roll_backs = count
        self.kl_coef *= 2 if order.remedy == "kl_coef" else 1
        self._scale_learning_rate(scale / 2 if order.remedy == "learning_rate" else scale)
        if distributed.rank() == 0:
            checkpoint.discard_after(self.outputs.folder, self.updates_done)
        self.save()  # so that a resumed run goes on with the remedy
        remedy = f"kl_coef {self.kl_coef:.2g}" if order.remedy == "kl_coef" else "step size halved"
        print(f"{order.reason}: back to update {self.updates_done}, {remedy}", flush=True)
        return self.updates_done - reached

    def beyond_repair(self, reason: str) -> UserError:
        """Return the error of a run that cannot go on; it names the last good checkpoint."""
        path = checkpoint.last_before(self.outputs.folder, self.updates_done)
        return UserError(
            f"{reason}; the last good checkpoint is {path}: raise kl_coef (now {self.kl_coef:.2g}) or lower learning_rate "
            f"(now {self.config.learning_rate * self.learning_rate_scale:.2g}) and start anew"
        )

    def _scale_learning_rate(self, scale: float) -> None:
        """Make all step sizes, now and to come, this multiple of the configured ones."""
        self.learning_rate_scale = scale
        schedule: Any = self.scheduler
        schedule.base_lrs = [rate * scale for rate in self.configured_rates]
        for group, rate, course in zip(
            self.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
        ):
            group["lr"] = rate * course(schedule.last_epoch)
