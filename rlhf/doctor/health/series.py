"""Series of figures that several health checks read, and consequences that they share."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

from rlhf.doctor.health.history import History

#: Checks that see a policy which went too far from the SFT model, whatever drove it.
FAR_AWAY = (
    "stop_rate_falling", "entropy_collapse", "responses_alike", "repeated_text", "length_up", "length_down", "kl_high",
    "reward_saturated", "advantages_vanished",
)  # fmt: skip


def exact_kl(h: History, last: int) -> list[float]:
    """Return the last exact KLs, nats a response; logs of older versions hold an estimate only."""
    return h.values("objective/kl_full", last) or h.values("objective/kl_k3", last)


def rollout_size(h: History) -> float:
    """Return the responses of a rollout."""
    episodes = h.values("episodes", 1)
    return episodes[-1] / max(h.step, 1) if episodes else h.setting("rollout_batch_size", 1)


def noise(values: Sequence[float]) -> float:
    """Return the spread of single values, from the differences of neighbours, which a trend hardly touches."""
    return statistics.pstdev([b - a for a, b in itertools.pairwise(values)]) / math.sqrt(2)


def trend(values: Sequence[float]) -> tuple[float, float]:
    """Return the change from the first to the last value along the fitted line, and its standard error."""
    places = range(len(values))
    slope, start = statistics.linear_regression(places, values)
    rest = [value - start - slope * place for place, value in zip(places, values, strict=True)]
    spread = max(noise(values), math.sqrt(sum(r * r for r in rest) / (len(values) - 2)))
    reach = len(values) - 1
    return slope * reach, spread * reach / math.sqrt(len(values) * (len(values) ** 2 - 1) / 12)


def gradient_outlier(h: History, *, usual: float, largest: float, floor: float) -> str | None:
    """Return the evidence of a last gradient norm above the median, the largest (times factors) of 19 before, and a floor."""
    *earlier, norm = h.values(f"{h.stage}/grad_norm", 20)
    median = statistics.median(earlier)
    if norm <= max(usual * median, largest * max(earlier), floor):
        return None
    return f"gradient norm {norm:.3g}, usually {median:.3g}, {max(earlier):.3g} at most"
