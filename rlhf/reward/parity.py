"""Comparison of a saved reward model with the trained one: its scores of texts together, alone and among padding."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from rlhf.base.errors import UserError
from rlhf.reward.scorer import Scorer

PARITY_TEXTS = 64
"""Held-out texts whose scores are compared."""
REBATCHED_TEXTS = 16
"""Those of them that are scored in other batches, too: four more times, and alone is slow."""
PADDINGS = ((0, 16), (9, 0), (5, 7))
"""Padding tokens left and right of the longest text."""
RELOADED = 1e-3
"""Largest `deviation` after loading: the model computes the same numbers in the same order."""
REORDERED = {torch.bfloat16: 0.05, torch.float32: 1e-3, torch.float64: 1e-5}
"""Largest `deviation` in other batches, by the model's type: sums in another order round differently."""
BY_BATCH = 0.25
"""Largest `deviation` in other batches that is put down to bf16; a mask or padding that is lost makes more."""
OUTLIER = 4.0
"""Factor by which a single score may be further off: rounding to bf16 has outliers in a sound model, too."""


def digests(model: nn.Module) -> dict[str, str]:
    """Return a hash of each tensor that is saved of a reward model: its adapter and head, or all of its weights."""
    whole = not isinstance(model, PeftModel)
    state = model.state_dict() if whole else get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: _digest(tensor.detach().cpu()) for name, tensor in state.items()}


def _digest(tensor: Tensor) -> str:
    exact = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).reshape(-1).contiguous()
    return hashlib.blake2b(exact.numpy().data, digest_size=16).hexdigest()


def require_same_tensors(trained: Mapping[str, str], saved: nn.Module) -> None:
    """Raise `UserError` where a tensor of the saved model is missing or has other values than in training.

    The strongest evidence of a loss: a barely trained model scores nearly the same without its adapter.

    Args:
        trained: `digests` of the model in memory.
    """
    loaded = digests(saved)
    if lost := [name for name, digest in trained.items() if loaded.get(name) != digest]:
        raise UserError(
            f"the saved reward model is not the trained one: {len(lost)} of {len(trained)} tensors differ, the first is "
            f"{lost[0]}; nothing was registered, please report this with the command and the model's name"
        )


def require_parity(trained: Tensor, saved: Scorer, rows: Sequence[Sequence[int]]) -> float:
    """Return the largest `deviation` of a saved model's scores from those of the model in memory.

    A score head that was not saved, an adapter saved under another name, a score read at a padding token, or one that
    depends on other rows of the batch: none shows in training, and all are off by about the spread of the scores here.
    In bf16 scores in other batches warn up to `BY_BATCH`, as rounding moves those of a barely trained head.

    Args:
        trained: (M,) raw scores of the model in memory.
        saved: the model that was loaded from the saved files.
        rows: M token rows.

    Raises:
        UserError: a score is not finite, or a difference is more than rounding can be.
    """
    if not bool(torch.isfinite(trained).all()):
        raise UserError("the reward model gives scores that are not finite; try a smaller learning_rate")
    scale = max(float(trained.double().square().mean().sqrt()), 1e-12)
    worst = 0.0
    others = scores_in_other_batches(saved, rows[:REBATCHED_TEXTS])
    for how, allowed, scores in [("together", RELOADED, saved.raw(rows)), *others]:
        expected = trained[: len(scores)]
        difference = deviation(scores, expected, scale)
        if difference > allowed:
            text = int((scores - expected).abs().nan_to_num(nan=torch.inf).argmax())
            if saved.compute.bf16 and how != "together" and difference <= BY_BATCH:
                print(
                    f"reward: text {text + 1} scores {float(scores[text]):.4g} {how} and {float(trained[text]):.4g} together: "
                    "so coarse is bf16 for this model; train longer, or compare with --dtype float32",
                    file=sys.stderr,
                    flush=True,
                )
                worst = max(worst, difference)
                continue
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
