"""A training run on a terminal: progress with the time left, the figures that tell its health, the last samples.

`rlhf.run.progress` draws its bars into the view while one is open, and `rlhf.tracking` hands it what it logs; neither needs to
know whether somebody looks. Off a terminal there is no view, and `rlhf.run.progress` prints plain lines.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rlhf.run import metrics

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

POINTS = 32
"""Values a figure's little curve shows."""
SAMPLES = 3
_BLOCKS = "▁▂▃▄▅▆▇█"


class LiveView:
    """The screen of one run. It is drawn by rich, which redraws it in place."""

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
        """Remember the metrics that the terminal shows."""
        for metric in metrics.shown("terminal"):
            if metric.name in figures:
                self.values.setdefault(metric.name, deque(maxlen=POINTS)).append(figures[metric.name])

    def add_samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Remembers the first few of the newest rows."""
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
    """What `rlhf.run.progress` asks of a bar, inside the view."""

    def __init__(self, view: LiveView, total: int | None, description: str, leave: bool) -> None:
        self._bars, self._leave = view.bars, leave
        self._task = view.bars.add_task(description, total=total, figures="")

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        """The figures beside the bar; the view redraws itself."""
        self._bars.update(self._task, figures=text)

    def update(self, n: int) -> None:
        """`n` more units; fewer, where a run went back to a checkpoint."""
        self._bars.advance(self._task, n)

    def refresh(self) -> None:
        """Nothing: the view redraws itself."""

    def close(self) -> None:
        """Ends the bar; one that is not to be left vanishes."""
        self._bars.stop_task(self._task)
        if not self._leave:
            self._bars.remove_task(self._task)


_open: LiveView | None = None


@contextmanager
def view(title: str, console: Console | None = None) -> Iterator[LiveView | None]:
    """Inside, a terminal shows the run; None, and nothing at all, where stderr is no terminal.

    Args:
        console: draws here, whatever stderr is.
    """
    global _open
    if console is None and not is_terminal():
        yield None
        return
    from rich.console import Console as RichConsole
    from rich.live import Live

    _open = LiveView(title)
    # Output that somebody sends to a file stays out of the terminal.
    screen = Live(
        _open, console=console or RichConsole(stderr=True), refresh_per_second=4, redirect_stdout=sys.stdout.isatty()
    )
    try:
        with screen:
            yield _open
    finally:
        _open = None


def is_terminal() -> bool:
    """Whether stderr can be redrawn in place. Of several processes of a run the first talks."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and os.environ.get("RANK", "0") == "0"


def bar(total: int | None, description: str, leave: bool) -> Any:
    """A bar in the open view; None without one."""
    return None if _open is None else _Bar(_open, total, description, leave)


def show_metrics(figures: Mapping[str, float]) -> None:
    """Newly logged metrics."""
    if _open is not None:
        _open.add_metrics(figures)


def show_samples(rows: Sequence[Mapping[str, Any]]) -> None:
    """Newly logged rows of text and scores."""
    if _open is not None:
        _open.add_samples(rows)


def sparkline(values: Sequence[float]) -> str:
    """`▁▄█` for `[1, 2, 3]`; a value that is not finite is a gap."""
    finite = [value for value in values if abs(value) < float("inf")]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((v - low) * scale)] if abs(v) < float("inf") else " " for v in values)


def _sample_lines(row: Mapping[str, Any]) -> tuple[str, str]:
    """A prompt and its response on a line each, with the row's numbers in front of the response."""
    numbers = [f"{name} {row[name]:.3g}" for name in ("score", "kl") if isinstance(row.get(name), float)]
    return _one_line(row.get("prompt")), f"  {' '.join(numbers)} | {_one_line(row.get('response'))}"


def _one_line(text: Any) -> str:
    """Without line breaks and escape sequences: what a model writes must not steer the terminal."""
    return "".join(c if c.isprintable() else " " for c in str(text or ""))
