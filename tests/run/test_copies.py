"""Copies of a run in TensorBoard, MLflow and trackio: resumed, refused, redacted, and gone wrong."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf.run import copies
from rlhf.run.tracker import Tracker

OFFLINE = ("tensorboard", "mlflow")


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """MLflow's store of this test."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "mlruns"))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return tmp_path / "mlruns"


def make(run_dir: Path, *trackers: str, **options: Any) -> Tracker:
    defaults: dict[str, Any] = {"stage": "ppo", "name": "demo-ppo", "group": "demo", "config": {}}
    return Tracker(run_dir, trackers=trackers, **{**defaults, **options})


def scalars(run_dir: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir / "tensorboard" / "demo-ppo")).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def mlflow_runs(store: Path) -> list[Any]:
    client = mlflow.MlflowClient(str(store))
    return list(client.search_runs([e.experiment_id for e in client.search_experiments()]))


def test_a_resumed_run_is_one_run_and_repeats_no_step(tmp_path: Path, store: Path) -> None:
    """A resume that starts a second MLflow run, or that draws the updates after its checkpoint twice."""
    position: dict[str, int] = {}
    for resume in (False, True):
        with make(tmp_path / "run", *OFFLINE, resume=resume) as tracker:
            if resume:
                tracker.rewind(position)
            for step in (3, 4, 5) if resume else (1, 2, 3, 4):
                tracker.log({"objective/kl": float(step)}, step)
                position = tracker.position() if step == 2 else position
            tracker.log_summary({"score_after": 0.5, "phases": []})
    assert scalars(tmp_path / "run", "objective/kl") == [(step, float(step)) for step in range(1, 6)]
    (run,) = mlflow_runs(store)
    history = mlflow.MlflowClient(str(store)).get_metric_history(run.info.run_id, "objective/kl")
    assert [(m.step, m.value) for m in history] == [(step, float(step)) for step in range(1, 6)]
    assert run.data.metrics["summary/score_after"] == 0.5 and "summary/phases" not in run.data.metrics


def test_a_new_run_in_an_old_folder_has_its_own_curves(tmp_path: Path, store: Path) -> None:
    """Two runs in one event file, whose curves jump back and forth."""
    for value in (1.0, 2.0):
        with make(tmp_path / "run", *OFFLINE) as tracker:
            tracker.log({"objective/kl": value}, 1)
    assert scalars(tmp_path / "run", "objective/kl") == [(1, 2.0)]
    assert {run.data.metrics["objective/kl"] for run in mlflow_runs(store)} == {1.0, 2.0}


def test_secrets_and_texts_stay_here(tmp_path: Path, store: Path) -> None:
    """A key among the options, or an answer, in somebody's dashboard; lists and missing values that a program refuses."""
    config = {"lr": 1e-5, "api_key": "sesame", "reward": ["a", "b"], "gold": None, "long": "x" * 9000}
    with make(tmp_path / "run", *OFFLINE, config=config, wandb_tags=["first", "späť!"], wandb_notes="why") as tracker:
        tracker.log_samples([{"prompt": "p", "response": "an answer", "score": 1.0}], 1)
        tracker.log({"objective/kl": float("nan"), "reward/a folder!": 2.0}, 1)
    (run,) = mlflow_runs(store)
    assert run.data.params == {
        "lr": "1e-05", "api_key": "***", "reward": '["a", "b"]', "gold": "null", "long": "x" * 500,
    }  # fmt: skip
    assert run.data.metrics["reward/a folder_"] == 2.0
    assert {"first", "sp___"} <= run.data.tags.keys()  # MLflow refuses other characters
    assert run.data.tags["mlflow.note.content"] == "why"
    sent = b"".join(
        f.read_bytes() for d in (store, tmp_path / "run" / "tensorboard") for f in d.rglob("*") if f.is_file()
    )
    assert b"sesame" not in sent and b"an answer" not in sent


def test_a_failed_run_is_marked(tmp_path: Path, store: Path) -> None:
    """A crash that looks like a finished run."""
    with pytest.raises(KeyError), make(tmp_path / "run", "mlflow"):
        raise KeyError
    assert [run.info.status for run in mlflow_runs(store)] == ["FAILED"]


@pytest.mark.parametrize("tracker", OFFLINE)
@pytest.mark.parametrize("broken", ["start", "log"])
def test_a_broken_copy_costs_one_warning(
    tracker: str, broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk or a server that is gone ends a training of many hours, or warns at every step."""
    from accelerate import tracking

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(f"no space left, key {'hf_' + 'k' * 30}")

    monkeypatch.setattr(tracking.LOGGER_TYPE_TO_CLASS[tracker], broken, fail)
    with make(tmp_path / "run", tracker) as run:
        for step in (1, 2, 3):
            run.log({"objective/kl": step}, step)
    (warning,) = [
        r.getMessage() for r in caplog.records if r.name == copies.logger.name and r.levelno >= logging.WARNING
    ]
    assert "could not" in warning and "no space left" in warning and "kkkk" not in warning
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


def test_an_mlflow_server_that_is_gone_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """MLflow tries again for minutes; a run that waits for it at each line."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setattr(copies, "FINISH_TIMEOUT_SECONDS", 30.0)
    start = time.monotonic()
    with make(tmp_path / "run", "mlflow") as run:
        run.log({"objective/kl": 1.0}, 1)
        assert time.monotonic() - start < 5
    assert "MLflow" in caplog.text and time.monotonic() - start < 60


def test_the_report_page_is_an_artifact_in_mlflow(tmp_path: Path, store: Path) -> None:
    """A page that `log_report` asked for and that is in no run."""
    (page := tmp_path / "report.html").write_text("<p>page</p>")
    with make(tmp_path / "run", *OFFLINE) as tracker:
        tracker.log_page(page)
    (run,) = mlflow_runs(store)
    (kept,) = mlflow.MlflowClient(str(store)).list_artifacts(run.info.run_id)
    assert kept.path == "report.html"


TRACKIO = """
import json, sys
from rlhf.run.tracker import Tracker
folder = sys.argv[1]
for resume in (False, True):
    with Tracker(folder, stage="ppo", name="demo-ppo", group="demo", config={"lr": 0.5, "api_key": "sesame"},
                 trackers=["trackio"], resume=resume) as tracker:
        if resume:
            tracker.rewind(position)
        for step in ((2, 3) if resume else (1, 2)):
            tracker.log({"objective/kl": step / 2, "eval/gold": 1.0}, step)
            position = position if step > 1 else tracker.position()
        tracker.log_samples([{"prompt": "p", "response": "an answer"}], step)
from trackio.sqlite_storage import SQLiteStorage
(run,) = SQLiteStorage.get_runs("rlhf")
logs = SQLiteStorage.get_logs("rlhf", run)
config = SQLiteStorage.get_run_config("rlhf", run)
print(json.dumps({"run": run, "id": tracker.run_id, "logs": logs, "config": config}, default=str))
"""


def test_trackio_reads_every_figure(tmp_path: Path) -> None:
    """A line that is missing, twice, or in a second run after a resume; a key among the options."""
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", TRACKIO, str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "could not" not in done.stderr, done.stderr[-3000:]
    read = json.loads(done.stdout.splitlines()[-1])
    assert read["run"] == f"demo-ppo-{read['id']}"
    assert [(row["step"], row["objective/kl"], row["eval/gold"]) for row in read["logs"]] == [
        (1, 0.5, 1.0), (2, 1.0, 1.0), (3, 1.5, 1.0),
    ]  # fmt: skip
    assert read["config"]["lr"] == 0.5 and "sesame" not in done.stdout and "an answer" not in done.stdout
