"""Scoring with a finished reward model: token rows or texts in, normalised scores out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf.config import ComputeConfig
from rlhf.models.adapters import fast_adapters
from rlhf.models.classifiers import last_scores
from rlhf.models.compute import Compute
from rlhf.models.reward_model import load_reward_model
from rlhf.models.sequences import length_sorted_batches, pad, prompt_batches
from rlhf.models.tokenization import Message, encode_prompt, encode_response, load_tokenizer
from rlhf.registry import Artifact, Registry
from rlhf.reward.ranking import score_rows


class Scorer:
    """A reward model whose scores are normalised by the mean and spread in its manifest.

    Args:
        model: returns raw scores as the logits of token ids and a mask.
        batch_size: responses a forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        compute: Compute,
        batch_size: int,
        *,
        mean: float = 0.0,
        std: float = 1.0,
    ) -> None:
        self.model, self.tokenizer, self.compute, self.batch_size = model.eval(), tokenizer, compute, batch_size
        self.mean, self.std = mean, std

    def __call__(self, rows: Sequence[Sequence[int]], prompt: Tensor | None = None) -> Tensor:
        """Return normalised scores (M,), fp32, of token rows (prompt and response); 0 is the mean of the demonstrations.

        Args:
            prompt: (M,) int64, number of each row's prompt, rows of a prompt together; a shared prefix is computed once.
        """
        return (self.raw(rows, prompt) - self.mean) / self.std

    @torch.no_grad()
    def raw(self, rows: Sequence[Sequence[int]], prompt: Tensor | None = None) -> Tensor:
        """Return the model's own scores (M,); their differences are log-odds that one response is the better one."""
        with fast_adapters(self.model, self.compute), self.compute.autocast():
            return score_tokens(self.model, rows, int(self.tokenizer.pad_token_id), self.batch_size, prompt=prompt)

    @torch.no_grad()
    def raw_padded(self, rows: Sequence[Sequence[int]], left: int, right: int) -> Tensor:
        """Return raw scores (M,) of rows with `left` and `right` extra padding tokens, batched in the given order."""
        pad_id, parts = int(self.tokenizer.pad_token_id), []
        for first in range(0, len(rows), self.batch_size):
            ids, mask = pad(rows[first : first + self.batch_size], pad_id, side="right")
            ids = nn.functional.pad(ids, (left, right), value=pad_id).to(self.compute.device)
            attention = nn.functional.pad(mask, (left, right)).long().to(self.compute.device)
            positions = (attention.cumsum(dim=1) - 1).clamp_min(0)
            with fast_adapters(self.model, self.compute), self.compute.autocast():
                parts.append(last_scores(self.model, ids, attention, position_ids=positions).cpu())
        return torch.cat(parts)

    def encode(self, prompt: Sequence[Message], answer: str) -> list[int]:
        """Return the token row of a prompt and an answer to it."""
        response = [{"role": "assistant", "content": answer}]
        return encode_prompt(self.tokenizer, prompt) + encode_response(self.tokenizer, prompt, response)


def open_scorer(
    artifact: Artifact, registry: Registry, config: ComputeConfig, compute: Compute, batch_size: int
) -> Scorer:
    """Open a registered reward model; one that is an adapter is put on the SFT policy that it was trained on."""
    tokenizer = load_tokenizer(str(artifact.path))
    parent = next(p for p in artifact.manifest.parents if p.stage == "sft")
    policy = registry.get(parent.reference)
    model = load_reward_model(artifact.path, policy, config, compute, int(tokenizer.pad_token_id))
    mean, std = float(artifact.manifest.reward_mean or 0.0), float(artifact.manifest.reward_std or 1.0)
    return Scorer(model, tokenizer, compute, batch_size, mean=mean, std=std)


@torch.no_grad()
def score_tokens(
    model: nn.Module, rows: Sequence[Sequence[int]], pad_token_id: int, batch_size: int, *, prompt: Tensor | None = None
) -> Tensor:
    """Return raw scores (M,) of token rows (prompt and response).

    Args:
        prompt: (M,) int64, number of each row's prompt, if known: rows of one prompt then share a batch.
    """
    ids, mask = pad(rows, pad_token_id, side="right")
    device = next(model.parameters()).device
    batches = (
        length_sorted_batches(mask.sum(dim=1), batch_size) if prompt is None else prompt_batches(prompt, batch_size)
    )
    return score_rows(model, ids.to(device), mask.to(device), [rows.to(device) for rows in batches]).cpu()
