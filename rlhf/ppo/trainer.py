"""The PPO loop: rollout -> token rewards -> advantages -> epochs x minibatches x microbatches -> log.

Conventions (score index, value index, masks, KL, whitening, loss denominator) are those of `rlhf.ppo.functional`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, StopStringCriteria

from rlhf.base import distributed
from rlhf.base.errors import UserError
from rlhf.base.functions import GoldFunction
from rlhf.base.interrupt import StopRequest
from rlhf.config import PPOConfig
from rlhf.doctor.live import DoctorStop, LiveDoctor, RollBack
from rlhf.models.roles import RoleModels
from rlhf.models.sequences import Sequences, length_sorted_batches, pad, prompt_batches
from rlhf.models.tokenization import decode_response, stop_token_ids
from rlhf.ppo import forward
from rlhf.ppo import functional as F
from rlhf.ppo.metrics import Totals, credit_metrics, judge_metrics, rollout_metrics
from rlhf.ppo.rollout import Penalties, SamplingOptions, evaluate_sequences, respond
from rlhf.ppo.types import Rollout
from rlhf.reward.sources import AdapterReward, Responses, Reward, RewardError
from rlhf.run import checkpoint, optim
from rlhf.run.progress import Progress
from rlhf.run.timing import PhaseTimer
from rlhf.run.tracker import Tracker

#: How far the first ratio of a rollout may be from 1: rounding of log-probabilities by the compute type.
RATIO_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1}


#: Times that a run may go back to a checkpoint before it gives up.
MAX_ROLL_BACKS = 3


class KLLimitPassed(RollBack):
    """A rollout's KL to the reference is above `max_kl`."""


class PPOTrainer:
    """Trains the policy and value adapters of `models` on prompts.

    Args:
        models: the shared base with its adapters; the reward adapter is loaded.
        prompts: token ids of the training prompts.
        tokenizer: the tokenizer of all stages.
        config: options.
        tracker: where metrics and samples go.
        folder: where checkpoints go.
        timer: adds up seconds by phase.
        reward: what scores responses; the reward adapter of `models` if not given.
        rows: the data row of each prompt, for rewards that read more than its tokens.
        texts: (prompt, answer) token ids of the texts that PPO-ptx keeps the policy good at; needed with a ptx_coef.
        gold: an independent judge, which scores every rollout for the log; nothing is trained on it.
    """

    def __init__(
        self,
        models: RoleModels,
        prompts: Sequence[Sequence[int]],
        tokenizer: PreTrainedTokenizerBase,
        config: PPOConfig,
        tracker: Tracker,
        folder: Path,
        timer: PhaseTimer,
        reward: Reward | None = None,
        rows: Sequence[Mapping[str, Any]] | None = None,
        texts: Sequence[tuple[list[int], list[int]]] = (),
        gold: GoldFunction | None = None,
    ) -> None:
        self.reward = reward or Reward({"reward": AdapterReward(models)})
        self.rows, self.texts, self.gold = rows if rows is not None else [{}] * len(prompts), texts, gold
        self.models, self.prompts, self.tokenizer = models, prompts, tokenizer
        self.config, self.tracker, self.folder, self.timer = config, tracker, folder, timer
        self.sampling = sampling_options(config, tokenizer)
        self.penalties = penalties(config)
        self.policy_parameters = list(models.trainable("policy").values())
        self.value_parameters = list(models.trainable("value").values())
        value_lr = config.value_learning_rate if config.value_learning_rate is not None else config.learning_rate
        groups: list[dict[str, Any]] = [
            {"params": self.policy_parameters},
            {"params": self.value_parameters, "lr": value_lr},
        ]
        self.optimizer = optim.build_optimizer(groups, config)
        updates = config.num_updates * config.num_ppo_epochs * (config.rollout_batch_size // config.minibatch_size)
        self.scheduler = optim.build_scheduler(self.optimizer, config, updates)
        self.learning_rates = list(self.scheduler.base_lrs)
        self.updates_done = 0
        self.kl_coef = config.kl_coef
        self.learning_rate_scale, self.roll_backs = 1.0, 0
        self.average: dict[str, Tensor] = {}  # of the policy's weights, when there is an ema_decay
        if config.ema_decay is not None:
            self.average = {n: p.detach().clone() for n, p in models.trainable("policy").items()}
        self.doctor = LiveDoctor("ppo", config.doctor, tracker, dataclasses.asdict(config))

    def train(self) -> None:
        """Runs the updates that are left, with checkpoints; Ctrl-C finishes the running update and saves first."""
        c = self.config
        with StopRequest() as stop, Progress(c.num_updates - self.updates_done, "ppo") as bar:
            if (c.max_kl is not None or self.doctor.may_roll_back) and self.updates_done == 0:
                self.save()  # a state to go back to
            while self.updates_done < c.num_updates:
                try:
                    metrics = self.step()
                    self.doctor.examine(self.updates_done, metrics)
                except RollBack as order:
                    bar.update(self.go_back(order))
                    continue
                except DoctorStop:
                    self.save()
                    raise
                except RewardError:  # comes before anything has changed
                    self.save()
                    raise
                bar.update(
                    1, score=metrics["objective/score"], kl=metrics["objective/kl"], length=metrics["response/length"]
                )
                if c.snapshot_steps and (
                    self.updates_done % c.snapshot_steps == 0 or self.updates_done == c.num_updates
                ):
                    self.snapshot()
                stopping = distributed.any_true(stop.requested, self.models.compute.device)
                if stopping or self.updates_done % c.save_steps == 0 or self.updates_done == c.num_updates:
                    self.save()
                if stopping:
                    stop.raise_if_requested()

    def step(self) -> dict[str, float]:
        """One rollout and the optimiser updates made from it."""
        c = self.config
        rollout, metrics = self.collect()
        if c.max_kl is not None and metrics["objective/kl_full"] > c.max_kl:
            raise KLLimitPassed(
                f"the KL to the reference is {metrics['objective/kl_full']:.3g} nats a response after update "
                f"{self.updates_done}, above max_kl {c.max_kl}"
            )
        rewards = F.token_rewards(
            rollout.scores, rollout.logprobs, rollout.ref_logprobs, rollout.mask, kl_coef=self.kl_coef
        )
        if c.whiten_rewards:
            rewards = F.whiten_rewards(rewards, rollout.mask)
        advantages, returns = F.gae(rollout.values, rewards, rollout.mask, gamma=c.gamma, lam=c.lam)
        whitened = F.whiten(advantages, rollout.mask)
        metrics |= credit_metrics(rollout, returns, advantages, whitened)
        with self.timer.phase("optimise"):
            started = time.perf_counter()
            metrics |= self.optimise(rollout, whitened, returns)
            metrics["time/optimise"] = time.perf_counter() - started
        if c.kl_target is not None:
            self.kl_coef = F.adapted_kl_coef(
                self.kl_coef, metrics["objective/kl"], target=c.kl_target, horizon=c.kl_horizon, episodes=len(rollout)
            )
        self.updates_done += 1
        self.log(rollout, metrics)
        return metrics

    def go_back(self, order: RollBack) -> int:
        """Returns to the last good checkpoint with the order's remedy; by how many updates (a negative number).

        Raises:
            UserError: the run may not go back (`on_max_kl` is stop), or going back has not helped.
        """
        c, reached = self.config, self.updates_done
        # The newest checkpoint may be of the very weights that passed the limit.
        good = checkpoint.last_before(self.folder, reached)
        refused = isinstance(order, KLLimitPassed) and c.on_max_kl == "stop"
        if refused or self.roll_backs == MAX_ROLL_BACKS or good is None:
            raise UserError(
                f"{order}; the last good checkpoint is {good}: raise kl_coef (now {self.kl_coef:.2g}) or lower learning_rate "
                f"(now {c.learning_rate * self.learning_rate_scale:.2g}) and start anew"
            )
        scale, count = self.learning_rate_scale, self.roll_backs + 1
        self._load(good)
        self.roll_backs = count
        self.kl_coef *= 2 if order.remedy == "kl_coef" else 1
        self._scale_learning_rate(scale / 2 if order.remedy == "learning_rate" else scale)
        if distributed.rank() == 0:
            checkpoint.discard_after(self.folder, self.updates_done)
        self.save()  # so that a resumed run goes on with the remedy
        remedy = f"kl_coef {self.kl_coef:.2g}" if order.remedy == "kl_coef" else "step size halved"
        print(f"{order}: back to update {self.updates_done}, {remedy}", flush=True)
        return self.updates_done - reached

    def _scale_learning_rate(self, scale: float) -> None:
        """Makes all step sizes, now and to come, this multiple of the configured ones."""
        self.learning_rate_scale = scale
        schedule: Any = self.scheduler
        schedule.base_lrs = [lr * scale for lr in self.learning_rates]
        for group, lr, course in zip(self.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = lr * course(schedule.last_epoch)

    def collect(self) -> tuple[Rollout, dict[str, float]]:
        """Samples a batch of responses and everything that is computed on them once."""
        c = self.config
        with self.timer.phase("rollout"):
            started = time.perf_counter()
            chosen = self.prompt_rows(self.updates_done)
            prompts = [self.prompts[i] for i in chosen]
            sequences, sampled = respond(
                self.models, prompts, self.sampling, reference=False, seed=self._seed(self.updates_done, stream=1)
            )
            sampling_seconds = time.perf_counter() - started
        with self.timer.phase("score"):
            started = time.perf_counter()
            batches = [rows for _, parts in self.minibatches(sequences.lengths, epoch=0) for rows in parts]
            texts = self._texts(sequences)
            # Responses to one prompt are neighbours; scored together, their prompt is computed once.
            numbers = torch.arange(len(chosen), device=sequences.mask.device) // c.num_responses_per_prompt
            scored = (
                batches
                if c.num_responses_per_prompt == 1
                else prompt_batches(numbers, c.microbatch_size, sequences.lengths, c.microbatch_tokens)
            )
            scores, parts_of_score = self.reward(
                Responses(sequences=sequences, batches=scored, texts=texts, rows=[self.rows[i] for i in chosen])
            )
            rollout = evaluate_sequences(
                self.models,
                sequences,
                sampled,
                scores,
                temperature=c.temperature,
                batches=batches,
                penalties=self.penalties,
            )
        metrics = {"time/rollout": sampling_seconds, "time/score": time.perf_counter() - started}
        if len(parts_of_score) > 1:
            metrics |= {f"objective/score/{name}": float(part.mean()) for name, part in parts_of_score.items()}
        if self.gold is not None:
            metrics |= judge_metrics(rollout, self.gold(texts))
        return rollout, metrics | rollout_metrics(
            rollout, self.kl_coef, sampling_seconds, texts, self.sampling.pad_token_id
        )

    def prompt_rows(self, update: int) -> list[int]:
        """Rows of the prompts of one rollout, each as often as it gets responses."""
        repeats = self.config.num_responses_per_prompt
        count = self.config.rollout_batch_size // repeats
        rows = self._stream(len(self.prompts), update * count, count, stream=0)
        return [row for row in rows for _ in range(repeats)]

    def _stream(self, size: int, first: int, count: int, *, stream: int) -> list[int]:
        """Rows first .. first + count - 1 of an endless walk over `size` rows: each pass is a fresh permutation of the seed."""
        passes = {
            number: torch.randperm(
                size, generator=torch.Generator().manual_seed(self._seed(number, stream=stream))
            ).tolist()
            for number in range(first // size, (first + count - 1) // size + 1)
        }
        return [passes[at // size][at % size] for at in range(first, first + count)]

    def optimise(self, rollout: Rollout, advantages: Tensor, returns: Tensor) -> dict[str, float]:
        """Epochs x minibatches of clipped policy and value updates; returns token-weighted figures."""
        c = self.config
        totals = Totals()
        self.models.train(
            c.gradient_checkpointing
        )  # where layers recompute their activations; dropout is off in any mode
        for epoch in range(c.num_ppo_epochs):
            for minibatch, microbatches in self.minibatches(rollout.lengths, epoch):
                if not totals.early_stop:
                    tokens = int(rollout.mask[minibatch].sum())
                    approx_kl = self.accumulate(rollout, advantages, returns, microbatches, tokens, totals)
                    approx_kl = float(distributed.total(torch.tensor(approx_kl)))
                    totals.early_stop = c.max_approx_kl is not None and approx_kl > c.max_approx_kl
                if not totals.early_stop:
                    if c.ptx_coef > 0 and self.updates_done >= c.value_warmup_updates:
                        self._text_backward(totals)
                    self._update(totals)
                self.optimizer.zero_grad(set_to_none=True)
                self.scheduler.step()  # also where updates are left out: the schedule keeps pace with the rollouts
        self.models.eval()
        totals.add_up()
        policy, value = self.optimizer.param_groups
        return totals.figures() | {
            "ppo/lr": policy["lr"],
            "ppo/value_lr": value["lr"],
            "ppo/roll_backs": self.roll_backs,
        }

    def minibatches(self, lengths: Tensor, epoch: int) -> list[tuple[Tensor, list[Tensor]]]:
        """The rows of each minibatch of an epoch, and of its microbatches, similar lengths together.

        Old log-probabilities are computed in the first epoch's microbatches, so that the first ratios are 1 to the last bit:
        in bf16 other neighbours would round differently.
        """
        generator = torch.Generator().manual_seed(self._seed(self.updates_done, stream=2) + 500_000 * epoch)
        order = torch.randperm(len(lengths), generator=generator).to(lengths.device)
        c = self.config
        return [
            (
                rows,
                [rows[part] for part in length_sorted_batches(lengths[rows], c.microbatch_size, c.microbatch_tokens)],
            )
            for rows in order.split(c.minibatch_size)
        ]

    def accumulate(
        self,
        rollout: Rollout,
        advantages: Tensor,
        returns: Tensor,
        microbatches: list[Tensor],
        tokens: int,
        totals: Totals,
    ) -> float:
        """Gradients of one minibatch; returns its approx_kl. Divided by its real tokens, so every split into microbatches
        gives the same gradient."""
        c, first, kl = self.config, totals.steps == 0, 0.0
        for rows in distributed.share(microbatches):
            batch = rollout.select(rows)
            if self.models.shared_trunk:
                with self.models.training_as("policy"):
                    logprobs, values = forward.logprobs_and_values(self.models, batch, c.temperature)
                    loss, part = self._policy_loss(logprobs, batch, advantages[rows], totals, first=first)
                    ((loss + c.vf_coef * self._value_loss(values, batch, returns[rows], totals)) / tokens).backward()
                kl += part
                continue
            if self.updates_done >= c.value_warmup_updates:
                with self.models.training_as("policy"):
                    logprobs = forward.token_logprobs(self.models, "policy", batch, c.temperature)
                    loss, part = self._policy_loss(logprobs, batch, advantages[rows], totals, first=first)
                    (loss / tokens).backward()
                kl += part
                del logprobs, loss  # the policy's activations are gone before the value's are made
            with self.models.training_as("value"):
                values = forward.token_values(self.models, batch)
                (c.vf_coef * self._value_loss(values, batch, returns[rows], totals) / tokens).backward()
        if first and totals.first_ratio_error > RATIO_TOLERANCE[self.models.compute.dtype]:
            raise RuntimeError(
                f"the first probability ratio of a rollout is off 1 by {totals.first_ratio_error:.3g}: old log-probabilities "
                "were not made by the forward pass that is being trained"
            )
        return kl / tokens

    def _policy_loss(
        self, logprobs: Tensor, batch: Rollout, advantages: Tensor, totals: Totals, *, first: bool
    ) -> tuple[Tensor, float]:
        """The policy's loss of one microbatch, summed over its tokens, and the sum of their approx_kl."""
        advantages = advantages[:, : logprobs.shape[1]]
        loss, clipped = F.policy_loss(
            logprobs, batch.logprobs, advantages, batch.mask, clip_range=self.config.clip_range
        )
        return loss.sum(), totals.add_policy(loss, clipped, logprobs, batch, first=first)

    def _value_loss(self, values: Tensor, batch: Rollout, returns: Tensor, totals: Totals) -> Tensor:
        """The value loss of one microbatch, summed over its tokens."""
        returns = returns[:, : values.shape[1]]
        loss, clipped = F.value_loss(
            values, batch.values, returns, batch.mask, clip_range_value=self.config.clip_range_value
        )
        totals.add_value(loss, clipped, int(batch.mask.sum()))
        return loss.sum()

    def _text_backward(self, totals: Totals) -> None:
        """PPO-ptx: adds the gradient of ptx_coef * mean negative log-likelihood of the next texts (InstructGPT, eq. 2).

        The position in the stream is that of the optimiser update, so a resumed run reads on where it was.
        """
        c = self.config
        count = round(c.minibatch_size * c.ptx_ratio)
        rows = self._stream(len(self.texts), self.scheduler.last_epoch * count, count, stream=3)
        prompts, prompt_mask = pad([self.texts[i][0] for i in rows], self.sampling.pad_token_id, side="left")
        answers, mask = pad([self.texts[i][1] for i in rows], self.sampling.pad_token_id, side="right")
        texts = Sequences(prompts=prompts, prompt_mask=prompt_mask, responses=answers, mask=mask)
        texts = texts.to(self.models.compute.device)
        tokens = int(mask.sum())
        for part in distributed.share(length_sorted_batches(texts.lengths, c.microbatch_size, c.microbatch_tokens)):
            with self.models.training_as("policy"):
                nll = -forward.token_logprobs(self.models, "policy", texts.select(part), temperature=1.0).sum() / tokens
                (c.ptx_coef * nll).backward()
            totals.add_text(nll)

    def _update(self, totals: Totals) -> None:
        """Clips and applies the gradients. Policy and value are separate models, so each has its own norm."""
        distributed.add_up(cast(Tensor, p.grad) for p in self._gradients())
        norms = [
            float(torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm))
            for parameters in (self.policy_parameters, self.value_parameters)
        ]
        if not all(torch.isfinite(torch.tensor(norms))):
            raise UserError(
                f"the gradient is not finite at update {self.updates_done + 1}; the last checkpoint is intact: lower "
                "learning_rate or use --dtype float32, then --resume"
            )
        totals.add_step(*norms)
        self.optimizer.step()
        if self.config.ema_decay is not None:
            for name, parameter in self.models.trainable("policy").items():
                self.average[name].lerp_(parameter.detach(), 1 - self.config.ema_decay)

    def _gradients(self) -> Iterator[nn.Parameter]:
        """The parameters that are about to change. A process without a microbatch has no gradient yet: it adds zero."""
        trained = [*self.policy_parameters, *self.value_parameters]
        if self.updates_done < self.config.value_warmup_updates:
            trained = self.value_parameters
        for parameter in trained:
            if distributed.size() > 1 and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad is not None:
                yield parameter

    @contextlib.contextmanager
    def averaged_policy(self) -> Iterator[None]:
        """Inside, the policy has the running mean of its weights (`ema_decay`)."""
        kept = {name: parameter.data for name, parameter in self.models.trainable("policy").items()}
        try:
            for name, parameter in self.models.trainable("policy").items():
                parameter.data = self.average[name]
            yield
        finally:
            for name, parameter in self.models.trainable("policy").items():
                parameter.data = kept[name]

    def log(self, rollout: Rollout, metrics: dict[str, float]) -> None:
        """Metrics to the tracker, and the first few responses of the rollout to the sample table."""
        if self.updates_done % self.config.logging_steps == 0:
            self.tracker.log(
                {**metrics, "episodes": self.updates_done * self.config.rollout_batch_size}, self.updates_done
            )
            shown = range(min(self.config.num_logged_samples, len(rollout)))
            kl = ((rollout.logprobs - rollout.ref_logprobs) * rollout.mask).sum(dim=1)
            rows = [
                {
                    "step": self.updates_done,
                    "prompt": self.tokenizer.decode(
                        rollout.prompts[i][rollout.prompt_mask[i]], skip_special_tokens=True
                    ),
                    "response": decode_response(self.tokenizer, rollout.responses[i][rollout.mask[i]].tolist()),
                    "score": float(rollout.scores[i]),
                    "kl": float(kl[i]),
                }
                for i in shown
            ]
            self.tracker.log_samples(rows, self.updates_done)

    def save(self) -> Path:
        """A checkpoint from which `resume` goes on as if nothing had happened; process 0 writes it."""
        if distributed.rank() > 0:
            distributed.wait()
            return self.folder
        moments, rest = checkpoint.pack_optimizer(self.optimizer)
        weights: dict[str, Tensor] = {**self.models.trainable("policy"), **self.models.trainable("value")}
        path = checkpoint.save(
            self.folder,
            self.updates_done,
            {"weights": weights, "optimizer": moments, **({"average": self.average} if self.average else {})},
            {
                "optimizer": rest,
                "scheduler": self.scheduler.state_dict(),
                "kl_coef": self.kl_coef,
                "learning_rate_scale": self.learning_rate_scale,
                "roll_backs": self.roll_backs,
                "log": self.tracker.position(),
            },
        )
        distributed.wait()
        return path

    def snapshot(self) -> None:
        """The policy's adapter as it is now, kept for good; process 0 writes it."""
        if distributed.rank() == 0:
            checkpoint.save_snapshot(
                self.folder,
                self.updates_done,
                lambda folder: self.models.save_policy(folder, base_model=self.config.policy),
            )
        distributed.wait()

    def resume(self) -> int:
        """Loads the newest checkpoint, if there is one; returns the number of updates done."""
        path = checkpoint.latest(self.folder)
        if path is not None:
            self._load(path)
        else:
            self.tracker.rewind({})  # killed before its first checkpoint: all of it comes again
        return self.updates_done

    def _load(self, path: Path) -> None:
        tensors, state = checkpoint.load(path)
        for name, parameter in {**self.models.trainable("policy"), **self.models.trainable("value")}.items():
            parameter.data.copy_(tensors["weights"][name])
        for name, mean in self.average.items():
            mean.copy_(tensors["average"][name])
        checkpoint.unpack_optimizer(self.optimizer, tensors["optimizer"], state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.kl_coef, self.updates_done = state["kl_coef"], state["step"]
        self.learning_rate_scale, self.roll_backs = state["learning_rate_scale"], state["roll_backs"]
        self.tracker.rewind(state["log"])
        self.doctor.read_log()

    def _texts(self, rollout: Sequences) -> list[str]:
        return [
            decode_response(self.tokenizer, row[mask].tolist())
            for row, mask in zip(rollout.responses, rollout.mask, strict=True)
        ]

    def _seed(self, position: int, *, stream: int) -> int:
        """Every random draw is a function of seed, stream and position, so a resumed run needs no generator state."""
        return (self.config.seed * 4 + stream) * 1_000_003 + position


def sampling_options(config: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> SamplingOptions:
    """How this run samples."""
    return SamplingOptions(
        max_new_tokens=config.response_length,
        temperature=config.temperature,
        stop_token_ids=stop_token_ids(tokenizer),
        pad_token_id=int(tokenizer.pad_token_id),
        stop_strings=StopStringCriteria(tokenizer, config.stop_strings) if config.stop_strings else None,
        sampler=config.sampler,
        merge_adapter=config.merge_adapter,
    )


def penalties(config: PPOConfig) -> Penalties:
    """What this run takes off raw scores."""
    return Penalties(
        clip=config.reward_clip,
        missing_eos=config.missing_eos_penalty,
        min_length=config.min_response_length,
        short_response=config.short_response_penalty,
    )
