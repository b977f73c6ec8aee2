"""A PPO run opened for experiments: its trainer with the weights of its last checkpoint, in memory only.

Nothing is written into the run's checkpoints or the registry, and all random numbers are seeded.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from rlhf.base.errors import UserError
from rlhf.base.intervals import Array
from rlhf.base.json_files import read_object
from rlhf.config import PPOConfig, TrainingConfig, is_registered_reward
from rlhf.evaluation.policy import PolicyEvaluation, evaluate_policy
from rlhf.models.compute import Compute
from rlhf.models.sequences import Sequences, length_sorted_batches, pad
from rlhf.models.tokenization import encode_prompt, encode_response
from rlhf.ppo import draws, forward
from rlhf.ppo.credit import Credit
from rlhf.ppo.rollout import Environment, Penalties
from rlhf.ppo.state import Outputs
from rlhf.ppo.trainer import PPOTrainer
from rlhf.ppo.types import Rollout
from rlhf.registry import Artifact, Registry
from rlhf.reward.functions import load_gold
from rlhf.reward.sources import Responses
from rlhf.run import checkpoint
from rlhf.run.timing import PhaseTimer
from rlhf.run.tracker import RUN_FILE
from rlhf.stages import ppo as stage
from rlhf.stages.data import describe_data, load_splits, writable_sets

#: Prompts that are answered, answers of each model to each, and prompts from which on intervals draw prompts, not answers.
PROMPTS, SAMPLES, FEW_PROMPTS = 24, 4, 8
ConfigT = TypeVar("ConfigT", bound=TrainingConfig)


def recorded_config(folder: Path, kind: type[ConfigT], registry: str | None) -> tuple[ConfigT, list[Artifact]]:
    """Return the options of the run in a stage's folder, and the artefacts that it started from.

    Raises:
        UserError: the run left no record, or one of another version.
    """
    try:
        record = read_object(folder / RUN_FILE)
    except OSError as error:
        raise UserError(
            f"{folder} has no {RUN_FILE}, so its options are not known; give the folder of a run"
        ) from error
    options, inputs = dict(record["config"]), list(record["inputs"])
    if unknown := sorted(set(options) - {field.name for field in dataclasses.fields(kind)}):
        raise UserError(f"{folder} was made by another version of rlhf: no option {', '.join(unknown)}")
    options |= {"registry": registry or options["registry"], "trackers": ["none"], "resume": False}
    config = kind(**options)
    store = Registry(config.registry)
    return config, [store.get(reference) for reference in inputs]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The effect of one update of a copy of the weights on the rollout that it was made from."""

    change: Tensor
    """(B, R) new less old log-probabilities of the sampled tokens, nats."""
    values: Tensor
    """(B, R) values after the update."""
    metrics: Mapping[str, float]
    """As the trainer logs them."""


class _NoLog:
    """Takes the place of a run's tracker, whose files stay as they are."""

    def rewind(self, position: Mapping[str, int]) -> None:
        """Leave the logs as they are."""


class PPOSubject:
    """A PPO run under experiment."""

    def __init__(self, folder: Path, registry: str | None) -> None:
        config, parents = recorded_config(folder, PPOConfig, registry)
        self.policy = next(parent for parent in parents if parent.stage == "sft")
        self.rewards = [parent for parent in parents if parent.stage == "reward"]
        own = [self.rewards[0].reference if is_registered_reward(name) else name for name in config.reward]
        # Compiling would take longer than the few rollouts.
        sampler: Any = "loop" if config.sampler == "compiled" else config.sampler
        self.config = dataclasses.replace(config, policy=self.policy.reference, reward=own, sampler=sampler)
        self.tokenizer = stage.load_tokenizer(str(self.policy.path))
        sets = load_splits(config.dataset, "prompts")
        self.sets = writable_sets(sets, self.tokenizer, describe_data(sets))
        self.ids = {
            name: stage.encode_prompts(loaded, self.tokenizer, config.max_prompt_length)
            for name, loaded in self.sets.items()
        }
        models, reward = stage.build_models(self.config, Compute.choose(config), self.policy, self.rewards)
        self.models, self.reward = models, reward
        self.gold = load_gold(config.gold) if config.gold else None
        # Each trial trains the policy, and runs to its end.
        own_options = dataclasses.replace(
            self.config, value_warmup_updates=0, max_kl=None, max_approx_kl=None, ema_decay=None, ptx_coef=0.0,
            ptx_text=None, ptx_dataset=None,
        )  # fmt: skip
        self.trainer = PPOTrainer(
            models,
            self.tokenizer,
            own_options,
            Environment(prompts=self.ids["train"], rows=self.sets["train"].rows, reward=reward, gold=None),
            Outputs(tracker=cast(Any, _NoLog()), folder=folder / "checkpoints", timer=PhaseTimer()),
        )
        self.start_gap = self._gap_to_reference()
        state = self.trainer.state
        self._start = {name: p.detach().clone() for name, p in state.weights().items()}
        path = checkpoint.latest(folder / "checkpoints")
        if path is not None:
            state.load(path)
        self._end = {name: p.detach().clone() for name, p in state.weights().items()}
        self._rollouts: dict[bool, Rollout] = {}

    def __str__(self) -> str:
        c = self.config
        return (
            f"the weights before training and after update {self.updates} of {c.num_updates}, on rollouts of "
            f"{c.rollout_batch_size} responses and {SAMPLES} answers to each of {PROMPTS} held-out prompts at most"
        )

    @property
    def updates(self) -> int:
        """Updates that the examined weights have behind them."""
        return self.trainer.state.updates_done

    @torch.no_grad()
    def _gap_to_reference(self) -> float:
        """Return the largest difference of policy and reference before training, nats, on a few prompts as text."""
        prompts, mask = pad(
            [ids[:-1] or ids for ids in self.ids["train"][:4]], self.trainer.sampling.pad_token_id, side="left"
        )
        last = torch.tensor([[ids[-1]] for ids in self.ids["train"][:4]])
        batch = Sequences(
            prompts=prompts, prompt_mask=mask, responses=last, mask=torch.ones_like(last, dtype=torch.bool)
        ).to(self.models.compute.device)
        policy, reference, *_ = forward.compared_logprobs(self.models, batch, self.config.temperature)
        return float((policy - reference).abs().max())

    # Answers

    def evaluate(self, split: str, *, reference: bool) -> Answered:
        """Return scored answers of the policy or the SFT model to the first prompts of a split; few prompts get more each."""
        ids, rows = self.ids[split], self.sets[split].rows
        prompts = min(PROMPTS, len(ids))
        numbers = np.repeat(np.arange(prompts), SAMPLES * (PROMPTS // prompts))
        result = evaluate_policy(
            self.models,
            self.tokenizer,
            [ids[i] for i in numbers],
            [rows[int(i)] for i in numbers],
            self.trainer.sampling,
            self.reward,
            reference=reference,
            batch_size=self.config.microbatch,
            batch_tokens=self.config.microbatch_tokens,
            gold=self.gold,
            seed=self.config.seed + 11,
        )
        stopped = torch.tensor(result.answers.stopped)
        lengths = torch.from_numpy(result.answers.lengths)
        scores = Penalties.of(self.config).apply(result.scores, stopped, lengths)
        groups = numbers if prompts >= FEW_PROMPTS else np.arange(len(numbers))
        return Answered(groups, [rows[int(i)] for i in numbers], result, scores.double().numpy())

    @cached_property
    def sft(self) -> Answered:
        """Answers of the SFT model to held-out prompts."""
        return self.evaluate("validation", reference=True)

    @cached_property
    def tuned(self) -> Answered:
        """Answers of the policy to the same prompts, with the same random numbers."""
        return self.evaluate("validation", reference=False)

    def score(self, rows: Sequence[Mapping[str, Any]], texts: Sequence[str], *, finished: bool = True) -> Array:
        """Return the scores, less penalties, of texts as answers to the prompts of data rows.

        Args:
            finished: they end in the stop token.
        """
        answers = [
            encode_response(self.tokenizer, row["prompt"], [{"role": "assistant", "content": text}])
            for row, text in zip(rows, texts, strict=True)
        ]
        if not finished:
            answers = [ids[:-1] or ids for ids in answers]
        pad_id, c = self.trainer.sampling.pad_token_id, self.config
        prompts, prompt_mask = pad([encode_prompt(self.tokenizer, row["prompt"]) for row in rows], pad_id, side="left")
        responses, mask = pad(answers, pad_id, side="right")
        sequences = Sequences(prompts=prompts, prompt_mask=prompt_mask, responses=responses, mask=mask).to(
            self.models.compute.device
        )
        batches = length_sorted_batches(sequences.lengths, c.microbatch, c.microbatch_tokens)
        raw, _ = self.reward(Responses(sequences=sequences, batches=batches, texts=list(texts), rows=list(rows)))
        stopped = torch.full((len(texts),), finished)
        return Penalties.of(c).apply(raw.cpu(), stopped, mask.sum(dim=1)).double().numpy()

    # Updates

    @contextlib.contextmanager
    def _weights(self, trained: bool) -> Iterator[None]:
        """Context in which the models have the weights of the checkpoint, or those before the first update."""
        state = self.trainer.state
        position = state.updates_done, state.kl_coef
        if not trained:
            self._put(self._start)
            state.updates_done, state.kl_coef = 0, self.config.kl_coef
        try:
            yield
        finally:
            self._put(self._end)
            state.updates_done, state.kl_coef = position

    @torch.no_grad()
    def _put(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self.trainer.state.weights().items():
            parameter.copy_(weights[name])

    def rollout(self, *, trained: bool) -> Rollout:
        """Return the next rollout of the checkpoint, or the run's first."""
        if trained not in self._rollouts:
            with self._weights(trained):
                self._rollouts[trained] = self.trainer.collect()[0]
        return self._rollouts[trained]

    @cached_property
    def first(self) -> Rollout:
        """The run's first rollout, made before anything can have gone wrong in training."""
        return self.rollout(trained=False)

    @cached_property
    def credit(self) -> Credit:
        """Its advantages and returns, as the trainer forms them."""
        return self.trainer.estimator(self.first, kl_coef=self.config.kl_coef)

    @cached_property
    def ordinary(self) -> Trial:
        """An update on it with the peak step size."""
        return self.attempt(self.first, self.credit)

    def attempt(self, rollout: Rollout, credit: Credit, *, rate: float = 1.0, trained: bool = False) -> Trial:
        """Make one update on a rollout with a fresh optimiser, measure it, and put the weights back.

        Args:
            rate: multiple of the peak step size.
            trained: start from the checkpoint, not from the weights before the first update.
        """
        trainer, state, temperature = self.trainer, self.trainer.state, self.config.temperature
        scheduler = state.scheduler
        state.optimizer.state.clear()
        for group, peak in zip(state.optimizer.param_groups, state.configured_rates, strict=True):
            group["lr"] = rate * peak
        with self._weights(trained):
            try:
                state.scheduler = cast(Any, SimpleNamespace(step=lambda: None, last_epoch=scheduler.last_epoch))
                metrics = trainer.optimise(rollout, credit)
                new = self._on(rollout, lambda batch: forward.token_logprobs(self.models, "policy", batch, temperature))
                values = self._on(rollout, lambda batch: forward.token_values(self.models, batch))
            finally:
                state.scheduler = scheduler
                state.optimizer.zero_grad(set_to_none=True)
        return Trial(change=(new - rollout.logprobs) * rollout.mask, values=values, metrics=metrics)

    @torch.no_grad()
    def _on(self, rollout: Rollout, compute: Callable[[Rollout], Tensor]) -> Tensor:
        """Return a figure (B, R) of the rollout's tokens, computed in the batches of the rollout: none differs by rounding."""
        result, state = torch.zeros_like(rollout.values), self.trainer.state
        minibatches = draws.minibatches(self.trainer.config, rollout.lengths, state.updates_done, epoch=0)
        for rows in (rows for microbatches in minibatches for rows in microbatches):
            batch = rollout.select(rows)
            forward.prepare(self.models, batch)
            part = compute(batch)
            result[rows, : part.shape[1]] = part.to(result.dtype)
        return result


@dataclass(frozen=True)
class Answered:
    """Scored answers of a model, several to each prompt."""

    groups: Array
    """(M,) int: what intervals draw: the prompts, or the single answers where there are few prompts."""
    rows: list[Mapping[str, Any]]
    """(M,) the data rows of the prompts."""
    evaluation: PolicyEvaluation
    scores: Array
    """(M,) scores less penalties, as PPO optimises them."""

    @property
    def texts(self) -> list[str]:
        """(M,) the answers."""
        return self.evaluation.answers.texts

    @property
    def gold(self) -> Array | None:
        """(M,) scores of the independent judge, if there is one."""
        return None if self.evaluation.gold is None else self.evaluation.gold.double().numpy()

    @property
    def lengths(self) -> Array:
        """(M,) tokens."""
        return self.evaluation.answers.lengths

    @property
    def stopped(self) -> Array:
        """(M,) 1 where the answer ended by itself."""
        return np.array(self.evaluation.answers.stopped, dtype=float)

    @property
    def kl(self) -> float:
        """Mean KL to the SFT model, nats a response."""
        return float(self.evaluation.kl.mean())
