"""Comparison of a saved reward model with the trained one: its scores of texts together, alone and among padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rlhf.base.errors import UserError
from rlhf.reward.scorer import Scorer

PARITY_TEXTS = 64
"""Held-out texts whose scores are compared."""
PADDINGS = ((0, 16), (9, 0), (5, 7))
"""Padding tokens left and right of the longest text."""
RELOADED = 1e-3
"""Largest `deviation` after loading: the model computes the same numbers in the same order."""
REORDERED = {torch.bfloat16: 0.05, torch.float32: 1e-3, torch.float64: 1e-5}
"""Largest `deviation` in other batches, by the model's type: sums in another order round differently."""
OUTLIER = 4.0
"""Factor by which a single score may be further off: rounding to bf16 has outliers in a sound model, too."""


def require_parity(trained: Tensor, saved: Scorer, rows: Sequence[Sequence[int]]) -> float:
    """Return the largest `deviation` of a saved model's scores from those of the model in memory.

    A score head that was not saved, an adapter saved under another name, a score read at a padding token, or one that
    depends on other rows of the batch: none shows in training, and all are off by about the spread of the scores here.

    Args:
        trained: (M,) raw scores of the model in memory.
        saved: the model that was loaded from the saved files.
        rows: M token rows.

    Raises:
        UserError: a score is not finite, or a difference is more than rounding.
    """
    if not bool(torch.isfinite(trained).all()):
        raise UserError("the reward model gives scores that are not finite; try a smaller learning_rate")
    scale = max(float(trained.double().square().mean().sqrt()), 1e-12)
    worst = 0.0
    for how, allowed, scores in [("together", RELOADED, saved.raw(rows)), *scores_in_other_batches(saved, rows)]:
        difference = deviation(scores, trained, scale)
        if difference > allowed:
            text = int((scores - trained).abs().nan_to_num(nan=torch.inf).argmax())
            raise UserError(
                f"the saved reward model is not the trained one: text {text + 1} of {len(rows)}, scored {how}, gets "
                f"{float(scores[text]):.4g} from the saved files and {float(trained[text]):.4g} in memory; nothing was "
                "registered, please report this with the command and the model's name"
            )
        worst = max(worst, difference)
    return worst


def deviation(scores: Tensor, expected: Tensor, scale: float) -> float:
    """Return the root mean square difference of scores (M,), or the largest over `OUTLIER` if more, as a share of `scale`.

    A score that is NaN is infinitely far off.
    """
    difference = (scores - expected).abs().nan_to_num(nan=torch.inf).double()
    return max(float(difference.square().mean().sqrt()), float(difference.max()) / OUTLIER) / scale


def scores_in_other_batches(scorer: Scorer, rows: Sequence[Sequence[int]]) -> Iterator[tuple[str, float, Tensor]]:
    """Yield (description, largest `deviation`, raw scores (M,)) of rows alone and among padding."""
    allowed = REORDERED[scorer.compute.dtype]
    yield "alone", allowed, torch.cat([scorer.raw([row]) for row in rows])
    for left, right in PADDINGS:
        how = f"with {left} padding tokens before and {right} after"
        yield how, allowed, scorer.raw_padded(rows, left, right)
