"""prompts -> responses -> log-probabilities, values, scores -> Rollout. No gradients here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import StopStringCriteria

from rlhf.base import distributed
from rlhf.models.roles import RoleModels
from rlhf.models.sampling import Sampled, Sampler, sample
from rlhf.models.sequences import Sequences, pad
from rlhf.ppo import forward
from rlhf.ppo.types import Rollout


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How responses are drawn. The same temperature divides the logits wherever log-probabilities are taken."""

    max_new_tokens: int
    temperature: float
    stop_token_ids: list[int]
    pad_token_id: int
    stop_strings: StopStringCriteria | None = None
    sampler: Sampler = "auto"
    merge_adapter: bool = True


@dataclass(frozen=True, kw_only=True)
class Penalties:
    """What is taken off a raw score, in units of the score; `clip` holds the raw score within +- that first."""

    clip: float | None = None
    missing_eos: float = 0.0
    min_length: int = 0
    short_response: float = 0.0

    def apply(self, raw_scores: Tensor, stopped: Tensor, lengths: Tensor) -> Tensor:
        """Scores (B,) less `missing_eos` where no stop token came, and `short_response` a token below `min_length`."""
        if self.clip is not None:
            raw_scores = raw_scores.clamp(-self.clip, self.clip)
        missing_tokens = (self.min_length - lengths).clamp_min(0).to(raw_scores.dtype)
        return raw_scores - self.missing_eos * (~stopped).to(raw_scores.dtype) - self.short_response * missing_tokens


def respond(
    models: RoleModels, prompts: Sequence[Sequence[int]], options: SamplingOptions, *, reference: bool, seed: int
) -> tuple[Sequences, Sampled]:
    """One response to each prompt, from the policy or the reference. The same seed gives the same responses."""
    device = models.compute.device
    ids, mask = pad(prompts, options.pad_token_id, side="left")
    ids, mask = ids.to(device), mask.to(device)
    generator = torch.Generator().manual_seed(seed)
    own = torch.arange(distributed.rank(), len(prompts), distributed.size())
    merged = options.merge_adapter and not reference
    source = models.merged_policy() if merged else models.role("reference" if reference else "policy")
    with source:
        sampled = sample(
            models.causal,
            ids[own],
            mask[own],
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            stop_token_ids=options.stop_token_ids,
            pad_token_id=options.pad_token_id,
            generator=generator,
            stop_strings=options.stop_strings,
            batch_slice=(len(prompts), own),
            sampler=options.sampler,
        )
    if distributed.size() > 1:
        sampled = _all_rows(sampled, own, len(prompts), options)
    return Sequences(prompts=ids, prompt_mask=mask, responses=sampled.responses, mask=sampled.mask), sampled


def _all_rows(part: Sampled, own: Tensor, count: int, options: SamplingOptions) -> Sampled:
    """The responses of all processes, in the order of the prompts."""

    def gather(x: Tensor) -> Tensor:
        whole = torch.zeros(count, options.max_new_tokens if x.dim() == 2 else 1, dtype=x.dtype, device=x.device)
        x = x if x.dim() == 2 else x[:, None]
        whole[own, : x.shape[1]] = x
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
    temperature: float,
    batches: Sequence[Tensor],
    penalties: Penalties,
) -> Rollout:
    """Log-probabilities of policy and reference, and values, of scored sequences, in the given batches of rows."""
    policy, reference, entropy, full_kl = _in_batches(
        lambda b: forward.compared_logprobs(models, b, temperature), sequences, batches, planes=4
    )
    (values,) = _in_batches(lambda b: forward.token_values(models, b)[None], sequences, batches, planes=1)
    return Rollout(
        prompts=sequences.prompts,
        prompt_mask=sequences.prompt_mask,
        responses=sequences.responses,
        mask=sequences.mask,
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
    compute: Callable[[Sequences], Tensor], sequences: Sequences, batches: Sequence[Tensor], *, planes: int
) -> Tensor:
    """Runs a per-token computation batch by batch; results (planes, B, R) in the order of the rows.

    Each process takes a share of the batches.
    """
    parts = [(rows, compute(sequences.select(rows))) for rows in distributed.share(batches)]
    dtype = parts[0][1].dtype if parts else torch.float32
    out = torch.zeros(planes, *sequences.mask.shape, dtype=dtype, device=sequences.mask.device)
    for rows, part in parts:
        out[:, rows, : part.shape[2]] = part
    return distributed.total(out)
