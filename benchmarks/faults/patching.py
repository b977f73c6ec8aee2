"""What a fault is, and how it is put into a run from outside: other options, spoilt data, or a patch of the product."""

from __future__ import annotations

import contextlib
import json
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch

Patch = Callable[["Place"], contextlib.AbstractContextManager[Any]]
Row = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """What a patch may need to know."""

    base: Path
    """Folder of the base model."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing put wrong, and the causes that name it."""

    name: str
    what: str
    stage: str
    kind: Literal["computation", "input", "outcome"]
    causes: tuple[str, ...]
    """Neutral names of the quantity, option or data that is wrong (`accepted.py`); the first named cause must be one of them."""
    words: tuple[str, ...] = ()
    """Lower-case words by which a guard's line names it, for a fault that is refused before there is a log."""
    options: dict[str, Any] = field(default_factory=dict)
    data: Callable[[Path], None] | None = None
    """Spoils a folder of data."""
    patch: Patch = lambda place: contextlib.nullcontext()
    own_sft: bool = False
    """The patch is active in an SFT stage before PPO, too."""
    updates: int | None = None
    """Updates of PPO that it needs to show; None: those of the benchmark."""


@contextlib.contextmanager
def around(target: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Replace a function or method `package.module.name` by what `make` makes of it."""
    place, _, name = target.rpartition(".")
    owner = pkgutil.resolve_name(place)
    with mock.patch.object(owner, name, make(getattr(owner, name))):
        yield


def after(target: str, change: Callable[[Any], Any]) -> Patch:
    """Return a patch that changes what a function returns."""
    return lambda place: around(target, lambda original: lambda *args, **kwargs: change(original(*args, **kwargs)))


def instead(target: str, make: Callable[[Any], Any]) -> Patch:
    """Return a patch that puts `make(original)` in a function's place."""
    return lambda place: around(target, make)


def both(*patches: Patch) -> Patch:
    """Return several patches as one."""

    @contextlib.contextmanager
    def together(place: Place) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch(place))
            yield

    return together


def after_build(change: Callable[[Any], None]) -> Patch:
    """Return a patch of PPO's models once they are built."""

    def changed(built: tuple[Any, Any]) -> tuple[Any, Any]:
        with torch.no_grad():
            change(built[0])
        return built

    return after("rlhf.stages.ppo.build_models", changed)


def fill(parameters: Any, scale: float) -> None:
    """Put random numbers in the place of weights."""
    generator = torch.Generator().manual_seed(7)
    for parameter in parameters:
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def rewrite(*files: str, change: Callable[[list[Row]], list[Row]]) -> Callable[[Path], None]:
    """Return what spoils the rows of these files of a data folder."""

    def spoil(folder: Path) -> None:
        for file in files:
            place = folder / f"{file}.jsonl"
            rows = [json.loads(line) for line in place.read_text(encoding="utf-8").splitlines()]
            place.write_text("".join(json.dumps(row) + "\n" for row in change(rows)), encoding="utf-8")

    return spoil
