"""Progress of a loop: a bar with the time left on a terminal, a plain line now and then in a log file.

While a live view of the run is open (`rlhf.run.terminal`), the bar is part of it. Everything goes to stderr, so that stdout
stays free for results. `bar.update(1, score=0.81, kl=3.2)` shows `ppo 12/24 50% score 0.81 kl 3.2 left 4:10`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, TypeVar

from rlhf.run import terminal

T = TypeVar("T")

_SILENT = os.environ.get("RANK", "0") != "0"
"""True in all processes of a run but the first."""
SECONDS_BETWEEN_LINES = 10.0
"""Off a terminal: a line at most this often, so that the log of a day's run stays readable."""


def progress(iterable: Iterable[T], description: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Yield the items of `iterable` and show the number done. `total` defaults to its length, if it has one."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with Progress(total, description, unit) as bar:
        for item in iterable:
            yield item
            bar.update()


class Progress:
    """A progress bar for loops that count in their own way or have figures to show.

    Args:
        total: number of units, or None where it is unknown.
        description: one or two words in front, e.g. `ppo`.
        unit: name of a unit, for the rate on a terminal (`3.1prompt/s`).
        leave: keep the finished bar on a terminal; plain lines always stay.
    """

    def __init__(self, total: int | None, description: str, unit: str = "it", leave: bool = True) -> None:
        self.total = total
        self.description = description
        self.done = 0
        self._figures: dict[str, float | str] = {}
        self._start = self._last_line = time.monotonic()
        self._bar = terminal.bar(total, description, leave)
        if self._bar is None and sys.stderr.isatty() and not _SILENT:
            self._bar = _terminal_bar(total, description, unit, leave)
        self._closed = _SILENT

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # GeneratorExit is a `break` in the caller's loop: it ends the work, but it is not a failure.
        self.close(failed=kind is not None and kind is not GeneratorExit)

    def update(self, n: int = 1, **figures: float | str) -> None:
        """Count `n` more units, and show the figures; the others keep their last value."""
        self.done += n
        self._figures.update(figures)
        if self._bar is not None:
            self._bar.set_postfix_str(_format_figures(self._figures), refresh=False)
            self._bar.update(n)
            if n == 0:  # tqdm redraws only when the count moves, and new figures are worth a redraw
                self._bar.refresh()
        elif not self._closed and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._print_line(self._time_left())

    def close(self, failed: bool = False) -> None:
        """End the bar, or print the last line; after a failure none, which would read as success."""
        if self._closed:
            return
        self._closed = True
        if self._bar is not None:
            self._bar.close()
        elif not failed:
            self._print_line(f"took {format_seconds(time.monotonic() - self._start)}")

    def _print_line(self, clock: str) -> None:
        self._last_line = time.monotonic()
        count = f"{self.done}/{self.total} {self.done / self.total:.0%}" if self.total else f"{self.done}"
        words = [self.description, count, _format_figures(self._figures), clock]
        print(" ".join(word for word in words if word), file=sys.stderr, flush=True)

    def _time_left(self) -> str:
        elapsed = time.monotonic() - self._start
        if not self.total or not self.done:
            return f"after {format_seconds(elapsed)}"
        return f"left {format_seconds(max(0.0, elapsed / self.done * (self.total - self.done)))}"


def format_seconds(seconds: float) -> str:
    """Return seconds as a clock: `4:10` for 250 seconds, `1:02:05` for 3725."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def in_words(seconds: float) -> str:
    """Return seconds as `40 s`, `12 min` or `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _format_figures(figures: dict[str, float | str]) -> str:
    return " ".join(f"{name} {value if isinstance(value, str) else f'{value:.3g}'}" for name, value in figures.items())


def _terminal_bar(total: int | None, description: str, unit: str, leave: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=description, unit=unit, file=sys.stderr, dynamic_ncols=True, leave=leave)
