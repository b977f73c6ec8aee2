"""Python functions named on a command line: `package.module:function`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from rlhf.base.errors import UserError

#: A scorer of texts that nothing was trained on.
GoldFunction = Callable[[Sequence[str]], list[float]]


def load_function(path: str) -> Callable[..., Any]:
    """The function that `package.module:function` names."""
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"cannot load '{path}' (expected package.module:function): {error}") from error
    if not callable(function):
        raise UserError(f"'{path}' is no function (expected package.module:function)")
    return function
