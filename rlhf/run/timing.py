"""Seconds and peak memory of the phases of a run."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil


class PhaseTimer:
    """Sum of seconds and peak memory by phase.

    ```
    with timer.phase("rollout"):
        ...
    timer.summary()  # [{"phase": "rollout", "seconds": 12.5, "peak_rss_gb": 1.9}]
    ```
    With a CUDA device there is `peak_cuda_gb` as well. GB are 10^9 bytes.
    """

    def __init__(self) -> None:
        self._phases: dict[str, dict[str, Any]] = {}
        self.failed: str | None = None
        """The last phase that raised an error."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to phase `name`, also when it fails."""
        start, memory_at_start = time.perf_counter(), _peak_memory()
        try:
            yield
        except BaseException:
            self.failed = name
            raise
        finally:
            row = self._phases.setdefault(name, {"phase": name, "seconds": 0.0})
            row["seconds"] += time.perf_counter() - start
            for key, (now, peak) in _peak_memory().items():
                # The system has only the peak since the process began. If it grew, it grew in this block; if not, the block
                # stayed below it, and the best estimate is the memory in use at its two ends.
                now_at_start, peak_at_start = memory_at_start.get(key, (0.0, 0.0))
                row[key] = max(row.get(key, 0.0), peak if peak > peak_at_start else max(now, now_at_start))

    def summary(self) -> list[dict[str, Any]]:
        """Return one row a phase, in the order in which they first ran."""
        return [
            {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
            for row in self._phases.values()
        ]


def _peak_memory() -> dict[str, tuple[float, float]]:
    """Return memory in GB by name: in use now, and the most since the process began."""
    now = psutil.Process().memory_info().rss / 1e9
    memory = {"peak_rss_gb": (now, max(now, peak_rss_gb()))}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        memory["peak_cuda_gb"] = (torch.cuda.memory_allocated() / 1e9, torch.cuda.max_memory_allocated() / 1e9)
    return memory


def peak_rss_gb() -> float:
    """Return the most memory that this process has held so far, in 10^9 bytes."""
    if sys.platform == "win32":
        return float(psutil.Process().memory_info().peak_wset) / 1e9
    import resource

    bytes_per_unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * bytes_per_unit / 1e9
