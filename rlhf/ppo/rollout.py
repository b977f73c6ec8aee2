"""Rollouts: prompts -> responses -> scores -> log-probabilities and values. No gradients here.

Legend: B responses, R padded response.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StopStringCriteria

from rlhf.base import distributed
from rlhf.base.functions import GoldFunction
from rlhf.config import PPOConfig
from rlhf.models.roles import RoleModels
from rlhf.models.sampling import Sampled, Sampler, sample
from rlhf.models.sequences import Sequences, pad, prompt_batches
from rlhf.models.tokenization import decode_response, stop_token_ids
from rlhf.ppo import draws, forward
from rlhf.ppo.metrics import judge_metrics, rollout_metrics
from rlhf.ppo.types import Rollout
from rlhf.reward.sources import Responses, Reward
from rlhf.run.timing import PhaseTimer


@dataclass(kw_only=True)
class Environment:
    """The prompts that a policy answers, and what scores its responses."""

    prompts: Sequence[Sequence[int]]
    """Token ids of the training prompts."""
    rows: Sequence[Mapping[str, Any]]
    """The data row of each prompt, for rewards that read more than its tokens."""
    reward: Reward
    gold: GoldFunction | None = None
    """An independent judge, which scores every rollout for the log; nothing is trained on it."""


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Options of sampling; the temperature divides the logits wherever log-probabilities are taken, too."""

    max_new_tokens: int
    temperature: float
    stop_token_ids: list[int]
    pad_token_id: int
    stop_strings: StopStringCriteria | None = None
    sampler: Sampler = "auto"
    merge_adapter: bool = True

    @classmethod
    def of(cls, config: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> SamplingOptions:
        """Return the options of a run."""
        return cls(
            max_new_tokens=config.response_length,
            temperature=config.temperature,
            stop_token_ids=stop_token_ids(tokenizer),
            pad_token_id=int(tokenizer.pad_token_id),
            stop_strings=StopStringCriteria(tokenizer, config.stop_strings) if config.stop_strings else None,
            sampler=config.sampler,
            merge_adapter=config.merge_adapter,
        )


@dataclass(frozen=True, kw_only=True)
class Penalties:
    """Deductions from a raw score, in units of the score; `clip` first limits the raw score to +- that."""

    clip: float | None = None
    missing_eos: float = 0.0
    min_length: int = 0
    short_response: float = 0.0

    @classmethod
    def of(cls, config: PPOConfig) -> Penalties:
        """Return the penalties of a run."""
        return cls(
            clip=config.reward_clip,
            missing_eos=config.missing_eos_penalty,
            min_length=config.min_response_length,
            short_response=config.short_response_penalty,
        )

    def apply(self, raw_scores: Tensor, stopped: Tensor, lengths: Tensor) -> Tensor:
        """Return scores (B,), less `missing_eos` without a stop token, and `short_response` a token below `min_length`."""
        if self.clip is not None:
            raw_scores = raw_scores.clamp(-self.clip, self.clip)
        missing_tokens = (self.min_length - lengths).clamp_min(0).to(raw_scores.dtype)
        return raw_scores - self.missing_eos * (~stopped).to(raw_scores.dtype) - self.short_response * missing_tokens


def collect(
    models: RoleModels,
    tokenizer: PreTrainedTokenizerBase,
    config: PPOConfig,
    environment: Environment,
    sampling: SamplingOptions,
    *,
    update: int,
    kl_coef: float,
    with_values: bool,
    timer: PhaseTimer,
) -> tuple[Rollout, dict[str, float]]:
    """Sample and score the rollout of an update; return it with its metrics.

    Args:
        update: number of the update, from 0; it decides the prompts and the random numbers.
        kl_coef: the penalty per nat, for the metrics.
        with_values: run the value model.
    """
    with timer.phase("rollout"):
        started = time.perf_counter()
        rows = draws.prompt_rows(config, len(environment.prompts), update)
        prompts = [environment.prompts[row] for row in rows]
        seed = draws.draw_seed(config.seed, update, stream=draws.RESPONSES)
        sequences, sampled = respond(models, prompts, sampling, reference=False, seed=seed)
        sampling_seconds = time.perf_counter() - started
    with timer.phase("score"):
        started = time.perf_counter()
        batches = [part for parts in draws.minibatches(config, sequences.lengths, update, epoch=0) for part in parts]
        texts = response_texts(tokenizer, sequences)
        scores, scores_by_source = environment.reward(
            Responses(
                sequences=sequences,
                batches=batches if config.num_responses_per_prompt == 1 else _prompt_batches(config, sequences),
                texts=texts,
                rows=[environment.rows[row] for row in rows],
            )
        )
        rollout = evaluate_sequences(
            models,
            sequences,
            sampled,
            scores,
            prompt=torch.tensor(rows, device=scores.device),
            temperature=config.temperature,
            batches=batches,
            penalties=Penalties.of(config),
            with_values=with_values,
        )
        if rollout.mask.is_cuda:  # whose passes may still be running
            torch.cuda.synchronize(rollout.mask.device)
    metrics = {"time/rollout": sampling_seconds, "time/score": time.perf_counter() - started}
    if len(scores_by_source) > 1:
        metrics |= {f"objective/score/{name}": float(part.mean()) for name, part in scores_by_source.items()}
    if environment.gold is not None:
        metrics |= judge_metrics(rollout, environment.gold(texts))
    return rollout, metrics | rollout_metrics(rollout, kl_coef, sampling_seconds, texts, sampling.pad_token_id)


def _prompt_batches(config: PPOConfig, sequences: Sequences) -> list[Tensor]:
    """Return row numbers in batches for the reward; responses to one prompt share a batch, and so its computation."""
    groups = torch.arange(len(sequences), device=sequences.mask.device) // config.num_responses_per_prompt
    return prompt_batches(groups, config.microbatch, sequences.lengths, config.microbatch_tokens)


def response_texts(tokenizer: PreTrainedTokenizerBase, sequences: Sequences) -> list[str]:
    """Return the texts of the responses, without special tokens."""
    responses = zip(sequences.responses, sequences.mask, strict=True)
    return [decode_response(tokenizer, response[mask].tolist()) for response, mask in responses]


def respond(
    models: RoleModels,
    prompts: Sequence[Sequence[int]],
    options: SamplingOptions,
    *,
    reference: bool,
    seed: int | Sequence[int],
) -> tuple[Sequences, Sampled]:
    """Sample one response to each prompt, from the policy or the reference; equal seeds give equal responses.

    Args:
        seed: several are for `SAMPLED_AT_ONCE` prompts each.
    """
    device = models.compute.device
    ids, mask = pad(prompts, options.pad_token_id, side="left")
    ids, mask = ids.to(device), mask.to(device)
    generators = [torch.Generator().manual_seed(one) for one in ([seed] if isinstance(seed, int) else seed)]
    own = torch.arange(distributed.rank(), len(prompts), distributed.size())
    drawn = own if len(own) else torch.zeros(1, dtype=torch.long)  # fewer prompts than processes: drawn and thrown away
    merged = options.merge_adapter and not reference
    source = models.merged_policy() if merged else models.role("reference" if reference else "policy")
    with source:
        sampled = sample(
            models.causal,
            ids[drawn],
            mask[drawn],
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            stop_token_ids=options.stop_token_ids,
            pad_token_id=options.pad_token_id,
            generator=generators,
            stop_strings=options.stop_strings,
            batch_slice=(len(prompts), drawn),
            sampler=options.sampler,
        )
    if distributed.size() > 1:
        sampled = _all_rows(sampled, own, len(prompts), options)
    return Sequences(prompts=ids, prompt_mask=mask, responses=sampled.responses, mask=sampled.mask), sampled


def _all_rows(part: Sampled, own: Tensor, count: int, options: SamplingOptions) -> Sampled:
    """Return the responses of all processes, in the order of the prompts."""

    def gather(x: Tensor) -> Tensor:
        whole = torch.zeros(count, options.max_new_tokens if x.dim() == 2 else 1, dtype=x.dtype, device=x.device)
        x = x if x.dim() == 2 else x[:, None]
        whole[own, : x.shape[1]] = x[: len(own)]
        return distributed.total(whole.long() if x.dtype == torch.bool else whole).to(x.dtype)

    mask = gather(part.mask)
    width = int(mask.sum(dim=1).max())
    responses = torch.where(mask, gather(part.responses), options.pad_token_id)
    return Sampled(
        responses=responses[:, :width],
        mask=mask[:, :width],
        logprobs=gather(part.logprobs)[:, :width],
        stopped=gather(part.stopped)[:, 0],
    )


@torch.no_grad()
def evaluate_sequences(
    models: RoleModels,
    sequences: Sequences,
    sampled: Sampled,
    raw_scores: Tensor,
    *,
    prompt: Tensor,
    temperature: float,
    batches: Sequence[Tensor],
    penalties: Penalties,
    with_values: bool = True,
) -> Rollout:
    """Return the rollout of scored sequences, with log-probabilities and values computed in these batches of rows."""
    parts = [(rows, sequences.select(rows)) for rows in distributed.share(batches)]
    for _, batch in parts:
        forward.prepare(models, batch)
    policy, reference, entropy, full_kl = _in_batches(
        lambda b: forward.compared_logprobs(models, b, temperature), sequences, parts, planes=4
    )
    values = torch.zeros_like(policy)
    if with_values:
        (values,) = _in_batches(lambda b: forward.token_values(models, b)[None], sequences, parts, planes=1)
    return Rollout(
        **{field.name: getattr(sequences, field.name) for field in dataclasses.fields(sequences)},
        prompt=prompt,
        stopped=sampled.stopped,
        sampler_logprobs=sampled.logprobs,
        logprobs=policy,
        ref_logprobs=reference,
        entropy=entropy,
        full_kl=full_kl,
        values=values,
        raw_scores=raw_scores,
        scores=penalties.apply(raw_scores, sampled.stopped, sequences.mask.sum(dim=1)),
    )


def _in_batches(
    compute: Callable[[Sequences], Tensor],
    sequences: Sequences,
    batches: Sequence[tuple[Tensor, Sequences]],
    *,
    planes: int,
) -> Tensor:
    """Compute (planes, B, R) over this process's batches, each with its row numbers; all processes add up theirs."""
    parts = [(rows, compute(batch)) for rows, batch in batches]
    dtype = parts[0][1].dtype if parts else torch.float32
    out = torch.zeros(planes, *sequences.mask.shape, dtype=dtype, device=sequences.mask.device)
    for rows, part in parts:
        out[:, rows, : part.shape[2]] = part
    return distributed.total(out)
