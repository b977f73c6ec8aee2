"""Reads a file or folder of another project's run: which project it is of, and its history in our figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rlhf.base.errors import UserError, did_you_mean
from rlhf.base.json_files import MAX_BYTES, read_object_or_none
from rlhf.base.text_files import open_text
from rlhf.config.parse import read_yaml
from rlhf.doctor.foreign import console, formats, llama_factory, openrlhf, own, records, swift, trl, verl
from rlhf.doctor.foreign.figure import Kind, known_names
from rlhf.doctor.foreign.rows import MOST_RUNS, STEP, STEPS, Log, Row, number, ordered, step_name
from rlhf.doctor.health.history import History

#: All logs that are understood; the first that matches counts, so kinds with more marks come first.
KINDS: tuple[Kind, ...] = (*verl.KINDS, *openrlhf.KINDS, *swift.KINDS, *llama_factory.KINDS, *own.KINDS, *trl.KINDS)
KNOWN = known_names(KINDS) | {"epoch"}
UNDERSTOOD = (
    "a log of TRL, OpenRLHF, verl, ms-swift or LLaMA-Factory: trainer_state.json, JSON lines, CSV, "
    "W&B's run-*.wandb, a TensorBoard event file, or what was printed"
)
_HEAD = 1 << 16
COUNTED = "no steps are in the log, so its lines are counted"
#: Options that tell kinds apart.
_TELLING = ("rlhf_type", "stage")
#: Files beside a log, or one folder above it, that hold the run's options.
_OPTION_FILES = ("args.json", "config.yaml", "files/config.yaml", "training_args.yaml")


@dataclass(frozen=True, kw_only=True)
class ForeignRun:
    """One run of another project, as our checks read it."""

    file: Path
    log: Log
    kind: Kind
    history: History
    names: frozenset[str]
    """Figures of the log that its kind reads, by their names there."""
    settings: dict[str, Any]
    """Options that are known, by the names in the kind's table."""


def read_runs(file: Path, stage: str | None = None) -> list[ForeignRun]:
    """Return the runs in a file.

    Args:
        stage: `reward` for the log of a reward model whose names could be those of another training, too.

    Raises:
        UserError: there is no such file, or it is no log of a project that is known.
    """
    logs = read_logs(file)
    beside = _options_beside(file)
    runs: list[ForeignRun] = []
    for log in logs:
        log.options = beside | log.options
        courses = ordered(log.rows)
        if not step_name(log.rows):
            log.notes.append(COUNTED)
        if len(courses) > MOST_RUNS:
            log.notes.append(f"the steps begin again {len(courses) - 1} times; the last {MOST_RUNS} runs are examined")
        for rows in courses[-MOST_RUNS:]:
            run = _run(file, log, rows, stage)
            if run is not None:
                runs.append(run)
    if not runs:
        names = sorted({name for log in logs for row in log.rows for name in row} - {"epoch"})
        seen = f" (it has {', '.join(names[:6])})" if names else ""
        raise UserError(f"{file} has no figures of a training that is known{seen}; what is read is {UNDERSTOOD}")
    return runs


def read_logs(file: Path) -> list[Log]:
    """Return what a file logs, by its content.

    Raises:
        UserError: there is no such file, or it is of a kind that is not read.
    """
    if not file.is_file():
        near = did_you_mean(file.name, [path.name for path in file.absolute().parent.glob("*")])
        raise UserError(f"no file {file}{near}")
    with file.open("rb") as stream:
        head = stream.read(64)
    if head.startswith(records.WANDB_MARK):
        return records.read_wandb(file, KNOWN)
    if records.TENSORBOARD_MARK in head:
        return records.read_tensorboard(file, KNOWN)
    return _read_text(file)


def _read_text(file: Path) -> list[Log]:
    with open_text(file) as stream:
        head = stream.read(_HEAD)
    start = head.lstrip()[:1]
    readers: list[Callable[[IO[bytes]], list[Log]]] = []
    if start == b"{":
        readers.append(lambda stream: formats.read_lines(stream, KNOWN))
    if start in (b"{", b"["):
        readers.append(lambda stream: formats.read_json(stream.read(MAX_BYTES + 1), KNOWN))
    if _is_table(head):
        readers.append(lambda stream: formats.read_csv(console.pieces(stream), KNOWN))
    readers.append(lambda stream: console.read_text(console.pieces(stream), KNOWN))
    logs: list[Log] = []
    for read in readers:
        with open_text(file) as stream:
            logs = read(stream)
        if any(row.keys() - set(STEPS) for log in logs for row in log.rows):
            break
    return logs


def _is_table(head: bytes) -> bool:
    """Return whether a first line has names of figures or steps, with commas, semicolons or tabs between them."""
    line = head.decode("utf-8", "replace").partition("\n")[0]
    names = [formats.plain_column(name) for delimiter in ",;\t" for name in line.split(delimiter)]
    return sum(name in KNOWN or name.lower() in ("step", "_step", "global_step") for name in names) >= 2


def _run(file: Path, log: Log, rows: list[Row], stage: str | None) -> ForeignRun | None:
    names = frozenset(name for row in rows for name in row) - {STEP}
    words = names | {f"{name}={log.options[name]}" for name in _TELLING if isinstance(log.options.get(name), str)}
    words |= {f"stage={stage}"} if stage else set()
    words |= {"global_step/max_steps"} if any("global_step/max_steps" in row for row in log.rows[:50]) else set()
    words |= {"current_steps"} if any("current_steps" in row for row in log.rows[:50]) else set()
    kind = next((kind for kind in KINDS if kind.matches(words) and stage in (None, kind.stage)), None)
    if kind is None:
        return None
    settings = dict(_settings(kind, log.options))
    known = {name: value for name, value in settings.items() if number(value) is not None}
    history = History(kind.stage, _converted(kind, rows, log.notes), settings=known)
    read = frozenset(name for figure in kind.figures for name in figure.theirs)
    return ForeignRun(file=file, log=log, kind=kind, history=history, names=names & read, settings=settings)


def _converted(kind: Kind, rows: list[Row], notes: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows in our figures; one gradient that is not finite, alone, is a step that a loss scaler skipped."""
    converted = [kind.convert(row) | {STEP: row[STEP]} for row in rows]
    name = f"{kind.stage}/grad_norm"
    broken = [name in row and not math.isfinite(row[name]) for row in converted]
    alone = [
        place
        for place, is_broken in enumerate(broken)
        if is_broken and not any(broken[max(0, place - 1) : place]) and not any(broken[place + 1 : place + 2])
    ]
    for place in alone:
        del converted[place][name]
    if alone:
        notes.append(
            f"a gradient norm that is not finite in {len(alone)} log line{'s' if len(alone) > 1 else ''}, each alone: "
            "with fp16 such steps are skipped, without it look at them"
        )
    return iter(converted)


def _settings(kind: Kind, options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for ours, theirs in kind.settings.items():
        for name in theirs:
            value = _option(options, name)
            if value is not None:
                yield ours, value
                break


def _option(options: Mapping[str, Any], name: str) -> Any:
    """Return an option by its dotted name; W&B's config.yaml has `{value: ...}` around each."""
    value: Any = options
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, Mapping) and "value" in value and len(value) <= 2:
            value = value["value"]
    return value if isinstance(value, int | float | str) and value != "" else None


def _options_beside(file: Path) -> dict[str, Any]:
    """Return the options in files beside a log, or one folder above it; {} where there are none."""
    for folder in (file.parent, file.parent.parent):
        for name in _OPTION_FILES:
            place = folder / name
            if not place.is_file():
                continue
            if place.suffix == ".json":
                return read_object_or_none(place) or {}
            try:
                return read_yaml(place)
            except (UserError, OSError):
                return {}
    return {}


def logs_in(folder: Path) -> list[Path]:
    """Return the logs of another project's run in a folder: its trainer's state, its newest W&B run, or its event files."""
    places = (
        ("trainer_state.json",),
        ("checkpoint-*/trainer_state.json", "*/checkpoint-*/trainer_state.json"),
        ("trainer_log.jsonl", "logging.jsonl"),
        ("run-*.wandb", "wandb/*run-*/run-*.wandb", "*run-*/run-*.wandb"),
        ("events.out.tfevents.*", "runs/*/events.out.tfevents.*"),
    )
    for patterns in places:
        files = sorted({file for pattern in patterns for file in folder.glob(pattern)}, key=_age)
        if files:
            return files[-1:]
    return []


def _age(file: Path) -> tuple[int, float]:
    """Return the number of a checkpoint's folder, and the time of the file."""
    digits = file.parent.name.rpartition("-")[2]
    return (int(digits) if digits.isdigit() and len(digits) < 18 else 0, file.stat().st_mtime)


def is_foreign(place: Path) -> bool:
    """Return whether a place is a file, or a folder with a log of another project and none of ours."""
    if place.is_file():
        return place.name != "metrics.jsonl"
    if not place.is_dir() or (place / "metrics.jsonl").exists() or any(place.glob("*/metrics.jsonl")):
        return False
    return bool(logs_in(place))


def read_place(place: Path, stage: str | None = None) -> list[ForeignRun]:
    """Return the runs of a file, or of the log in a folder."""
    files: Iterable[Path] = logs_in(place) if place.is_dir() else [place]
    return [run for file in files for run in read_runs(file, stage)]
