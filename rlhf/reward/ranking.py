"""K-wise ranking: all pairs of a prompt in one batch element, one forward pass a response (InstructGPT, section 3.5, eq. 1).

Legend: M responses in the batch, of all prompts together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from trl import RewardTrainer

from rlhf.data_prep.ratings import is_clear
from rlhf.models.classifiers import last_scores
from rlhf.models.sequences import pad, prompt_batches
from rlhf.run.resumable import ResumableTrainer


@dataclass(frozen=True)
class Pairs:
    """The ordered pairs of a batch."""

    better: Tensor
    """(n,) int64: rows of the responses with the higher rating."""
    worse: Tensor
    """(n,) int64: rows of the other responses."""
    weight: Tensor
    """(n,) 1 / C(K, 2) of the pair's prompt, so that all prompts weigh the same; times the confidence in the pair, if known."""
    difference: Tensor
    """(n,) above 0: difference of the two ratings."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Terms of the ranking loss besides the order of scores; the defaults have none (InstructGPT)."""

    min_difference: float = 0.0
    """Pairs whose ratings differ by less are ties."""
    margin_per_rating: float = 0.0
    """Scores have to differ by this for each unit of the ratings (Touvron et al. 2023, Llama 2, equation 2)."""
    label_smoothing: float = 0.0
    """Share of pairs that are assumed to be labelled the wrong way round."""
    center_rewards_coefficient: float = 0.0
    """Weight of (sum of a pair's scores)^2, which fixes the zero that differences leave open (Eisenstein et al. 2023)."""


def ordered_pairs(
    ratings: Tensor, prompt: Tensor, *, min_difference: float = 0.0, confidence: Tensor | None = None
) -> Pairs:
    """Return all pairs of one prompt whose ratings differ by at least `min_difference`; equal ratings form no pair.

    Args:
        ratings: (M,) higher is better.
        prompt: (M,) int64, number of each response's prompt.
        confidence: (M, M) in [0, 1] that the row's response is better than the column's; None: 1.
    """
    gap = ratings[:, None] - ratings[None, :]
    same = prompt[:, None] == prompt[None, :]
    better, worse = (same & is_clear(gap, min_difference)).nonzero(as_tuple=True)
    count = same.sum(dim=1).to(torch.float32)
    weight = (2.0 / (count * (count - 1)).clamp_min(1.0))[better]
    if confidence is not None:
        weight = weight * confidence[better, worse]
    return Pairs(better, worse, weight, gap[better, worse].float())


def agreement(ratings: Sequence[Sequence[float]]) -> Tensor:
    """Return (K, K) in [0, 1]: 1 where all raters prefer the row's response to the column's, 0 where at most half do.

    It is 2 P(i above j) - 1 over all pairs of one rating of each, ties counted half: the common-language effect size
    (McGraw & Wong 1992) on a scale from a coin to certainty.

    Args:
        ratings: a list of ratings for each of K responses; they may have different raters.
    """
    values = [torch.tensor(list(inner), dtype=torch.float32) for inner in ratings]
    rows = [torch.stack([torch.sign(i[:, None] - j[None, :]).mean() for j in values]) for i in values]
    return torch.stack(rows).clamp_min(0.0)


def ranking_loss(scores: Tensor, pairs: Pairs, num_prompts: int, objective: Objective | None = None) -> Tensor:
    """Return the mean over prompts of 1/C(K,2) * sum over its pairs of -log sigmoid(score of the better - score of the worse).

    With an objective, d is that difference less the margin, and a pair costs
    -(1 - e) log sigmoid(d) - e log sigmoid(-d) + c (sum of its two scores)^2, e the smoothing and c the centring.

    Args:
        scores: (M,) fp32 scores.
        num_prompts: prompts in the batch, including those without pairs.
    """
    objective = objective or Objective()
    better, worse = scores.float()[pairs.better], scores.float()[pairs.worse]
    margin = better - worse - objective.margin_per_rating * pairs.difference
    wrong = objective.label_smoothing
    loss = -(1 - wrong) * F.logsigmoid(margin) - wrong * F.logsigmoid(-margin)
    loss = loss + objective.center_rewards_coefficient * (better + worse).square()
    return (pairs.weight * loss).sum() / num_prompts


class RankingCollator:
    """Flattens rows with K responses each into one batch.

    Rows hold `input_ids`, a list of K token lists (prompt and response), and `ratings`, K numbers; with
    `weight_by_agreement` also `rater_ratings`, K lists of the single raters' numbers.
    """

    def __init__(self, pad_token_id: int, *, weight_by_agreement: bool = False) -> None:
        self.pad_token_id, self.weight_by_agreement = pad_token_id, weight_by_agreement

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids, mask = pad([tokens for row in rows for tokens in row["input_ids"]], self.pad_token_id, side="right")
        prompt = [i for i, row in enumerate(rows) for _ in row["input_ids"]]
        batch = {
            "input_ids": ids,
            "attention_mask": mask,
            "prompt": torch.tensor(prompt),
            # In fp32, differences of ratings on a scale to 100 would be off by more than `is_clear` takes for rounding.
            "ratings": torch.tensor([r for row in rows for r in row["ratings"]], dtype=torch.float64),
        }
        if self.weight_by_agreement:
            batch["confidence"] = torch.block_diag(*(agreement(row["rater_ratings"]) for row in rows))
        return batch


def score_rows(model: torch.nn.Module, input_ids: Tensor, attention_mask: Tensor, batches: Sequence[Tensor]) -> Tensor:
    """Return raw scores (M,) fp32 of right-padded rows, with one forward pass for each batch of row numbers."""
    parts = []
    lengths = attention_mask.sum(dim=1)
    for rows in batches:
        width = int(lengths[rows].max())
        parts.append(last_scores(model, input_ids[rows, :width], attention_mask[rows, :width].long()))
    return torch.cat(parts)[torch.argsort(torch.cat(list(batches)))]


class RankingTrainer(ResumableTrainer, RewardTrainer):
    """`trl.RewardTrainer` with rankings as data and the ranking loss."""

    def __init__(self, *args: Any, objective: Objective, forward_batch_size: int, **kwargs: Any) -> None:
        self.objective: Objective = objective
        self.forward_batch_size: int = forward_batch_size
        super().__init__(*args, **kwargs)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset  # tokenised by rlhf.models.tokenization already

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the ranking loss of a batch from `RankingCollator`."""
        batches = prompt_batches(inputs["prompt"], self.forward_batch_size)
        scores = score_rows(model, inputs["input_ids"], inputs["attention_mask"], batches)
        pairs = ordered_pairs(
            inputs["ratings"],
            inputs["prompt"],
            min_difference=self.objective.min_difference,
            confidence=inputs.get("confidence"),
        )
        loss = ranking_loss(scores, pairs, int(inputs["prompt"].max()) + 1, self.objective)
        self._record("train" if model.training else "eval", scores.detach(), pairs)
        return (loss, {"scores": scores}) if return_outputs else loss

    def _record(self, mode: str, scores: Tensor, pairs: Pairs) -> None:
        metrics = self._metrics[mode]
        margins = scores[pairs.better] - scores[pairs.worse]
        if len(margins):
            metrics["accuracy"].append(self.accelerator.gather_for_metrics((margins > 0).float().mean()).mean().item())
            metrics["margin"].append(self.accelerator.gather_for_metrics(margins.mean()).mean().item())
