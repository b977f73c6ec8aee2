"""The PPO loop: rollout -> credit -> epochs x minibatches x microbatches -> log.

Conventions (score index, value index, masks, KL, whitening, loss denominator) are those of `rlhf.ppo.functional`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf.base import distributed
from rlhf.base.errors import UserError
from rlhf.base.interrupt import StopRequest
from rlhf.config import PPOConfig
from rlhf.models.roles import RoleModels
from rlhf.ppo import draws
from rlhf.ppo import functional as F
from rlhf.ppo.credit import Credit, estimator
from rlhf.ppo.gradients import accumulate, accumulate_texts
from rlhf.ppo.metrics import Totals, histogram_values, sample_rows
from rlhf.ppo.recording import Recorder
from rlhf.ppo.rollout import Environment, SamplingOptions, collect
from rlhf.ppo.state import TRAINED, Order, Outputs, TrainingState
from rlhf.ppo.types import Rollout
from rlhf.reward.functions import RewardError
from rlhf.run.progress import Progress

#: Distance from 1 that the first ratios of a rollout may have: rounding of log-probabilities by the compute type.
RATIO_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1}

Observer = Callable[[int, Mapping[str, float]], Order | None]
"""Called with the number of updates done and the metrics of the last one; may return an order."""


class KLLimitPassed(Exception):
    """A rollout's KL to the reference is above `max_kl`; nothing has been trained on it."""


class PPOTrainer:
    """Trains the policy and value parameters of `models` on the prompts of an environment.

    Args:
        models: the policy with its reference, value and reward models.
        tokenizer: the tokenizer of all stages.
        texts: (prompt, answer) token ids of the texts of PPO-ptx; needed with a ptx_coef.
        observe: called after every update.
        recorder: is shown every step of an update.
    """

    def __init__(
        self,
        models: RoleModels,
        tokenizer: PreTrainedTokenizerBase,
        config: PPOConfig,
        environment: Environment,
        outputs: Outputs,
        *,
        texts: Sequence[tuple[list[int], list[int]]] = (),
        observe: Observer = lambda update, metrics: None,
        recorder: Recorder | None = None,
    ) -> None:
        self.models, self.tokenizer, self.config = models, tokenizer, config
        self.environment, self.texts = environment, texts
        self.outputs, self.observe, self.recorder = outputs, observe, recorder or Recorder()
        self.sampling = SamplingOptions.of(config, tokenizer)
        self.estimator = estimator(config)
        self.state = TrainingState(models, config, outputs)
        self.rollout: Rollout | None = None
        """The rollout of the last update."""

    def train(self) -> None:
        """Run the updates that are left, with checkpoints; Ctrl-C finishes the running update and saves first."""
        c, state = self.config, self.state
        with StopRequest() as stop, Progress(c.num_updates - state.updates_done, "ppo") as bar:
            if c.max_kl is not None and state.updates_done == 0:
                state.save()  # a state to go back to
            while state.updates_done < c.num_updates:
                try:
                    metrics = self.step()
                    order = self.observe(state.updates_done, metrics)
                except KLLimitPassed as limit:
                    order = Order(action="roll_back", reason=str(limit))
                except RewardError:  # comes before anything has changed
                    state.save()
                    raise
                if order is not None:
                    bar.update(self.follow(order))
                    continue
                bar.update(
                    1, score=metrics["objective/score"], kl=metrics["objective/kl"], length=metrics["response/length"]
                )
                self._save_if_due(stop)

    def step(self) -> dict[str, float]:
        """Make one update: a rollout, and the optimiser steps on it. Return the metrics of both.

        Raises:
            KLLimitPassed: the run may go back (`on_max_kl`).
            UserError: the KL limit is passed and the run must stop, or the gradient is not finite.
        """
        rollout, metrics = self.collect()
        self._check_kl(rollout)
        credit = self.estimator(rollout, kl_coef=self.state.kl_coef)
        self.recorder.rolled(self.state, rollout, credit)
        metrics |= credit.metrics
        with self.outputs.timer.phase("optimise"):
            started = time.perf_counter()
            metrics |= self.optimise(rollout, credit)
            metrics["time/optimise"] = time.perf_counter() - started
        self._adapt_kl_coef(rollout)
        self.state.updates_done += 1
        self.recorder.updated()
        self.rollout = rollout
        self.log(rollout, metrics)
        return metrics

    def collect(self) -> tuple[Rollout, dict[str, float]]:
        """Return the rollout of the next update, and its metrics."""
        return collect(
            self.models,
            self.tokenizer,
            self.config,
            self.environment,
            self.sampling,
            update=self.state.updates_done,
            kl_coef=self.state.kl_coef,
            with_values=self.estimator.needs_values,
            timer=self.outputs.timer,
        )

    def optimise(self, rollout: Rollout, credit: Credit) -> dict[str, float]:
        """Train for all epochs on a rollout; return token-weighted metrics."""
        c, state, totals = self.config, self.state, Totals()
        self.models.train(c.gradient_checkpointing)  # layers recompute their activations; dropout is off in any mode
        for epoch in range(c.num_ppo_epochs):
            for microbatches in draws.minibatches(c, rollout.lengths, state.updates_done, epoch):
                if not totals.early_stop:
                    self._accumulate(rollout, credit, microbatches, totals)
                if not totals.early_stop:
                    self._update(totals)
                state.optimizer.zero_grad(set_to_none=True)
                state.scheduler.step()  # also where updates are left out: the schedule keeps pace with the rollouts
        self.models.eval()
        policy, value = state.optimizer.param_groups
        rates = {"ppo/lr": policy["lr"], "ppo/value_lr": value["lr"]}
        return totals.metrics() | rates | {"ppo/roll_backs": state.roll_backs}

    def _accumulate(self, rollout: Rollout, credit: Credit, microbatches: list[Tensor], totals: Totals) -> None:
        """Add the gradients of one minibatch, unless its policy has moved too far from that of the rollout."""
        c = self.config
        train_policy = self.state.updates_done >= c.value_warmup_updates
        texts: list[tuple[list[int], list[int]]] = []
        self.recorder.opened()
        losses = accumulate(self.models, c, rollout, credit, microbatches, train_policy=train_policy)
        totals.add(losses)
        if totals.first_ratio_error > RATIO_TOLERANCE[self.models.compute.dtype]:
            raise RuntimeError(
                f"the first probability ratio of a rollout is off 1 by {totals.first_ratio_error:.3g}: old log-probabilities "
                "were not made by the forward pass that is being trained"
            )
        if c.max_approx_kl is not None:
            totals.early_stop = float(distributed.total(torch.tensor(losses.approx_kl))) > c.max_approx_kl
        if c.ptx_coef > 0 and train_policy and not totals.early_stop:
            rows = draws.text_rows(c, len(self.texts), self.state.scheduler.last_epoch)
            texts = [self.texts[row] for row in rows]
            totals.text_losses += accumulate_texts(self.models, c, texts, self.sampling.pad_token_id)
        self.recorder.accumulated(microbatches, losses, texts)

    def _update(self, totals: Totals) -> None:
        """Clip the gradients and step; policy and value are separate models, so each has its own norm."""
        state = self.state
        distributed.add_up(cast(Tensor, parameter.grad) for parameter in self._changing_parameters())
        norms = [
            float(torch.nn.utils.clip_grad_norm_(state.parameters(role), self.config.max_grad_norm)) for role in TRAINED
        ]
        if not all(torch.isfinite(torch.tensor(norms))):
            raise UserError(
                f"the gradient is not finite at update {state.updates_done + 1}; the last checkpoint is intact: lower "
                "learning_rate or use --dtype float32, then --resume"
            )
        totals.add_step(*norms)
        self.recorder.clipped()
        state.optimizer.step()
        self.recorder.stepped()
        state.update_average()

    def _changing_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that are about to change; a process without a microbatch has no gradient yet: it adds zero."""
        policy = self.state.updates_done >= self.config.value_warmup_updates
        for role, trained in zip(TRAINED, (policy, self.estimator.needs_values), strict=True):
            for parameter in self.state.parameters(role) if trained else ():
                if distributed.size() > 1 and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                if parameter.grad is not None:
                    yield parameter

    def _check_kl(self, rollout: Rollout) -> None:
        """Refuse a rollout above `max_kl`."""
        c, kl = self.config, float(rollout.exact_kl.mean())
        if c.max_kl is None or not kl > c.max_kl:
            return
        reason = (
            f"the KL to the reference is {kl:.3g} nats a response after update {self.state.updates_done}, "
            f"above max_kl {c.max_kl}"
        )
        raise self.state.beyond_repair(reason) if c.on_max_kl == "stop" else KLLimitPassed(reason)

    def _adapt_kl_coef(self, rollout: Rollout) -> None:
        """Move the KL coefficient towards its target, if it has one."""
        c = self.config
        if c.kl_target is not None:
            kl = float(rollout.kl.mean())
            self.state.kl_coef = F.adapted_kl_coef(
                self.state.kl_coef, kl, target=c.kl_target, horizon=c.kl_horizon, episodes=len(rollout)
            )

    def follow(self, order: Order) -> int:
        """Carry out an order; return the number of updates that the run went back, negative."""
        if order.action == "stop":
            self.state.save()
            raise UserError(order.reason)
        return self.state.roll_back(order)

    def log(self, rollout: Rollout, metrics: Mapping[str, float]) -> None:
        """Log the metrics of an update, and the first few responses of its rollout."""
        c, update, tracker = self.config, self.state.updates_done, self.outputs.tracker
        if update % c.logging_steps == 0:
            tracker.log({**metrics, "episodes": update * c.rollout_batch_size}, update)
            tracker.log_histograms(histogram_values(rollout), update)
            tracker.log_samples(sample_rows(rollout, self.tokenizer, c.num_logged_samples), update)

    def _save_if_due(self, stop: StopRequest) -> None:
        """Write the snapshot and checkpoint that are due after an update, or because a stop was requested."""
        c, update = self.config, self.state.updates_done
        last = update == c.num_updates
        if c.snapshot_steps and (update % c.snapshot_steps == 0 or last):
            self.state.snapshot()
        stopping = distributed.any_true(stop.requested, self.models.compute.device)
        if stopping or update % c.save_steps == 0 or last:
            self.state.save()
        if stopping:
            stop.raise_if_requested()
