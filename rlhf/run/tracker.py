"""The record of a run: `metrics.jsonl`, `samples.jsonl` and `tracking.json` in its folder, and a copy in Weights & Biases.

Reports are made from the local files. Only `rlhf.run.wandb` and `rlhf.sharing.hub` import wandb, and only when a run needs it.
"""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rlhf.base import storage
from rlhf.base.errors import UserError
from rlhf.base.json_files import read_jsonl, read_object_or_none
from rlhf.run import terminal
from rlhf.run.metrics import reward_kl_points
from rlhf.run.wandb import WandbRun

RUN_FILE = "tracking.json"
"""Holds the run's id, under which a resumed run goes on."""


class Tracker(WandbRun):
    """The metric sink of one stage's run; a context manager.

    Its arguments are those of `WandbRun`. With `resume` it goes on with the files in the folder; otherwise it moves those of an
    earlier run aside, to `*.previous.jsonl`.
    """

    def __enter__(self) -> Tracker:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        for file in self._files():
            if self.resume:
                _cut(file, file.stat().st_size)  # a killed run may have left half a line
            else:
                file.replace(file.with_suffix(".previous.jsonl"))
        self.run_id = self._load_or_make_run_id()
        self._write_record()
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish(exit_code=0 if kind is None else 1)

    @property
    def _metrics_file(self) -> Path:
        return self.run_dir / "metrics.jsonl"

    @property
    def _samples_file(self) -> Path:
        return self.run_dir / "samples.jsonl"

    def _files(self) -> list[Path]:
        return [file for file in (self._metrics_file, self._samples_file) if file.exists()]

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write one line with these metrics, and send them to W&B. `step` is in updates and never goes down."""
        figures = {name: float(value) for name, value in metrics.items()}
        _append_lines(self._metrics_file, [{"step": int(step), "time": time.time(), **figures}])
        terminal.show_metrics(figures)
        self._send_metrics(figures, int(step))

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Append rows of text and scores. The first row decides the columns of the W&B table."""
        if not rows:
            return
        _append_lines(self._samples_file, [{"step": int(step), **row} for row in rows])
        terminal.show_samples(rows)
        self._send_samples(rows, int(step))

    def log_frontier(self) -> None:
        """Send the reward-KL frontier of a PPO run as a panel: the score of each update over the root of its KL."""
        points = reward_kl_points(self.logged())
        if points:
            title = "Score over the square root of KL"
            self.log_scatter("frontier/score", points, "sqrt_kl", "score", title, int(points[-1]["step"]))

    def use_artifact(self, reference: str, hash: str, path: str | Path | None = None) -> None:
        """Record that this run starts from an artefact, as `WandbRun` does, in `tracking.json` too."""
        super().use_artifact(reference, hash, path)
        self._write_record()

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

        Logs that have become shorter since are reported. The history in W&B cannot be shortened; it ignores steps that it has
        already seen, so none appears twice there.
        """
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

    def _load_or_make_run_id(self) -> str:
        file = self.run_dir / RUN_FILE
        if self.resume and file.exists():
            run_id = (read_object_or_none(file) or {}).get("run_id")
            if run_id is not None:
                return str(run_id)
            self._warn(f"{file} is not readable; a new W&B run is started")
        return secrets.token_hex(4)

    def _write_record(self) -> None:
        """Write `tracking.json`, from the start, so that a run that was killed can be identified."""
        record = {key: getattr(self, key) for key in ("run_id", "stage", "name", "group", "config", "inputs")}
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
