"""Figures of other projects, and what they are called and counted in here.

A `Kind` is the log of one trainer of one project. Its table says which of our figures each of its figures is, with the
conversion, and for which checks it is not exact enough: a limit that was set on our definition is not applied to another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from rlhf.doctor.health.check import Stage

Values = Mapping[str, float]
"""Figures of one row by their names there."""


class Rounded(float):
    """A figure that was printed as zero with three decimals: it is small, and whether it is 0 is not known."""


class Conversion(NamedTuple):
    """The way from another project's figure to ours."""

    text: str
    apply: Callable[[float, Values], float | None]
    """Gets the figure and its row; None where another figure that it needs is not in the row."""


SAME = Conversion("", lambda value, row: value)
COMPLEMENT = Conversion("1 - it", lambda value, row: 1 - value)


def scaled(factor: float) -> Conversion:
    """Return the conversion by a constant factor."""
    return Conversion(f"x {factor:g}", lambda value, row: value * factor)


def per_response(*lengths: str) -> Conversion:
    """Return the conversion of nats a token into nats a response: times the first of these lengths in the row."""

    def apply(value: float, row: Values) -> float | None:
        length = next((row[name] for name in lengths if name in row), None)
        return None if length is None else value * length

    return Conversion(f"x `{lengths[0]}`", apply)


def less(name: str) -> Conversion:
    """Return the conversion that subtracts another figure."""
    return Conversion(f"less `{name}`", lambda value, row: value - row[name] if name in row else None)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of another project."""

    theirs: tuple[str, ...]
    """Its names, that of the newest version first; the first in a row counts."""
    ours: tuple[str, ...] = ()
    """Our figures that it is after the conversion."""
    convert: Conversion = SAME
    meaning: str = ""
    """Its definition where that is not ours; ends the sentence "the log has NAME, which is"."""
    unfit: tuple[str, ...] = ()
    """Checks whose limits were not set on such a figure."""
    limits: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Checks that are run with other limits on it."""
    near: tuple[str, ...] = ()
    """Our figures that it resembles and is not."""
    total: bool = False
    """Its names are parts that are added up."""
    zero_counts: bool = False
    """A zero means more than a small figure, so one that may be rounded is left out."""
    source: str = ""
    """Where the project computes it."""

    def value(self, row: Values) -> float | None:
        """Return the converted figure of a row, None if it is not there."""
        parts = [row[name] for name in self.theirs if name in row]
        if not parts or (self.zero_counts and isinstance(parts[0], Rounded)):
            return None
        return self.convert.apply(sum(parts) if self.total else parts[0], row)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """The log of one trainer of another project."""

    project: str
    trainer: str
    stage: Stage
    marks: tuple[frozenset[str], ...]
    """A log is of this kind if it has a word of each set; words are names of figures, and `option=value`."""
    figures: tuple[Figure, ...]
    apart: Mapping[str, str] = field(default_factory=dict)
    """Checks that say nothing of such a run, each with the reason."""
    settings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Options by our name, or a name for people, with their names there; a dot goes into a section."""

    @property
    def title(self) -> str:
        """Project and trainer, for people."""
        return f"{self.project}, {self.trainer}"

    def matches(self, words: frozenset[str]) -> bool:
        """Return whether a log with these words is of this kind."""
        return all(mark & words for mark in self.marks)

    def convert(self, row: Values) -> dict[str, float]:
        """Return our figures of a row."""
        values: dict[str, float] = {}
        for figure in self.figures:
            value = figure.value(row) if figure.ours else None
            if value is not None:
                values |= dict.fromkeys((name for name in figure.ours if name not in values), value)
        return values


#: Limits on a KL that is a token's mean times the length: rounding in bf16 adds up over long responses, in the course of an
#: update the policy has moved, and in k3 single tokens can outweigh all others.
ROUGH_KL: Mapping[str, Mapping[str, float]] = {
    "wrong_reference": {"kl": 20.0},
    "kl_jump": {"margin": 10.0, "factor": 10.0},
}


def words(*names: str) -> frozenset[str]:
    """Return one mark: any of these names."""
    return frozenset(names)


def known_names(kinds: Iterable[Kind]) -> frozenset[str]:
    """Return all names that the kinds read or are told apart by."""
    names = {name for kind in kinds for figure in kind.figures for name in figure.theirs}
    return frozenset(names.union(*(mark for kind in kinds for mark in kind.marks)))
