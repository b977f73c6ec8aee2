"""The record of a run: `metrics.jsonl`, `samples.jsonl` and `tracking.json` in its folder, and its copies elsewhere.

Reports are made from the local files. Copies go to W&B, TensorBoard, MLflow or trackio, as the option `trackers` says; their
packages are imported only by a run that uses them.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rlhf.base import storage
from rlhf.base.errors import UserError
from rlhf.base.json_files import finite_number, read_jsonl, read_object_or_none
from rlhf.base.redaction import redact
from rlhf.run import terminal
from rlhf.run.accelerated import AcceleratedRun
from rlhf.run.copies import RunCopy, RunRecord, Severity
from rlhf.run.metrics import reward_kl_points
from rlhf.run.wandb import WandbRun

RUN_FILE = "tracking.json"
"""Holds the run's id, under which a resumed run goes on."""
STATEMENTS = "doctor.jsonl"
"""The doctor's statements (`rlhf.doctor.statements`)."""


class Tracker:
    """The metric sink of one stage's run; a context manager.

    With `resume` it goes on with the files in the folder; otherwise it moves those of an earlier run aside, to
    `*.previous.jsonl`.

    Args:
        run_dir: the run's folder.
        stage, name, group: the stage, the run's name, and the name that the runs of one pipeline share.
        config: resolved config of the run; passwords and keys are blanked before they are written anywhere.
        trackers: programs that take a copy.
        wandb_mode, wandb_entity, wandb_project, wandb_tags, wandb_notes: the options of these names.
        log_texts: prompts and answers go to the copies, too.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        stage: str,
        name: str,
        group: str,
        config: Mapping[str, Any],
        trackers: Sequence[str] = ("wandb",),
        wandb_mode: str = "auto",
        wandb_entity: str | None = None,
        wandb_project: str = "rlhf",
        wandb_tags: Sequence[str] = (),
        wandb_notes: str | None = None,
        log_texts: bool = False,
        resume: bool = False,
    ) -> None:
        self.record = RunRecord(
            run_dir=Path(run_dir).absolute(),
            stage=stage,
            name=redact(name),
            group=redact(group),
            config=redact(config),
            resume=resume,
            project=wandb_project,
            tags=redact(list(wandb_tags)),
            notes=redact(wandb_notes),
        )
        self.run_dir, self.log_texts = self.record.run_dir, log_texts
        self.copies: list[RunCopy] = [
            WandbRun(self.record, mode=wandb_mode, entity=wandb_entity)
            if tracker == "wandb"
            else AcceleratedRun(self.record, tracker)
            for tracker in dict.fromkeys(trackers)
            if tracker != "none"
        ]
        self._step = 0

    @property
    def run_id(self) -> str:
        """The id of the run, under which a resumed one goes on."""
        return self.record.run_id

    def __enter__(self) -> Tracker:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        for file in [*self._files(), *self.run_dir.glob(STATEMENTS)]:
            if self.record.resume:
                _cut(file, file.stat().st_size)  # a killed run may have left half a line
            else:
                file.replace(file.with_suffix(".previous.jsonl"))
        self.record.run_id = self._load_or_make_run_id()
        self._write_record()
        for copy in self.copies:
            copy.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for copy in self.copies:
            copy.finish(exit_code=0 if kind is None else 1)

    @property
    def _metrics_file(self) -> Path:
        return self.run_dir / "metrics.jsonl"

    @property
    def _samples_file(self) -> Path:
        return self.run_dir / "samples.jsonl"

    def _files(self) -> list[Path]:
        return [file for file in (self._metrics_file, self._samples_file) if file.exists()]

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write one line with these metrics, and send them to the copies. `step` is in updates and never goes down."""
        figures = {name: float(value) for name, value in metrics.items()}
        self._step = int(step)
        _append_lines(self._metrics_file, [{"step": self._step, "time": time.time(), **figures}])
        terminal.show_metrics(figures)
        for copy in self.copies:
            copy.log(figures, self._step)

    def log_histograms(self, values: Mapping[str, Sequence[float]], step: int) -> None:
        """Send the distributions of an update's values to the copies."""
        figures = {name: list(numbers) for name, numbers in values.items()}
        for copy in self.copies:
            copy.log_histograms(figures, int(step))

    def log_summary(self, figures: Mapping[str, Any]) -> None:
        """Send final figures to the copies as `summary/NAME`, by which runs can be sorted; what is no number is left out."""
        numbers = {f"summary/{name}": float(v) for name, v in figures.items() if finite_number(v) is not None}
        for copy in self.copies:
            copy.log_summary(numbers, self._step)

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Append rows of text and scores; the copies get them with `log_texts` only."""
        if not rows:
            return
        _append_lines(self._samples_file, [{"step": int(step), **row} for row in rows])
        terminal.show_samples(rows)
        for copy in self.copies if self.log_texts else ():
            copy.log_samples(rows, int(step))

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int, *, texts: bool = False) -> None:
        """Send rows to the copies as a table of their own; the caller keeps the local record.

        Args:
            texts: the rows hold prompts or answers, so that they are sent with `log_texts` only.
        """
        for copy in self.copies if rows and (self.log_texts or not texts) else ():
            copy.log_table(name, rows, int(step))

    def log_scatter(
        self, name: str, rows: Sequence[Mapping[str, float]], x: str, y: str, title: str, step: int
    ) -> None:
        """Send a panel with a point a row to the copies; the caller keeps the local record."""
        for copy in self.copies if rows else ():
            copy.log_scatter(name, rows, x, y, title, int(step))

    def log_frontier(self) -> None:
        """Send the reward-KL frontier of a PPO run as a panel: the score of each update over the root of its KL."""
        points = reward_kl_points(self.logged())
        if points:
            title = "Score over the square root of KL"
            self.log_scatter("frontier/score", points, "sqrt_kl", "score", title, int(points[-1]["step"]))

    def log_page(self, file: Path) -> None:
        """Send the run's report page to the copies."""
        for copy in self.copies:
            copy.log_page(file)

    def log_artifact(self, reference: str, path: str | Path, metadata: Mapping[str, Any]) -> None:
        """Record in the copies that this run made an artefact, a folder of the registry."""
        for copy in self.copies:
            copy.log_artifact(reference, path, metadata)

    def use_artifact(self, reference: str, hash: str, path: str | Path | None = None) -> None:
        """Record that this run starts from an artefact, e.g. `sft/demo@2`; `path` is its folder."""
        self.record.inputs[reference] = hash
        self._write_record()
        for copy in self.copies:
            copy.use_artifact(reference, hash, path)

    def use_data(self, dataset: str, data: Mapping[str, Any]) -> None:
        """Record in the copies the data that this run reads: the `data` of its manifest."""
        for copy in self.copies:
            copy.use_data(dataset, data)

    def alert(self, title: str, text: str, severity: Severity) -> None:
        """Send an alert to the copies."""
        for copy in self.copies:
            copy.alert(title, text, severity)

    def logged(self) -> list[dict[str, Any]]:
        """Return the lines of metrics so far, those of a run that this one resumes included."""
        return read_jsonl(self._metrics_file)[0] if self._metrics_file.exists() else []

    def logged_samples(self) -> list[dict[str, Any]]:
        """Return the lines of samples so far."""
        return read_jsonl(self._samples_file)[0] if self._samples_file.exists() else []

    def position(self) -> dict[str, int]:
        """Return the sizes of the logs in bytes, by file name, once the disk holds them; a checkpoint keeps it for `rewind`."""
        files = self._files()
        storage.sync(*files)
        return {file.name: file.stat().st_size for file in files}

    def rewind(self, position: Mapping[str, int]) -> None:
        """Drop the lines logged after `position`: a run that goes on from the checkpoint made there logs them again.

        Logs that have become shorter since are reported. Copies cannot be shortened; they ignore steps that they have already
        seen, so none appears twice there.
        """
        seen = max((int(row.get("step") or 0) for row in self.logged()), default=-1)
        for file in (self._metrics_file, self._samples_file):
            size = file.stat().st_size if file.exists() else 0
            if size < position.get(file.name, 0):
                print(
                    f"{file} has lost {position[file.name] - size:,} of the {position[file.name]:,} bytes that it had at the "
                    "checkpoint: reports and checks of this run lack what stood there",
                    flush=True,
                )
            if file.exists():
                _cut(file, position.get(file.name, 0))
        for copy in self.copies:
            copy.skip_to(seen)

    def _load_or_make_run_id(self) -> str:
        file = self.run_dir / RUN_FILE
        if "WANDB_SWEEP_ID" in os.environ and "WANDB_RUN_ID" in os.environ:  # the sweep waits for its own run
            return os.environ["WANDB_RUN_ID"]
        if self.record.resume and file.exists():
            run_id = (read_object_or_none(file) or {}).get("run_id")
            if run_id is not None:
                return str(run_id)
            print(f"{file} is not readable; the run goes on under a new id", flush=True)
        return secrets.token_hex(4)

    def _write_record(self) -> None:
        """Write `tracking.json`, from the start, so that a run that was killed can be identified."""
        record = {key: getattr(self.record, key) for key in ("run_id", "stage", "name", "group", "config", "inputs")}
        storage.write_text(self.run_dir / RUN_FILE, json.dumps(record, indent=2))


def _append_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append one strict JSON object a line. The file is opened and closed each time, so a killed run loses nothing."""
    lines = [json.dumps(_finite(row), ensure_ascii=False, allow_nan=False, default=str) + "\n" for row in rows]
    try:
        with file.open("a", encoding="utf-8") as stream:
            stream.writelines(lines)
    except OSError as error:
        raise UserError(
            f"cannot write {file} ({storage.free(file)}): {storage.reason(error)}; "
            "the last checkpoint is intact: mend the disk or free some space, then --resume true"
        ) from error


def _cut(file: Path, size: int) -> None:
    """Shorten a file to the whole lines within its first `size` bytes."""
    with file.open("r+b") as stream:
        stream.truncate(stream.read(size).rfind(b"\n") + 1)


def _finite(value: Any) -> Any:
    """Replace NaN and infinity by None: JSON lacks them, and a key left out would hide that a run diverged."""
    if isinstance(value, Mapping):
        return {str(name): _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
