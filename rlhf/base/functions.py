"""Functions and classes named by `package.module:name`, e.g. on a command line."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from rlhf.base.errors import UserError

#: A scorer of texts, independent of the trained reward.
GoldFunction = Callable[[Sequence[str]], list[float]]


def load_function(path: str) -> Callable[..., Any]:
    """Import and return the function or class named by `package.module:name`; `UserError` if that fails."""
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"cannot load '{path}' (expected package.module:function): {error}") from error
    if not callable(function):
        raise UserError(f"'{path}' is not a function (expected package.module:function)")
    return function
