"""Logs that were printed: lines of verl, dictionaries of transformers' Trainer, and OpenRLHF's lines and progress bars."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Iterator
from typing import IO

from rlhf.doctor.foreign.rows import STEP, Log, Row, read_row

_CHUNK = 1 << 20
_LONGEST = 1 << 18
_COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_WORKER = re.compile(r"^\(\w[^()]{0,200}?\bpid=\d{1,20}[^()]{0,200}\)\s?")
_VALUE = r"(?:[\w.]{1,30}\()?['\"]?([-+]?[\w.+-]{1,60}%?(?:/\d{1,12})?)['\"]?\)?"
#: verl: `step:12 - actor/pg_loss:0.1 - actor/lr:np.float64(1e-06)`.
_VERL = re.compile(r"\bstep:(\d{1,12})(?: - |\s*$)(.*)")
#: `{'loss': 0.5, 'grad_norm': '1.2'}`.
_DICTIONARY = re.compile(r"\{['\"][^{}]+\}")
_ENTRY = re.compile(rf"(['\"])([^'\"]{{1,200}})\1\s*:\s*{_VALUE}")
#: OpenRLHF: `Global step 3: {...}`.
_GLOBAL_STEP = re.compile(r"Global step (\d{1,12}): ?\{")
#: tqdm: `Train epoch [1/1]: 50%|#### | 2/4 [00:02<00:02, pg=0.1, kl=0]`.
_BAR = re.compile(r"\d{1,3}%\|[^|]{0,300}\|\s{0,9}(\d{1,9})/\d{1,9} \[([^\]]{0,4000})\]")
_PPO_BAR = "Train epoch"


def pieces(stream: IO[bytes]) -> Iterator[str]:
    """Yield the lines of a text, progress bars cut at their carriage returns; lines of 262 kB and more are left out."""
    rest = b""
    while chunk := stream.read(_CHUNK):
        *lines, rest = re.split(rb"[\r\n]", rest + chunk)
        yield from (line.decode("utf-8", "replace") for line in lines if 0 < len(line) < _LONGEST)
        rest = rest[:_LONGEST]
    if 0 < len(rest) < _LONGEST:
        yield rest.decode("utf-8", "replace")


def read_text(lines: Iterable[str], known: frozenset[str]) -> list[Log]:
    """Return the log in a console's output: the form that has most rows counts, as some print every figure in two forms."""
    forms: dict[str, list[Row]] = {"lines of verl": [], "printed dictionaries": [], "lines of OpenRLHF": []}
    bars = _Bars(known)
    verl = False
    for line in lines:
        line = _plain(line)
        was_verl, verl = verl, False
        if match := _VERL.search(line) if "step:" in line else None:
            forms["lines of verl"].append(_verl_row(match[2], known) | {STEP: float(match[1])})
            verl = True
        elif was_verl and line.lstrip().startswith("- "):  # printed a figure a line
            forms["lines of verl"][-1] |= _verl_row(line.lstrip()[2:], known)
            verl = True
        elif match := _GLOBAL_STEP.search(line) if "Global step" in line else None:
            forms["lines of OpenRLHF"].append(_entries(line[match.end() :], known) | {STEP: float(match[1])})
        else:
            entries = (_entries(match[0], known) for match in _DICTIONARY.finditer(line)) if "{" in line else ()
            forms["printed dictionaries"] += [row for row in entries if len(row) > 1]
            if match := _BAR.search(line) if "%|" in line else None:
                bars.add(line[max(0, match.start() - 200) : match.start()].strip(" :"), int(match[1]), match[2])
    forms["progress bars"] = bars.finish()
    form = max(forms, key=lambda name: len(forms[name]))
    return [Log(form, rows=forms[form])]


def _plain(line: str) -> str:
    """Return a line without its colours, and without the mark of the worker that printed it."""
    line = _COLOURS.sub("", line) if "\x1b" in line else line
    return _WORKER.sub("", line) if line.startswith("(") else line


def _verl_row(text: str, known: frozenset[str]) -> Row:
    parts = (part.rpartition(":") for part in text.split(" - "))
    return read_row({name.strip(" -"): _unwrapped(value) for name, _, value in parts if name}, known)


def _unwrapped(value: str) -> str:
    """Return the number of `np.float64(0.5)` and of `tensor(0.5)`."""
    match = re.fullmatch(_VALUE, value.strip())
    return match[1] if match else value


def _entries(text: str, known: frozenset[str]) -> Row:
    return read_row({match[2]: match[3] for match in _ENTRY.finditer(text)}, known)


class _Bars:
    """Progress bars of OpenRLHF: a row a step, or, in PPO, the mean over the bar of a rollout's updates."""

    def __init__(self, known: frozenset[str]) -> None:
        self.known = known
        self.rows: list[Row] = []
        self.open: dict[str, dict[int, Row]] = {}
        self.updates: dict[str, int] = {}

    def add(self, title: str, place: int, entries: str) -> None:
        """Read the figures of a bar's line."""
        parts = (part.partition("=") for part in entries.split(","))
        row = read_row({name.strip(): value for name, _, value in parts if value}, self.known)
        if not row:
            return
        if _PPO_BAR not in title:
            self.rows.append(row | {STEP: float(place)})
            return
        key = next(iter(row))  # actor and critic have bars of their own
        drawn = self.open.setdefault(key, {})
        if drawn and place < max(drawn):
            self._close(key)
            drawn = self.open.setdefault(key, {})
        drawn[place] = row

    def _close(self, key: str) -> None:
        drawn = self.open.pop(key)
        self.updates[key] = self.updates.get(key, 0) + 1
        names = {name for row in drawn.values() for name in row}
        means = {name: statistics.fmean(row[name] for row in drawn.values() if name in row) for name in names}
        self.rows.append(means | {STEP: float(self.updates[key])})

    def finish(self) -> list[Row]:
        """Return all rows in order."""
        for key in list(self.open):
            self._close(key)
        return sorted(self.rows, key=lambda row: row[STEP]) if self.updates else self.rows
