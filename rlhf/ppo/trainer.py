"""The PPO loop: rollout -> token rewards -> advantages -> epochs x minibatches x microbatches -> log.

Conventions (score index, value index, masks, KL, whitening, loss denominator) are those of `rlhf.ppo.functional`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf import checkpoint, optim
from rlhf.config import PPOConfig
from rlhf.errors import UserError
from rlhf.evaluation.text import distinct_n
from rlhf.interrupt import StopRequest
from rlhf.models import SharedModels
from rlhf.ppo import forward
from rlhf.ppo import functional as F
from rlhf.ppo.rollout import Penalties, SamplingOptions, evaluate_sequences, respond
from rlhf.ppo.types import Rollout, length_sorted_batches
from rlhf.progress import Progress
from rlhf.tokenization import decode_response, stop_token_ids
from rlhf.tracking import PhaseTimer, Tracker

#: How far the first ratio of a rollout may be from 1: rounding of log-probabilities by the compute type.
RATIO_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1}


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
    """

    def __init__(
        self,
        models: SharedModels,
        prompts: Sequence[Sequence[int]],
        tokenizer: PreTrainedTokenizerBase,
        config: PPOConfig,
        tracker: Tracker,
        folder: Path,
        timer: PhaseTimer,
    ) -> None:
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
        self.updates_done = 0

    def train(self) -> None:
        """Runs the updates that are left, with checkpoints; Ctrl-C finishes the running update and saves first."""
        c = self.config
        with StopRequest() as stop, Progress(c.num_updates - self.updates_done, "ppo") as bar:
            while self.updates_done < c.num_updates:
                metrics = self.step()
                bar.update(
                    1, score=metrics["objective/score"], kl=metrics["objective/kl"], length=metrics["response/length"]
                )
                if stop.requested or self.updates_done % c.save_steps == 0 or self.updates_done == c.num_updates:
                    self.save()
                stop.raise_if_requested()

    def step(self) -> dict[str, float]:
        """One rollout and the optimiser updates made from it."""
        c = self.config
        rollout, metrics = self.collect()
        rewards = F.token_rewards(
            rollout.scores, rollout.logprobs, rollout.ref_logprobs, rollout.mask, kl_coef=c.kl_coef
        )
        advantages, returns = F.gae(rollout.values, rewards, rollout.mask, gamma=c.gamma, lam=c.lam)
        metrics["ppo/explained_variance"] = float(F.explained_variance(rollout.values, returns, rollout.mask))
        with self.timer.phase("optimise"):
            started = time.perf_counter()
            metrics |= self.optimise(rollout, F.whiten(advantages, rollout.mask), returns)
            metrics["time/optimise"] = time.perf_counter() - started
        self.updates_done += 1
        self.log(rollout, metrics)
        return metrics

    def collect(self) -> tuple[Rollout, dict[str, float]]:
        """Samples a batch of responses and everything that is computed on them once."""
        c = self.config
        with self.timer.phase("rollout"):
            started = time.perf_counter()
            prompts = [self.prompts[i] for i in self.prompt_rows(self.updates_done)]
            sequences, sampled = respond(
                self.models, prompts, self.sampling, reference=False, seed=self._seed(self.updates_done, stream=1)
            )
            sampling_seconds = time.perf_counter() - started
        with self.timer.phase("score"):
            started = time.perf_counter()
            rollout = evaluate_sequences(
                self.models,
                sequences,
                sampled,
                temperature=c.temperature,
                batches=[
                    rows for _, microbatches in self.minibatches(sequences.lengths, epoch=0) for rows in microbatches
                ],
                penalties=self.penalties,
            )
        metrics = {"time/rollout": sampling_seconds, "time/score": time.perf_counter() - started}
        return rollout, metrics | rollout_metrics(rollout, c.kl_coef, sampling_seconds, self._texts(rollout))

    def prompt_rows(self, update: int) -> list[int]:
        """Rows of the prompts of one rollout: every pass over the prompts is a fresh permutation, a function of the seed."""
        first = update * self.config.rollout_batch_size
        size = len(self.prompts)
        rows: list[int] = []
        for position in range(first, first + self.config.rollout_batch_size):
            generator = torch.Generator().manual_seed(self._seed(position // size, stream=0))
            rows.append(int(torch.randperm(size, generator=generator)[position % size]))
        return rows

    def optimise(self, rollout: Rollout, advantages: Tensor, returns: Tensor) -> dict[str, float]:
        """Epochs x minibatches of clipped policy and value updates; returns token-weighted figures."""
        c = self.config
        totals = _Totals()
        for epoch in range(c.num_ppo_epochs):
            for minibatch, microbatches in self.minibatches(rollout.lengths, epoch):
                tokens = int(rollout.mask[minibatch].sum())
                self._accumulate(rollout, advantages, returns, microbatches, tokens, totals)
                self._update(totals)
        return totals.figures() | {"ppo/lr": self.optimizer.param_groups[0]["lr"]}

    def minibatches(self, lengths: Tensor, epoch: int) -> list[tuple[Tensor, list[Tensor]]]:
        """The rows of each minibatch of an epoch, and of its microbatches, similar lengths together.

        Old log-probabilities are computed in the first epoch's microbatches, so that the first ratios are 1 to the last bit:
        in bf16 other neighbours would round differently.
        """
        generator = torch.Generator().manual_seed(self._seed(self.updates_done, stream=2) + 500_000 * epoch)
        order = torch.randperm(len(lengths), generator=generator).to(lengths.device)
        return [
            (rows, [rows[part] for part in length_sorted_batches(lengths[rows], self.config.microbatch_size)])
            for rows in order.split(self.config.minibatch_size)
        ]

    def _accumulate(
        self,
        rollout: Rollout,
        advantages: Tensor,
        returns: Tensor,
        microbatches: list[Tensor],
        tokens: int,
        totals: _Totals,
    ) -> None:
        """Gradients of one minibatch. Divided by its real tokens, so every split into microbatches gives the same gradient."""
        c, first = self.config, totals.steps == 0
        for rows in microbatches:
            batch = rollout.select(rows)
            width = batch.mask.shape[1]
            logprobs, _ = forward.token_logprobs(self.models, "policy", batch, c.temperature)
            loss, clipped = F.policy_loss(
                logprobs, batch.logprobs, advantages[rows, :width], batch.mask, clip_range=c.clip_range
            )
            (loss.sum() / tokens).backward()
            totals.add_policy(loss, clipped, logprobs, batch, first=first)
            # The policy's activations are gone before the value's are made.
            del logprobs, loss
            values = forward.token_values(self.models, batch)
            loss, clipped = F.value_loss(
                values, batch.values, returns[rows, :width], batch.mask, clip_range_value=c.clip_range_value
            )
            (c.vf_coef * loss.sum() / tokens).backward()
            totals.add_value(loss, clipped)
        if first and totals.first_ratio_error > RATIO_TOLERANCE[self.models.compute.dtype]:
            raise RuntimeError(
                f"the first probability ratio of a rollout is off 1 by {totals.first_ratio_error:.3g}: old log-probabilities "
                "were not made by the forward pass that is being trained"
            )

    def _update(self, totals: _Totals) -> None:
        """Clips and applies the gradients. Policy and value are separate models, so each has its own norm."""
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
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

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
        """A checkpoint from which `resume` goes on as if nothing had happened."""
        moments, rest = checkpoint.pack_optimizer(self.optimizer)
        weights: dict[str, Tensor] = {**self.models.trainable("policy"), **self.models.trainable("value")}
        return checkpoint.save(
            self.folder,
            self.updates_done,
            {"weights": weights, "optimizer": moments},
            {"optimizer": rest, "scheduler": self.scheduler.state_dict(), "recipe": self.config.recipe()},
        )

    def resume(self) -> int:
        """Loads the newest checkpoint, if there is one; returns the number of updates done."""
        path = checkpoint.latest(self.folder)
        if path is None:
            return 0
        tensors, state = checkpoint.load(path)
        if state["recipe"] != self.config.recipe():
            changed = sorted(k for k, v in self.config.recipe().items() if state["recipe"].get(k) != v)
            raise UserError(
                f"checkpoint {path} was made with other options ({', '.join(changed)}); use them, or another output_dir"
            )
        for name, parameter in {**self.models.trainable("policy"), **self.models.trainable("value")}.items():
            parameter.data.copy_(tensors["weights"][name])
        checkpoint.unpack_optimizer(self.optimizer, tensors["optimizer"], state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.updates_done = state["step"]
        self.tracker.truncate(self.updates_done)
        return self.updates_done

    def _texts(self, rollout: Rollout) -> list[str]:
        return [
            decode_response(self.tokenizer, row[mask].tolist())
            for row, mask in zip(rollout.responses, rollout.mask, strict=True)
        ]

    def _seed(self, position: int, *, stream: int) -> int:
        """Every random draw is a function of seed, stream and position, so a resumed run needs no generator state."""
        return (self.config.seed * 3 + stream) * 1_000_003 + position


class _Totals:
    """Sums over the microbatches of one rollout, divided once at the end."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = dict.fromkeys(
            (
                "ppo/policy_loss",
                "ppo/value_loss",
                "ppo/clipfrac",
                "ppo/value_clipfrac",
                "ppo/approx_kl",
                "ppo/ratio_mean",
            ),
            0.0,
        )
        self.tokens = 0
        self.steps = 0
        self.ratio_max = 0.0
        self.first_ratio_error = 0.0
        self.norms = (0.0, 0.0)

    def add_policy(self, loss: Tensor, clipped: Tensor, logprobs: Tensor, batch: Rollout, *, first: bool) -> None:
        new, old = logprobs.detach(), batch.logprobs
        ratio = torch.where(batch.mask, (new - old).exp(), 1.0)
        self.tokens += int(batch.mask.sum())
        self.sums["ppo/policy_loss"] += float(loss.detach().sum())
        self.sums["ppo/clipfrac"] += float(clipped.sum())
        self.sums["ppo/approx_kl"] += float(torch.where(batch.mask, F.kl_k3(old, new), 0.0).sum())
        self.sums["ppo/ratio_mean"] += float(torch.where(batch.mask, ratio, 0.0).sum())
        self.ratio_max = max(self.ratio_max, float(ratio.max()))
        if first:
            self.first_ratio_error = max(self.first_ratio_error, float((ratio - 1).abs().max()))

    def add_value(self, loss: Tensor, clipped: Tensor) -> None:
        self.sums["ppo/value_loss"] += float(loss.detach().sum())
        self.sums["ppo/value_clipfrac"] += float(clipped.sum())

    def add_step(self, policy_norm: float, value_norm: float) -> None:
        self.steps += 1
        self.norms = (max(self.norms[0], policy_norm), max(self.norms[1], value_norm))

    def figures(self) -> dict[str, float]:
        return {name: total / self.tokens for name, total in self.sums.items()} | {
            "ppo/ratio_max": self.ratio_max,
            "ppo/first_ratio_error": self.first_ratio_error,
            "ppo/grad_norm": self.norms[0],
            "ppo/value_grad_norm": self.norms[1],
        }


def sampling_options(config: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> SamplingOptions:
    """How this run samples."""
    return SamplingOptions(
        max_new_tokens=config.response_length,
        temperature=config.temperature,
        stop_token_ids=stop_token_ids(tokenizer),
        pad_token_id=int(tokenizer.pad_token_id),
    )


def penalties(config: PPOConfig) -> Penalties:
    """What this run takes off raw scores."""
    return Penalties(
        missing_eos=config.missing_eos_penalty,
        min_length=config.min_response_length,
        short_response=config.short_response_penalty,
    )


def rollout_metrics(rollout: Rollout, kl_coef: float, sampling_seconds: float, texts: list[str]) -> dict[str, float]:
    """Figures of a rollout before the update; KL in nats: summed over the response, mean over the batch."""
    kl = F.masked_sum(F.kl_k1(rollout.logprobs, rollout.ref_logprobs), rollout.mask, dim=1).mean()
    kl_k3 = F.masked_sum(F.kl_k3(rollout.logprobs, rollout.ref_logprobs), rollout.mask, dim=1).mean()
    tokens = int(rollout.mask.sum())
    gap = (rollout.sampler_logprobs - rollout.logprobs).abs()
    figures: dict[str, Any] = {
        "objective/score": rollout.scores.mean(),
        "objective/raw_score": rollout.raw_scores.mean(),
        "objective/score_std": rollout.raw_scores.std(correction=0),
        "objective/kl": kl,
        "objective/kl_k3": kl_k3,
        "objective/entropy": F.masked_mean(rollout.entropy, rollout.mask),
        "objective/rlhf_reward": rollout.scores.mean() - kl_coef * kl,
        "response/length": tokens / len(rollout),
        "response/stop_rate": rollout.stopped.float().mean(),
        "response/distinct_2": distinct_n(texts, 2),
        "rollout/tokens_per_second": tokens / sampling_seconds,
        "rollout/logprob_gap": F.masked_mean(gap, rollout.mask),
    }
    return {name: float(value) for name, value in figures.items()}
