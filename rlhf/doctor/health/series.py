"""Series of figures that several health checks read."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

from rlhf.doctor.health.history import History


def _kl(h: History, last: int) -> list[float]:
    """The exact KL, nats a response; of older logs, the estimate with the least noise."""
    return h.values("objective/kl_full", last) or h.values("objective/kl_k3", last)


def _responses(h: History) -> float:
    """Responses of a rollout."""
    episodes, steps = h.values("episodes", 1), max(h.step, 1)
    return episodes[-1] / steps if episodes else float(h.settings.get("rollout_batch_size") or 1)


def _smooth(values: Sequence[float], width: int = 5) -> list[float]:
    """Running means."""
    return [statistics.fmean(values[i : i + width]) for i in range(len(values) - width + 1)]


def _noise(values: Sequence[float], width: int = 5) -> float:
    """Standard error of a running mean, from the differences of neighbours, which a trend hardly touches."""
    differences = [b - a for a, b in itertools.pairwise(values)]
    return statistics.pstdev(differences) / math.sqrt(2 * width)
