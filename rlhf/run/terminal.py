"""The live view of a training run: progress with the time left, main metrics and the last samples.

While a view is open, `rlhf.run.progress` draws its bars into it and `rlhf.run.tracker` passes on what it logs. Off a terminal
there is no view, and `rlhf.run.progress` prints plain lines.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rlhf.base import screen
from rlhf.run import metrics

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

POINTS = 32
"""Values in the curve beside a metric."""
SAMPLES = 3
_BLOCKS = "▁▂▃▄▅▆▇█"


class LiveView:
    """The screen of one run, which rich redraws in place."""

    def __init__(self, title: str) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as TimeLeftColumn

        self.title = title
        self.values: dict[str, deque[float]] = {}
        self.samples: list[Mapping[str, Any]] = []
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeLeftColumn(),
        )

    def add_metrics(self, figures: Mapping[str, float]) -> None:
        """Keep the newest values of the metrics that the terminal shows."""
        for metric in metrics.shown("terminal"):
            if metric.name in figures:
                self.values.setdefault(metric.name, deque(maxlen=POINTS)).append(figures[metric.name])

    def add_samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep the first few of the newest rows."""
        self.samples = list(rows[:SAMPLES])

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        parts: list[RenderableType] = [Text(self.title, style="bold")]
        if self.values:
            parts.append(self._figures())
        for row in self.samples:
            parts += [Text(line, no_wrap=True, overflow="ellipsis") for line in _sample_lines(row)]
        return Group(*parts, self.bars)

    def _figures(self) -> RenderableType:
        from rich.table import Table

        table = Table(box=None, show_header=False, pad_edge=False)
        for metric in metrics.shown("terminal"):
            if values := list(self.values.get(metric.name, ())):
                label = f"{metric.label}, {metric.unit}" if metric.unit else metric.label
                table.add_row(label, f"{values[-1]:.3g}", sparkline(values))
        return table


class _Bar:
    """A bar inside the view, with the methods of tqdm's that `rlhf.run.progress` calls."""

    def __init__(self, view: LiveView, total: int | None, description: str, leave: bool) -> None:
        self._bars, self._leave = view.bars, leave
        self._task = view.bars.add_task(description, total=total, figures="")

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        """Show figures beside the bar; the view redraws itself."""
        self._bars.update(self._task, figures=text)

    def update(self, n: int) -> None:
        """Count `n` more units; `n` is negative where a run went back to a checkpoint."""
        self._bars.advance(self._task, n)

    def refresh(self) -> None:
        """Do nothing: the view redraws itself."""

    def close(self) -> None:
        """End the bar; without `leave` it vanishes."""
        self._bars.stop_task(self._task)
        if not self._leave:
            self._bars.remove_task(self._task)


_open: LiveView | None = None


@contextmanager
def view(title: str, console: Console | None = None) -> Iterator[LiveView | None]:
    """Show the run on the terminal inside the block; yields None, and shows nothing, where stderr is none.

    Args:
        console: drawn on in place of stderr, whatever that is.
    """
    global _open
    if console is None and not is_terminal():
        yield None
        return
    from rich.live import Live

    _open = LiveView(title)
    # Output that is sent to a file stays out of the terminal.
    live = Live(
        _open, console=console or screen.console(stderr=True), refresh_per_second=4, redirect_stdout=sys.stdout.isatty()
    )
    try:
        with live:
            yield _open
    finally:
        _open = None


def is_terminal() -> bool:
    """Return True if stderr can be redrawn in place, and this is the first process of the run."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and os.environ.get("RANK", "0") == "0"


def bar(total: int | None, description: str, leave: bool) -> Any:
    """Return a bar in the open view; None without one."""
    return None if _open is None else _Bar(_open, total, description, leave)


def show_metrics(figures: Mapping[str, float]) -> None:
    """Add newly logged metrics to the open view."""
    if _open is not None:
        _open.add_metrics(figures)


def show_samples(rows: Sequence[Mapping[str, Any]]) -> None:
    """Add newly logged rows of text and scores to the open view."""
    if _open is not None:
        _open.add_samples(rows)


def sparkline(values: Sequence[float]) -> str:
    """Return `▁▄█` for `[1, 2, 3]`; a value that is not finite is a gap."""
    finite = [value for value in values if abs(value) < float("inf")]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((v - low) * scale)] if abs(v) < float("inf") else " " for v in values)


def _sample_lines(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return a prompt and its response, a line each, with the row's numbers in front of the response."""
    numbers = [f"{name} {row[name]:.3g}" for name in ("score", "kl") if isinstance(row.get(name), float)]
    return _one_line(row.get("prompt")), f"  {' '.join(numbers)} | {_one_line(row.get('response'))}"


def _one_line(text: Any) -> str:
    """Return a text without line breaks and escape sequences: a model's output must not steer the terminal."""
    return "".join(c if c.isprintable() else " " for c in str(text or ""))
