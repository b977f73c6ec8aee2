"""Files of a run checked against types: what does not have its type is left out, and named."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlhf.base.errors import UserError
from rlhf.base.json_files import read_jsonl, read_object

PROBLEMS_NAMED = 5
"""Problems of one file that are named; the others are counted."""

_UNFIT: Any = object()
_WORDS = {
    dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a whole number", float: "a number",
    types.NoneType: "null",
}  # fmt: skip


def fit(value: Any, kind: Any, name: str = "") -> tuple[Any, list[str]]:
    """Return a value of plain data without the parts that lack their type, and a line for each of these.

    Args:
        kind: `dict`, `list`, `str`, `int`, `float` (a finite number), `bool`, `Any`, and unions, literals, `TypedDict`s (with
            other keys as well; null stands for no value) and dataclasses of these. `Annotated[dict[str, Any], Kind]` stands
            for `Kind`.
        name: of the value, in the lines.
    """
    problems: list[str] = []
    part = _fit(value, kind, name, problems)
    return (None if part is _UNFIT else part), problems


def _fit(value: Any, kind: Any, name: str, problems: list[str]) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _fit(value, arguments[1], name, problems)
    if origin in (typing.Union, types.UnionType):
        return _fit_one(value, kind, name, problems)
    if typing.is_typeddict(kind) or dataclasses.is_dataclass(kind):
        if isinstance(value, dict):
            return _fit_fields(value, kind, name, problems)
    elif origin is list and isinstance(value, list):
        parts = [_fit(part, arguments[0], f"{name}[{number}]", problems) for number, part in enumerate(value)]
        return [part for part in parts if part is not _UNFIT]
    elif origin is dict and isinstance(value, dict):
        named = {key: _fit(part, arguments[1], _join(name, key), problems) for key, part in value.items()}
        return {key: part for key, part in named.items() if part is not _UNFIT}
    elif _is(value, kind):
        return value
    problems.append(f"{name or 'it'} is {_WORDS[type(value)]}, not {_word(kind)}")
    return _UNFIT


def _is(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return isinstance(value, str) and value in typing.get_args(kind)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return kind is Any or type(value) is kind


def _fit_one(value: Any, union: Any, name: str, problems: list[str]) -> Any:
    """Return the value as the first kind of a union that it fits as a whole, or else in part."""
    partial = _UNFIT, [f"{name or 'it'} is {_WORDS[type(value)]}, not {_word(union)}"]
    for kind in typing.get_args(union):
        own: list[str] = []
        part = _fit(value, kind, name, own)
        if not own:
            return part
        if part is not _UNFIT:
            partial = part, own
    problems += partial[1]
    return partial[0]


def _fit_fields(value: dict[str, Any], kind: Any, name: str, problems: list[str]) -> Any:
    hints, required = _fields(kind)
    if typing.is_typeddict(kind):
        value = {key: part for key, part in value.items() if part is not None or key in required or key not in hints}
    parts = {
        key: _fit(part, hints[key], _join(name, key), problems) if key in hints else part for key, part in value.items()
    }
    lacking = [key for key in required if key not in parts]
    if dataclasses.is_dataclass(kind):
        lacking += [key for key in parts if key not in hints]
    problems += [f"{name or 'it'} {'has' if key in parts else 'lacks'} the field '{key}'" for key in lacking]
    if lacking or any(parts[key] is _UNFIT for key in required):
        return _UNFIT
    return {key: part for key, part in parts.items() if part is not _UNFIT}


@functools.cache
def _fields(kind: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """Return the types by field, and the fields that must be there."""
    hints = typing.get_type_hints(kind, include_extras=True)
    if typing.is_typeddict(kind):
        # Annotations are texts when the class is made, in which it does not see `Required`.
        marked = {name for name, hint in hints.items() if typing.get_origin(hint) is typing.Required}
        bare = {name: typing.get_args(hint)[0] if name in marked else hint for name, hint in hints.items()}
        return bare, kind.__required_keys__ | marked
    missing = dataclasses.MISSING
    optional = {f.name for f in dataclasses.fields(kind) if (f.default, f.default_factory) != (missing, missing)}
    return hints, frozenset(hints.keys() - optional)


def _join(name: str, key: str) -> str:
    return f"{name}.{key:.60}" if name else f"{key:.60}"


def _word(kind: Any) -> str:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(map(_word, typing.get_args(kind)))
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    if typing.is_typeddict(kind) or dataclasses.is_dataclass(kind):
        return "an object"
    return _WORDS[typing.get_origin(kind) or kind]


@dataclass
class FolderReader:
    """Reads what it can of a folder, and notes the rest."""

    folder: Path
    problems: list[str] = field(default_factory=list)
    """A line for each file that is missing, or cannot be read as a whole."""

    def read_object(self, name: str, kind: Any = dict[str, Any]) -> dict[str, Any]:
        """Return the JSON object in a file as far as it fits the kind; {} where there is none."""
        file = self.folder / name
        try:
            content = read_object(file, fix="it is left out", nan_as_none=True)
        except FileNotFoundError:
            return {}
        except OSError as error:
            self.problems.append(f"{name} cannot be read ({error.strerror})")
            return {}
        except UserError as error:
            self.problems.append(str(error).replace(str(file), name))
            return {}
        return self.fit(content, kind, name)

    def fit(self, content: dict[str, Any], kind: Any, name: str) -> dict[str, Any]:
        """Return the content of a file as far as it fits the kind, and note what does not."""
        parts, problems = fit(content, kind)
        self.problems += [f"{name}: {problem}; left out" for problem in problems[:PROBLEMS_NAMED]]
        if len(problems) > PROBLEMS_NAMED:
            self.problems.append(f"{name}: {len(problems) - PROBLEMS_NAMED} more parts left out")
        return parts or {}

    def read_rows(self, name: str, kind: Any = dict[str, Any], *, expected: bool = True) -> list[dict[str, Any]]:
        """Return the rows of a `.jsonl` file that fit the kind; notes the others, and a file expected in vain."""
        try:
            rows, unreadable = read_jsonl(self.folder / name)
        except FileNotFoundError:
            if expected:
                self.problems.append(f"{name} is not there")
            return []
        except OSError as error:
            self.problems.append(f"{name} cannot be read ({error.strerror})")
            return []
        fitting = [row for row in rows if not fit(row, kind)[1]]
        if unreadable := unreadable + len(rows) - len(fitting):
            self.problems.append(f"{name}: {unreadable} unreadable line{'s' if unreadable > 1 else ''} left out")
        elif not rows:
            self.problems.append(f"{name} is empty")
        return fitting
