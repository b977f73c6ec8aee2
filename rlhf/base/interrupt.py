"""Ctrl-C and SIGTERM during training: finish the update, save a checkpoint, stop."""

from __future__ import annotations

import signal
import sys
from types import FrameType, TracebackType


class StopRequest:
    """Context in which the first Ctrl-C or SIGTERM sets a flag, and a second one stops immediately.

    A training loop reads `requested` between updates, saves its checkpoint and calls `raise_if_requested`.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        return self._signal is not None

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self._signal = number
        print("stopping after this update, with a checkpoint (once more: at once)", file=sys.stderr, flush=True)

    def raise_if_requested(self) -> None:
        """Raise `KeyboardInterrupt` after Ctrl-C, or exit with code 143 after SIGTERM."""
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self._signal is not None:
            sys.exit(128 + self._signal)
