"""A copy of a run's log in another program, which may fail: whatever it does, the training goes on after one warning.

All calls to it run in a thread of its own, in order: a server that stalls holds up nothing but the end of the run, and that
for a bounded time.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlhf.base.redaction import redact

logger = logging.getLogger(__name__)

FINISH_TIMEOUT_SECONDS = 300.0
"""Time that the end of a run waits for what is still to be sent: W&B itself would retry for days."""

MAX_WAITING = 10_000
"""Calls that wait for a copy at most; beyond it, lines reach the local files only."""

Severity = Literal["warning", "critical"]


@dataclass(kw_only=True)
class RunRecord:
    """Facts of a run from its start; passwords and keys in it are blanked."""

    run_dir: Path
    stage: str
    name: str
    group: str
    """The name that the runs of one pipeline share."""
    config: dict[str, Any]
    resume: bool = False
    """Go on with the run of the same id."""
    run_id: str = ""
    inputs: dict[str, str] = field(default_factory=dict)
    """Artefacts that this run starts from: reference -> hash."""
    project: str = "rlhf"
    tags: list[str] = field(default_factory=list)
    notes: str | None = None


class RunCopy:
    """The copy of one run; its methods return at once and never raise because of the other program.

    Those that a program has no use for do nothing.
    """

    program = ""
    """Name of the program in warnings."""
    remedy = ""
    """How what is left is sent after the run."""

    def __init__(self, record: RunRecord) -> None:
        self.record = record
        self._is_open = False
        self._warned = False
        self._calls: queue.Queue[tuple[str, Callable[[], object]] | None] = queue.Queue(MAX_WAITING)
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to open the run."""
        self._thread = threading.Thread(target=self._work, name=self.program, daemon=True)
        self._thread.start()

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Send metrics of an update."""

    def log_summary(self, figures: Mapping[str, float], step: int) -> None:
        """Send final figures, by which runs can be sorted."""

    def log_histograms(self, values: Mapping[str, Sequence[float]], step: int) -> None:
        """Send the distributions of an update's values."""

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Append rows to the table of samples; the first row decides the columns."""

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Send rows as a table of their own, with the columns of the first."""

    def log_scatter(
        self, name: str, rows: Sequence[Mapping[str, float]], x: str, y: str, title: str, step: int
    ) -> None:
        """Send a panel with a point a row."""

    def log_page(self, file: Path) -> None:
        """Send the run's report page."""

    def use_artifact(self, reference: str, hash: str, path: str | Path | None = None) -> None:
        """Record that this run starts from an artefact, e.g. `sft/demo@2`."""

    def use_data(self, dataset: str, data: Mapping[str, Any]) -> None:
        """Record the data that this run reads."""

    def log_artifact(self, reference: str, path: str | Path, metadata: Mapping[str, Any]) -> None:
        """Record that this run made an artefact, a folder of the registry."""

    def alert(self, title: str, text: str, severity: Severity) -> None:
        """Send an alert."""

    def skip_to(self, step: int) -> None:
        """Ignore lines up to this step from now on: the run went back behind it, and a copy cannot be shortened."""

    def finish(self, exit_code: int = 0) -> None:
        """End the run, once all that was logged is sent or `FINISH_TIMEOUT_SECONDS` are over; a second call does nothing."""
        self._later("finish the run", lambda: self._close(exit_code))
        if self._thread is not None:
            with suppress(queue.Full):
                self._calls.put_nowait(None)
            self._thread.join(FINISH_TIMEOUT_SECONDS)
            if self._thread.is_alive():
                self._warn(
                    f"{self.program} is still uploading after {FINISH_TIMEOUT_SECONDS:.0f} s{self.remedy and '; '}{self.remedy}"
                )
            self._thread = None

    def _open(self) -> None:
        raise NotImplementedError

    def _close(self, exit_code: int) -> None:
        raise NotImplementedError

    def _later(self, action: str, call: Callable[[], object]) -> None:
        """Let the thread make a call once those before it are done; without a thread there is no copy."""
        if self._thread is None:
            return
        try:
            self._calls.put_nowait((action, call))
        except queue.Full:
            self._warn(f"{self.program} could not {action} (it has not taken the {MAX_WAITING:,} calls before)")

    def _work(self) -> None:
        """Open the run, and make the calls in the order in which they come, until there is None."""
        self._try("start", self._open)
        while (item := self._calls.get()) is not None:
            if self._is_open:
                self._try(*item)

    def _try(self, action: str, call: Callable[[], object]) -> None:
        """Make a call and turn any exception into a warning: nothing that a copy does may end a training run."""
        try:
            call()
        except Exception as error:
            reason = " ".join(redact(f"{type(error).__name__}: {error}").split())[:300]
            self._warn(f"{self.program} could not {action} ({reason})")

    def _warn(self, message: str) -> None:
        """Log a warning the first time, and debug messages after it."""
        level = logging.DEBUG if self._warned else logging.WARNING
        logger.log(level, "%s. Metrics are in %s", message, self.record.run_dir)
        self._warned = True
