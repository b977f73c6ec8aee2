"""Errors that are the user's to mend: one clear line, exit code 2, no traceback."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from types import TracebackType

from rlhf.base.redaction import redact


class UserError(Exception):
    """What is wrong, where, and how to fix it, in one line. Commands print it and exit with code 2."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the nearest of the known names, or an empty string when none is near."""
    near = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""


def run_command(main: Callable[[], object]) -> None:
    """Runs a command-line entry point: `UserError` and full disks become one line and exit code 2, Ctrl-C exit code 130, an
    output that nobody reads any more (`| head`) exit code 141 without a word.

    SIGTERM is turned into `SystemExit(143)`, so that `finally` blocks run and nothing is left half-written. What is printed of
    an error holds no secrets.
    """
    sys.excepthook = _print_redacted
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        try:
            main()
        finally:
            _flush()
    except UserError as error:
        sys.exit(_complain(str(error)))
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        sys.exit(_complain(f"{error.strerror or error}: {error.filename or 'while writing'}"))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _flush() -> None:
    """Writes what is left for standard output, whatever `main` ended with; if its reader is gone, ends as SIGPIPE would."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes once more when it ends, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _complain(message: str) -> int:
    print(f"error: {redact(' '.join(message.split()))}", file=sys.stderr)
    return 2


def _print_redacted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(redact("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def require(condition: bool, message: str) -> None:
    """Raises `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)
