"""Shapes of PPO's data sheets and forward passes, checked by jaxtyping wherever a test, or the code under it, uses them.

Importing this module switches the checks on. The package says its shapes in docstrings: jaxtyping is for tests only, and a
plain install does not have it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from jaxtyping import Bool, Float, Int, jaxtyped
from torch import Tensor

from rlhf.models.sampling import Sampled
from rlhf.models.sequences import Sequences
from rlhf.ppo import forward
from rlhf.ppo.types import Rollout
from rlhf.reward import sources

ROW, FLAGS = Float[Tensor, "B"], Bool[Tensor, "B"]
GRID, MASK, TOKENS = Float[Tensor, "B R"], Bool[Tensor, "B R"], Int[Tensor, "B R"]

#: Fields of the data sheets; sizes of one letter agree within a sheet.
SEQUENCES = {"prompts": Int[Tensor, "B P"], "prompt_mask": Bool[Tensor, "B P"], "responses": TOKENS, "mask": MASK}
GRIDS = ("sampler_logprobs", "logprobs", "ref_logprobs", "entropy", "full_kl", "values")
SHEETS: dict[type, dict[str, Any]] = {
    Sequences: SEQUENCES,
    Rollout: {
        **SEQUENCES,
        "prompt": Int[Tensor, "B"],
        "stopped": FLAGS,
        **dict.fromkeys(GRIDS, GRID),
        "raw_scores": ROW,
        "scores": ROW,
    },
    Sampled: {"responses": TOKENS, "mask": MASK, "logprobs": GRID, "stopped": FLAGS},
}
#: Results of the forward passes on a batch of `Sequences`.
RESULTS = {
    "token_logprobs": [GRID],
    "logprobs_and_values": [GRID, GRID],
    "compared_logprobs": [Float[Tensor, "4 B R"]],
    "token_values": [GRID],
}


def check(name: str, value: Tensor, kind: Any) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {value.dtype} {tuple(value.shape)}, which is no {kind.__name__}")


def checked_sheet(init: Callable[..., None], fields: dict[str, Any]) -> Callable[..., None]:
    """The `__init__` of a data sheet, with its fields checked."""

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        with jaxtyped("context"):
            for name, kind in fields.items():
                check(f"{type(self).__name__}.{name}", getattr(self, name), kind)

    return checked


def checked_pass(function: Callable[..., Any], kinds: list[Any]) -> Callable[..., Any]:
    """A forward pass, with its results checked against the batch."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        with jaxtyped("context"):
            check("batch.mask", signature.bind(*args, **kwargs).arguments["batch"].mask, MASK)
            for part, kind in zip(result if isinstance(result, tuple) else [result], kinds, strict=True):
                check(f"the result of {function.__name__}", part, kind)
        return result

    return checked


for sheet, fields in SHEETS.items():
    sheet.__init__ = checked_sheet(sheet.__init__, fields)  # type: ignore[misc]
for name, kinds in RESULTS.items():
    setattr(forward, name, checked_pass(getattr(forward, name), kinds))
sources.sequence_scores = checked_pass(sources.sequence_scores, [ROW])
