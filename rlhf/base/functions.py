"""Functions and classes named by `package.module:name`, e.g. on a command line."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from rlhf.base.errors import UserError

#: A scorer of texts, independent of the trained reward.
GoldFunction = Callable[[Sequence[str]], list[float]]


def source_file(path: str) -> Path | None:
    """Return the file of the module of `package.module:name`, without importing it; None if there is none."""
    places: Sequence[str] | None = None
    spec: ModuleSpec | None = None
    name = ""
    for part in path.partition(":")[0].split("."):
        name = f"{name}.{part}".lstrip(".")
        spec = PathFinder.find_spec(name, places)
        if spec is None:
            return None
        places = list(spec.submodule_search_locations or [])
    return Path(spec.origin) if spec is not None and spec.origin is not None else None


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
