"""Functions and classes named by `package.module:name`, e.g. on a command line, and objects that Python code hands over."""

from __future__ import annotations

import importlib
import operator
import re
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import MethodType
from typing import Any

from rlhf.base.errors import UserError

#: A scorer of texts, independent of the trained reward.
GoldFunction = Callable[[Sequence[str]], list[float]]
#: Callables that have no name to import them by, by the name that `name_of` gave them.
_OBJECTS: dict[str, Callable[..., Any]] = {}
_OBJECT = "python:"


def name_of(function: Callable[..., Any]) -> str:
    """Return the name by which `load_function` returns this very callable, in this process.

    `package.module:name` where the callable can be imported by it, as a function of a module or notebook can; else
    `python:NAME`, as for lambdas, closures and models.
    """
    own = getattr(function, "__name__", type(function).__name__)
    module = str(getattr(function, "__module__", ""))
    if getattr(sys.modules.get(module), own, None) is function and re.fullmatch(r"\w+", own):
        return f"{module}:{own}"
    label, number = _OBJECT + (re.sub(r"\W", "", own) or "object"), 1
    # A bound method is another object at each access.
    same = operator.eq if isinstance(function, MethodType) else operator.is_
    while (name := label if number == 1 else f"{label}_{number}") in _OBJECTS and not same(_OBJECTS[name], function):
        number += 1
    _OBJECTS[name] = function
    return name


def source_file(path: str) -> Path | None:
    """Return the file of the module of `package.module:name`, without importing it; None if there is none."""
    if path.startswith("__main__:"):
        script = getattr(sys.modules["__main__"], "__file__", None)
        return Path(script) if script and Path(script).is_file() else None
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
    if path in _OBJECTS:
        return _OBJECTS[path]
    if path.startswith(_OBJECT):
        raise UserError(f"'{path}' was an object of another Python program; pass a callable in its place")
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"cannot load '{path}' (expected package.module:function): {error}") from error
    if not callable(function):
        raise UserError(f"'{path}' is not a function (expected package.module:function)")
    return function
