"""The copy of a run in TensorBoard, MLflow or trackio, by the trackers of accelerate."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlhf.base.errors import UserError, install
from rlhf.run import metrics
from rlhf.run.copies import RunCopy, RunRecord

LONGEST_SETTING = 500
"""Characters of an option's value; MLflow refuses longer ones in some of its stores."""

#: Names of the programs, by the modules to import.
TITLES = {"tensorboard": "TensorBoard", "mlflow": "MLflow", "trackio": "trackio"}


class AcceleratedRun(RunCopy):
    """The run in one of accelerate's trackers: metrics and options, and in MLflow the report page.

    TensorBoard writes to the subfolder `tensorboard` of the run's folder. MLflow and trackio write where they always do, or
    send to the server that their own environment variables name.
    """

    def __init__(self, record: RunRecord, tracker: str) -> None:
        super().__init__(record)
        if find_spec(tracker) is None:
            raise UserError(f"trackers has {tracker}, whose package is missing: {install('trackers')}")
        self.tracker, self.program = tracker, TITLES[tracker]
        self._run: Any = None
        self._seen = -1

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Send metrics of an update, unless an earlier process has sent that update."""
        if step > self._seen:
            self._send("log metrics", {**figures, metrics.UPDATES: float(step)}, step)

    def log_summary(self, figures: Mapping[str, float], step: int) -> None:
        """Send final figures as metrics of the last update."""
        self._send("send the summary", figures, step)

    def _send(self, action: str, figures: Mapping[str, float], step: int) -> None:
        line = {_key(name) if self.tracker == "mlflow" else name: figure for name, figure in figures.items()}
        self._later(action, lambda: self._run.log(line, step=step))

    def log_histograms(self, values: Mapping[str, Sequence[float]], step: int) -> None:
        """Send the distributions of an update's values to TensorBoard; the others have no such panel."""

        def send() -> None:
            import numpy as np

            for name, numbers in values.items():
                self._run.writer.add_histogram(name, np.array(numbers), global_step=step)

        if self.tracker == "tensorboard" and step > self._seen:
            self._later("log histograms", send)

    def log_page(self, file: Path) -> None:
        """Store the run's report page in MLflow."""
        if self.tracker == "mlflow":
            self._later("store the report page", lambda: self._run.log_artifact(str(file)))

    def skip_to(self, step: int) -> None:
        """Ignore lines up to this step from now on."""
        self._seen = max(self._seen, step)

    def _open(self) -> None:
        from accelerate import tracking

        # Both would look for accelerate's state of the process, which is transformers' to set up.
        tracking.logger = logging.getLogger(tracking.__name__)  # type: ignore[assignment]
        opened = getattr(self, f"_{self.tracker}")(tracking)
        opened.main_process_only = False
        opened.start()
        self._run, self._is_open = opened, True
        opened.store_init_configuration(_settings(self.record.config))

    def _close(self, exit_code: int) -> None:
        if self.tracker == "mlflow":
            import mlflow

            mlflow.end_run("FINISHED" if exit_code == 0 else "FAILED")
        else:
            self._run.finish()

    def _tensorboard(self, tracking: Any) -> Any:
        folder = self.record.run_dir / "tensorboard"
        if not self.record.resume and folder.exists():
            previous = folder.with_name("tensorboard.previous")
            shutil.rmtree(previous, ignore_errors=True)
            folder.rename(previous)
        return tracking.TensorBoardTracker(self.record.name, str(folder))

    def _mlflow(self, tracking: Any) -> Any:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it is on by default
        import mlflow

        if "MLFLOW_TRACKING_URI" not in os.environ and find_spec("sqlalchemy") is None:
            # The default, an SQLite file, needs the full package.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            mlflow.set_tracking_uri("mlruns")
        record = self.record
        earlier = mlflow.search_runs(
            experiment_names=[record.project], filter_string=f"tags.run_id = '{record.run_id}'", output_format="list"
        )
        tags = {"run_id": record.run_id, "stage": record.stage, "group": record.group}
        return tracking.MLflowTracker(
            record.project,
            run_id=earlier[0].info.run_id if earlier else None,
            run_name=record.name,
            tags=tags | dict.fromkeys(map(_key, record.tags), ""),
            description=record.notes,
        )

    def _trackio(self, tracking: Any) -> Any:
        return tracking.TrackioTracker(
            self.record.project,
            name=f"{self.record.name}-{self.record.run_id}",
            group=self.record.group,
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as plain values: lists and missing values as JSON, long texts cut."""
    return {
        name: value if isinstance(value, bool | int | float) else _text(value)[:LONGEST_SETTING]
        for name, value in config.items()
    }


def _key(name: str) -> str:
    """Return a tag or a metric's name in the characters that MLflow allows; it refuses a whole line for one other."""
    return re.sub(r"[^\w .:/-]", "_", name, flags=re.ASCII)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
