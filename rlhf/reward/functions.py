"""Functions of users that score responses: called with care, and their scores checked."""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.base.errors import UserError
from rlhf.base.functions import GoldFunction, load_function

_LARGEST = torch.finfo(torch.float32).max
_TERMINATED = 143
"""Exit code with which SIGTERM ends a command; it may arrive while a user's function runs."""


class RewardError(UserError):
    """A source gave no usable scores."""


class ScoringFunction:
    """A function named by `package.module:name`; calls return checked scores, or raise `RewardError`.

    What it prints goes to standard error, so that answers on standard output stay readable by programs. It gets copies of its
    arguments: rows that it changed would be trained on.
    """

    def __init__(self, reference: str) -> None:
        self.reference, self.function = reference, load_function(reference)
        self.columns = _accepted_columns(self.function)

    def __call__(self, count: int, *arguments: Any, **columns: Any) -> Tensor:
        """Return scores (count,).

        Args:
            columns: those that the function does not take are left out.
        """
        accepted = {name: values for name, values in columns.items() if self.columns is None or name in self.columns}
        with one_line_errors(self.reference):
            own_arguments, own_columns = copy.deepcopy((arguments, accepted))
            with _contained():
                scores = self.function(*own_arguments, **own_columns)
            return checked_scores(scores, count, self.reference)


@contextlib.contextmanager
def one_line_errors(name: str) -> Iterator[None]:
    """Context for users' code in which whatever it raises is a `RewardError`, and a process that it forked ends.

    Args:
        name: name of the code in messages.
    """
    process = os.getpid()
    try:
        yield
    except SystemExit as error:
        _end_fork(process)
        if error.code == _TERMINATED:
            raise
        raise RewardError(f"{name} ended the process with sys.exit({error.code!r}); raise an error instead") from error
    except (RewardError, KeyboardInterrupt):
        _end_fork(process)
        raise
    except BaseException as error:  # whatever a user's code may raise, or its values when they are read
        _end_fork(process)
        frame = traceback.extract_tb(error.__traceback__)[-1]
        message = traceback.format_exception_only(error)[-1].strip()
        raise RewardError(f"{name} failed at {frame.filename}:{frame.lineno}: {message}") from error
    _end_fork(process)


@contextlib.contextmanager
def _contained() -> Iterator[None]:
    """Context for users' code: it prints to standard error, programs that it starts do, and what it sets for all is set back."""
    with settings_restored(), contextlib.redirect_stdout(sys.stderr), _descriptor_to_stderr():
        yield


@contextlib.contextmanager
def settings_restored() -> Iterator[None]:
    """Context for users' code, after which the working folder and torch's gradients and default type are as before."""
    gradients, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    with contextlib.chdir("."):
        try:
            yield
        finally:
            torch.set_grad_enabled(gradients)
            torch.set_default_dtype(dtype)


@contextlib.contextmanager
def _descriptor_to_stderr() -> Iterator[None]:
    """Context in which the system's standard output is its standard error; nothing changes where one of them is closed."""
    try:
        saved = os.dup(1)
    except OSError:
        yield
        return
    try:
        with contextlib.suppress(OSError):
            os.dup2(2, 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def _end_fork(process: int) -> None:
    """End a child process that a function left behind with `os.fork`: two processes would go on training."""
    if os.getpid() != process:
        os._exit(1)


def _accepted_columns(function: Any) -> set[str] | None:
    """Return the names of the columns that a function takes; None: all."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {parameter.name for parameter in parameters if parameter.kind is not parameter.POSITIONAL_ONLY}


def load_gold(reference: str) -> GoldFunction:
    """Return an independent judge of texts, whose scores are checked as those of a reward; `UserError` without one."""
    function = ScoringFunction(reference)
    return lambda texts: function(len(texts), list(texts)).tolist()


def checked_scores(scores: Any, count: int, source: str) -> Tensor:
    """Return scores as a tensor (count,); raise `RewardError` unless they are one finite number for each response."""
    if not isinstance(scores, (Sequence, Tensor)) and not hasattr(scores, "tolist"):
        raise RewardError(f"{source} must give a list of {count} numbers, got {type(scores).__name__}")
    values = scores.tolist() if hasattr(scores, "tolist") else list(scores)
    if isinstance(scores, str | bytes | bytearray) or not isinstance(values, list) or len(values) != count:
        got = f"{len(values)}" if isinstance(values, list) else type(values).__name__
        raise RewardError(f"{source} must give {count} scores, one for each response; got {got}")
    return torch.tensor(
        [_number(v, f"{source} gave {v!r:.80} for response {i} of {count}") for i, v in enumerate(values, 1)]
    )


def _number(value: Any, message: str) -> float:
    """Return a finite number, which may be a scalar of numpy or torch."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _LARGEST:
        raise RewardError(f"{message}; a score is a finite number")
    return float(value)
