"""Errors that users can fix: one clear line, exit code 2, no traceback."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from types import TracebackType
from typing import NoReturn

from rlhf.base import screen
from rlhf.base.redaction import redact

DISTRIBUTION = "rlhf-stages"
"""Name of this package on PyPI, where `rlhf` is another project's."""


class UserError(Exception):
    """An error whose text, one line, states the problem, its place and the fix. Commands print it and exit with code 2."""


def install(extra: str) -> str:
    """Return the command that installs an optional part of this package."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` with the nearest of the names, or an empty string if none is near."""
    near = get_close_matches(word, list(names), n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""


def run_command(main: Callable[[], object]) -> None:
    """Run a command-line entry point and turn errors into exit codes.

    `UserError` and full disks print one line and exit with 2, Ctrl-C with 130, and a closed pipe (`| head`) silently
    with 141. SIGTERM raises `SystemExit(143)`, so that `finally` blocks run. Secrets are removed from printed errors,
    and control characters from all that is printed.
    """
    sys.excepthook = _print_redacted
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        try:
            with screen.clean_output():
                main()
        finally:
            _flush()
    except UserError as error:
        sys.exit(_print_error(str(error)))
    except BrokenPipeError:
        _leave_closed_pipe()
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        sys.exit(_print_error(f"{error.strerror or error}: {error.filename or 'while writing'}"))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _flush() -> None:
    """Flush standard output; exit as on SIGPIPE if its reader has closed it."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _leave_closed_pipe()


def _leave_closed_pipe() -> NoReturn:
    """Exit as on SIGPIPE. The interpreter flushes again at exit, and would print an error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(141)


def _print_error(message: str) -> int:
    print(f"error: {screen.printable(redact(' '.join(message.split())))}", file=sys.stderr)
    return 2


def _print_redacted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    text = redact("".join(traceback.format_exception(kind, error, trace)))
    print(screen.printable(text), end="", file=sys.stderr)


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)
