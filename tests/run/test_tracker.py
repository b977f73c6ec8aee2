"""Tracking: the local record is complete and strict, and nothing that W&B does can end a run."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import wandb
from transformers import TrainerControl, TrainerState, TrainingArguments
from wandb_reader import OfflineRun, table_rows, wandb_records

from rlhf.base.errors import UserError
from rlhf.run import copies
from rlhf.run import wandb as wandb_module
from rlhf.run.callbacks import MetricsCallback, ProgressCallback, house_metrics
from rlhf.run.timing import PhaseTimer, peak_rss_gb
from rlhf.run.tracker import Tracker
from rlhf.run.wandb import resolve_wandb_mode, split_reference

KNOCK = wandb_module._knock


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test may find a key of the person who runs it, reach a server, or inherit another test's W&B settings."""
    wandb.teardown()
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DATA_DIR", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(wandb_module, "_knock", lambda: None)


def make(run_dir: Path, **options: Any) -> Tracker:
    defaults: dict[str, Any] = {
        "stage": "ppo",
        "name": "demo-ppo",
        "group": "demo",
        "config": {},
        "wandb_mode": "disabled",
        "log_texts": True,
    }
    return Tracker(run_dir, **{**defaults, **options})


def rows_of(file: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in file.read_text(encoding="utf-8").splitlines()]


# --- Local files ----------------------------------------------------------------------------------------------------


def test_every_log_is_on_disk_at_once_and_is_strict_json(tmp_path: Path) -> None:
    """Bug: lines sit in a buffer when the run is killed; NaN makes the file unreadable, or its key disappears."""
    with make(tmp_path) as tracker:
        tracker.log({"objective/kl": 3.5, "ppo/value_loss": math.nan, "ppo/ratio_max": math.inf}, step=4)
        row = rows_of(tmp_path / "metrics.jsonl")[0]
        tracker.log_samples([{"prompt": "a\nb", "response": "ü", "score": -math.inf}], step=4)
        sample = rows_of(tmp_path / "samples.jsonl")[0]
    assert row.pop("time") > 1.7e9
    assert row == {"step": 4, "objective/kl": 3.5, "ppo/value_loss": None, "ppo/ratio_max": None}
    assert sample == {"step": 4, "prompt": "a\nb", "response": "ü", "score": None}


def test_resume_keeps_the_run_and_repeats_no_step(tmp_path: Path) -> None:
    """Bug: steps after the checkpoint appear twice, half a line swallows the next one, or W&B gets a second run."""
    with make(tmp_path) as tracker:
        first_id = tracker.run_id
        for step in range(1, 6):
            tracker.log({"objective/kl": step}, step)
            tracker.log_samples([{"response": f"r{step}"}], step)
            if step == 3:
                position = tracker.position()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "objec')
    with make(tmp_path, resume=True) as tracker:
        assert tracker.run_id == first_id
        tracker.rewind(position)
        for step in (4, 5):
            tracker.log({"objective/kl": 10 * step}, step)
    metrics = [(row["step"], row["objective/kl"]) for row in rows_of(tmp_path / "metrics.jsonl")]
    assert metrics == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50)]
    assert [row["step"] for row in rows_of(tmp_path / "samples.jsonl")] == [1, 2, 3]


def test_what_comes_after_a_checkpoint_of_the_same_step_is_forgotten_too(tmp_path: Path) -> None:
    """Bug: the figures of a report card, logged at the last step after the last checkpoint, appear twice after a resume; and a
    run that was killed before its first checkpoint logs all its steps twice."""
    with make(tmp_path) as tracker:
        before = tracker.position()
        tracker.log({"reward/loss": 1.0}, 4)
        position = tracker.position()
        tracker.log({"reward/accuracy": 0.5}, 4)
    with make(tmp_path, resume=True) as tracker:
        tracker.rewind(position)
        assert [row.get("reward/loss") for row in rows_of(tmp_path / "metrics.jsonl")] == [1.0]
        tracker.rewind(before)
    assert before == {} and (tmp_path / "metrics.jsonl").read_bytes() == b""


@pytest.mark.parametrize("harm", ["deleted", "cut"])
def test_lost_lines_are_said_when_a_run_goes_on(harm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a log that was deleted or cut before a resume, so that reports and checks lack updates without a word."""
    with make(tmp_path) as tracker:
        for step in (1, 2, 3):
            tracker.log({"objective/kl": 1.0}, step)
        position = tracker.position()
    with make(tmp_path, resume=True) as tracker:
        tracker.rewind(position)
    assert "has lost" not in capsys.readouterr().out
    file = tmp_path / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.unlink() if harm == "deleted" else file.write_bytes(lines[0])
    with make(tmp_path, resume=True) as tracker:
        tracker.rewind(position)
    whole, rest = position["metrics.jsonl"], 0 if harm == "deleted" else len(lines[0])
    assert f"metrics.jsonl has lost {whole - rest:,} of the {whole:,} bytes" in capsys.readouterr().out


def test_logs_on_a_full_disk_are_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a traceback out of the log, which nobody connects with the disk, and no word on how to go on."""
    opened = Path.open

    def refuse(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "a":
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(self, mode, *args, **kwargs)

    with make(tmp_path) as tracker:
        monkeypatch.setattr(Path, "open", refuse)
        with pytest.raises(UserError, match=r"metrics\.jsonl .*GB free.*No space left.*--resume"):
            tracker.log({"sft/loss": 1.0}, 1)


def test_a_fresh_run_does_not_continue_the_file_of_an_old_one(tmp_path: Path) -> None:
    """Bug: a second run in the same folder appends to the first one's metrics, and the curves run twice."""
    ids = set()
    for value in (1.0, 2.0):
        with make(tmp_path) as tracker:
            tracker.log({"sft/loss": value}, 1)
            ids.add(tracker.run_id)
    assert [row["sft/loss"] for row in rows_of(tmp_path / "metrics.jsonl")] == [2.0]
    assert [row["sft/loss"] for row in rows_of(tmp_path / "metrics.previous.jsonl")] == [1.0]
    assert len(ids) == 2


# --- W&B ------------------------------------------------------------------------------------------------------------


def test_an_offline_run_holds_metrics_samples_lineage_and_config(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Bug: what a later `wandb sync` would send is incomplete, is stored outside the run, or a banner is printed."""
    run_dir, adapter = tmp_path / "run", tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "weights.safetensors").write_bytes(b"w" * 1000)
    with make(run_dir, wandb_mode="offline", config={"lr": 1e-5, "server": {"api_key": "sesame"}}) as tracker:
        run_id = tracker.run_id
        tracker.use_artifact("sft/demo@2", "abc123", adapter)
        tracker.use_data("outputs/demo/data", {"fingerprint": "f00d", "rows": {"train": 3}, "dropped": {}})
        for step in (1, 2, 3):
            tracker.log({"objective/kl": step / 2, "episodes": 8 * step}, step)
            # the trainer's rows carry their own step; W&B must not get two columns of that name
            tracker.log_samples([{"step": step, "prompt": "p", "score": 1 if step == 1 else None}], step)
        tracker.log_artifact("ppo/demo@1", adapter, {"score": 0.8})
    assert "WANDB_DATA_DIR" not in os.environ
    assert capfd.readouterr() == ("", "")

    records = list(wandb_records(run_dir))
    run = next(record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (run.run_id, run.run_group, run.job_type, run.display_name) == (run_id, "demo", "ppo", "demo-ppo")
    config = {u.key: json.loads(u.value_json) for u in run.config.update}
    assert config["lr"] == 1e-5 and config["server"] == {"api_key": "***"}
    later = [u for record in records if record.WhichOneof("record_type") == "config" for u in record.config.update]
    assert {u.key: json.loads(u.value_json) for u in later}["inputs"] == {"sft/demo@2": "abc123"}

    offline = OfflineRun(run_dir)
    axes = ("_step", "updates", "episodes", "objective/kl")
    assert [tuple(row[k] for k in axes) for row in offline.history] == [
        (1, 1, 8, 0.5),
        (2, 2, 16, 1.0),
        (3, 3, 24, 1.5),
    ]
    rows = [(row["step"], row["prompt"], row["score"]) for row in table_rows(run_dir)]
    assert rows == [(1, "p", 1), (2, "p", None), (3, "p", None)]

    made = offline.made["ppo-demo"]
    assert made.type == "ppo" and "1" in made.aliases
    assert json.loads(made.metadata)["inputs"] == {"sft/demo@2": "abc123"}
    (entry,) = made.manifest.contents
    assert entry.ref == (adapter / "weights.safetensors").as_uri() and not entry.local_path
    assert set(offline.used) == {"sft-demo", "data-demo-data-ppo"}
    assert offline.used["sft-demo"].digest == made.digest, (
        "one folder has one digest, so that both ends are one version"
    )
    assert "2" in offline.used["sft-demo"].aliases and offline.config["data"]["fingerprint"] == "f00d"


def test_a_resumed_table_goes_on(tmp_path: Path) -> None:
    """Bug: the second half of a run replaces the samples of the first, or repeats them under the same name."""
    for resume, steps in ((False, (1, 2)), (True, (3,))):
        with make(tmp_path, wandb_mode="offline", resume=resume) as tracker:
            for step in steps:
                tracker.log_samples([{"prompt": f"p{step}", "response": "r", "score": 0.5, "kl": 0.1}], step)
    assert [row["prompt"] for row in table_rows(tmp_path)] == ["p1", "p2", "p3"]
    files = sorted(f.name for f in tmp_path.glob("wandb/offline-run-*/files/media/table/**/*.table.json"))
    assert len(files) == len(set(files)) == 3


def test_the_record_of_a_run_is_there_from_the_start(tmp_path: Path) -> None:
    """Bug: a run that was killed cannot be compared with others, because nothing says what its options were."""
    with make(tmp_path, config={"lr": 0.5, "api_key": "sesame"}) as tracker:
        tracker.use_artifact("sft/demo@1", "abc")
        record = json.loads((tmp_path / "tracking.json").read_text())
    assert record == {
        "run_id": tracker.run_id, "stage": "ppo", "name": "demo-ppo", "group": "demo",
        "config": {"lr": 0.5, "api_key": "***"}, "inputs": {"sft/demo@1": "abc"},
    }  # fmt: skip


def test_a_resumed_offline_run_has_the_same_id(tmp_path: Path) -> None:
    """Bug: `resume` starts a new W&B run, and the curves of one training are in two places."""
    for resume in (False, True):
        with make(tmp_path, wandb_mode="offline", resume=resume) as tracker:
            tracker.log({"sft/loss": 1.0}, 1 + resume)
    ids = {r.run.run_id for r in wandb_records(tmp_path) if r.WhichOneof("record_type") == "run"}
    assert ids == {tracker.run_id}


class BrokenRun:
    """A W&B run of which every call and attribute raises."""

    def __getattr__(self, name: str) -> Any:
        raise ConnectionError("the server is gone")


@pytest.mark.parametrize("broken", ["missing", "init", "run"])
def test_a_broken_wandb_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    """Bug: a full disk, a lost network or an absent package ends a training of many hours, or warns at every step."""
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)

    def fail(**_: Any) -> None:
        raise ConnectionError(f"no route to host, key {'k' * 40}")

    if broken == "missing":
        monkeypatch.setitem(sys.modules, "wandb", None)
    else:
        monkeypatch.setattr(wandb, "init", fail if broken == "init" else lambda **_: BrokenRun())
    with make(tmp_path, wandb_mode="online") as tracker:
        for step in (1, 2, 3):
            tracker.log({"objective/kl": step}, step)
            tracker.log_samples([{"prompt": "p"}], step)
        tracker.use_artifact("sft/demo@2", "abc")
        tracker.log_artifact("ppo/demo@1", tmp_path, {})
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1 and warnings[0].startswith("W&B could not")
    assert "kkkk" not in warnings[0]
    assert len(rows_of(tmp_path / "metrics.jsonl")) == len(rows_of(tmp_path / "samples.jsonl")) == 3
    assert tracker.run_id


def test_an_unreachable_server_leaves_an_offline_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bug: with the server down a run has no W&B record at all, so that nothing can be synced later."""
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(wandb_module, "INIT_TIMEOUT_SECONDS", 1.0)
    start = time.monotonic()
    with make(tmp_path, wandb_mode="online") as tracker:
        tracker.log({"sft/loss": 1.0}, 1)
    assert time.monotonic() - start < 60
    assert any(record.WhichOneof("record_type") == "history" for record in wandb_records(tmp_path))
    assert len([r for r in caplog.records if r.name == copies.logger.name and r.levelno >= logging.WARNING]) == 1


def test_a_silent_server_leaves_an_offline_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bug: behind a firewall that swallows packets the start of a training waits for minutes, or for ever."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(wandb_module, "INIT_TIMEOUT_SECONDS", 0.5)
        monkeypatch.setattr(wandb_module, "_knock", KNOCK)
        modes: list[str] = []
        monkeypatch.setattr(wandb, "init", lambda mode, **_: (modes.append(mode), BrokenRun())[1])
        start = time.monotonic()
        tracker = make(tmp_path, wandb_mode="online")
        with tracker:
            pass
        assert tracker.copies[0].mode == "offline" and modes == ["offline"]
        assert time.monotonic() - start < 20
    assert len([r for r in caplog.records if r.name == copies.logger.name and r.levelno >= logging.WARNING]) == 1


class StalledRun:
    """A W&B run that was accepted, and of which every call takes half a minute from then on."""

    def define_metric(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        time.sleep(30)


def test_a_server_that_stalls_does_not_hold_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bug: a server that accepts the run and then says nothing, before whose answer the first update does not begin; or training
    that is done while the process waits for hours to upload."""
    monkeypatch.setattr(copies, "FINISH_TIMEOUT_SECONDS", 0.1)
    monkeypatch.setattr(wandb, "init", lambda **_: StalledRun())
    start = time.monotonic()
    with make(tmp_path, wandb_mode="offline") as tracker:
        tracker.use_artifact("sft/demo@1", "abc", tmp_path)
        tracker.use_data("data", {"fingerprint": "ef"})
        tracker.log({"sft/loss": 1.0}, 1)
        tracker.log_samples([{"prompt": "p"}], 1)
        tracker.log_artifact("sft/demo@2", tmp_path, {})
    assert time.monotonic() - start < 5
    assert len(rows_of(tmp_path / "metrics.jsonl")) == len(rows_of(tmp_path / "samples.jsonl")) == 1
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1 and "still uploading" in warnings[0] and "wandb sync" in warnings[0]


def test_calls_that_wait_for_wandb_are_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bug: memory that fills with lines for a server that takes none."""
    monkeypatch.setattr(copies, "FINISH_TIMEOUT_SECONDS", 0.1)
    monkeypatch.setattr(copies, "MAX_WAITING", 3)
    monkeypatch.setattr(wandb, "init", lambda **_: StalledRun())
    with make(tmp_path, wandb_mode="offline") as tracker:
        for step in range(10):
            tracker.log({"sft/loss": 1.0}, step)
        assert tracker.copies[0]._calls.qsize() <= 3
    assert len(rows_of(tmp_path / "metrics.jsonl")) == 10
    assert "has not taken the 3 calls before" in caplog.text


@pytest.mark.parametrize(
    ("mode", "environment", "expected"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "k" * 40}, "online"),
        ("auto", {"WANDB_API_KEY": "k" * 40, "WANDB_MODE": "disabled"}, "disabled"),
        ("auto", {"WANDB_MODE": "dryrun"}, "offline"),
        ("disabled", {"WANDB_MODE": "online"}, "disabled"),
    ],
)
def test_auto_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, mode: str, environment: dict[str, str], expected: str
) -> None:
    """Bug: a run without a key asks for one on a terminal and waits for ever; or WANDB_MODE is ignored."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert resolve_wandb_mode(mode) == expected


def test_a_key_in_netrc_counts(tmp_path: Path) -> None:
    """Bug: after `wandb login`, which writes netrc, runs silently stay offline."""
    (tmp_path / "netrc").write_text("machine example.org login user password x\n")
    assert resolve_wandb_mode("auto") == "offline"
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {'k' * 40}\n")
    assert resolve_wandb_mode("auto") == "online"


def test_a_mistyped_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: `ofline` quietly means something else."""
    with pytest.raises(UserError, match="did you mean 'offline'"):
        resolve_wandb_mode("ofline")
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(UserError, match="WANDB_MODE"):
        resolve_wandb_mode("auto")


def test_references_become_names_that_wandb_allows() -> None:
    """Bug: `sft/demo@2` is refused by W&B, which allows no slash and no @."""
    assert split_reference("sft/demo@2") == ("sft", "sft-demo", "2")
    assert split_reference("reward/my model") == ("reward", "reward-my-model", "")


def test_wandb_is_imported_only_by_a_run_that_uses_it() -> None:
    """Bug: `import wandb` at the top; a machine without it cannot train."""
    code = "import sys, rlhf.run.tracker, rlhf.report.workspace; print('wandb' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "False"
    )


# --- Trainer callbacks ----------------------------------------------------------------------------------------------


def test_trainer_logs_get_the_names_of_the_house() -> None:
    """Bug: the report looks for `sft/token_accuracy` and `reward/eval_accuracy`, and finds TRL's names."""
    logs = {"loss": 2.5, "mean_token_accuracy": 0.4, "grad_norm": 1.2, "learning_rate": 1e-4, "epoch": 0.5, 
            "num_tokens": 900.0, "entropy": 2.2, "train_runtime": 9.0, "note": "text"}  # fmt: skip
    assert house_metrics(logs, "sft") == {
        "sft/loss": 2.5, "sft/token_accuracy": 0.4, "sft/grad_norm": 1.2, "sft/lr": 1e-4, "sft/entropy": 2.2,
    }  # fmt: skip
    logs = {
        "eval_loss": 0.6,
        "eval_accuracy": 0.7,
        "eval_margin": 0.9,
        "eval_runtime": 3.0,
        "eval_samples_per_second": 8.0,
    }
    assert house_metrics(logs, "reward") == {
        "reward/eval_loss": 0.6,
        "reward/eval_accuracy": 0.7,
        "reward/eval_margin": 0.9,
    }


def test_the_metrics_callback_writes_on_the_main_process_only(tmp_path: Path) -> None:
    """Bug: every process of a run appends the same line to the same file."""
    arguments, control = TrainingArguments(output_dir=str(tmp_path / "hf")), TrainerControl()
    with make(tmp_path, stage="reward") as tracker:
        callback = MetricsCallback(tracker, "reward")
        for main in (True, False):
            state = TrainerState(global_step=7, is_world_process_zero=main)
            callback.on_log(arguments, state, control, logs={"loss": 0.7, "margin": 0.1})
            callback.on_log(arguments, state, control, logs={"epoch": 1.0})
    (row,) = rows_of(tmp_path / "metrics.jsonl")
    assert (row["step"], row["reward/loss"], row["reward/margin"]) == (7, 0.7, 0.1)


def test_the_progress_callback_counts_training_and_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: a resumed run counts from 0, evaluation has no progress, or its bar is never closed."""
    arguments, control = TrainingArguments(output_dir=str(tmp_path)), TrainerControl()
    state = TrainerState(global_step=4, max_steps=6)
    callback = ProgressCallback("sft")
    callback.on_train_begin(arguments, state, control)
    for state.global_step in (5, 6):
        callback.on_step_end(arguments, state, control)
    callback.on_log(arguments, state, control, logs={"loss": 2.5, "mean_token_accuracy": 0.4, "epoch": 1.0})
    for _ in range(3):
        callback.on_prediction_step(arguments, state, control, eval_dataloader=[0, 0, 0])
    callback.on_evaluate(arguments, state, control)
    callback.on_train_end(arguments, state, control)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["sft evaluation 3/3 100% took 0:00", "sft 6/6 100% loss 2.5 accuracy 0.4 took 0:00"]


# --- Phases ---------------------------------------------------------------------------------------------------------


def test_phases_add_up_and_see_the_peak_of_their_own_block() -> None:
    """Bug: a phase that runs twice counts once, a failure loses its time, or memory that was freed is not seen."""
    timer = PhaseTimer()
    before = peak_rss_gb()
    for seconds in (0.02, 0.03):
        with timer.phase("rollout"):
            time.sleep(seconds)
    with pytest.raises(KeyError), timer.phase("optimise"):
        size = int((before + 0.2) * 1e9) - int(psutil.Process().memory_info().rss)
        block = b"x" * size  # more than this process ever held, and gone when the phase ends
        del block
        raise KeyError
    rollout, optimise = timer.summary()
    assert (rollout["phase"], optimise["phase"]) == ("rollout", "optimise")
    assert 0.05 <= rollout["seconds"] < 1.0 and optimise["seconds"] > 0
    assert optimise["peak_rss_gb"] > before + 0.1
    assert 0 < rollout["peak_rss_gb"] <= before + 0.05


def test_a_table_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card's tables that never reach W&B, or rows whose cells are in another column."""
    sent: dict[str, Any] = {}

    class Run:
        def define_metric(self, *_: Any, **__: Any) -> None:
            pass

        def finish(self, exit_code: int) -> None:
            pass

        def log(self, content: dict[str, Any], step: int) -> None:
            sent.update(content, step=step)

    monkeypatch.setattr(wandb, "init", lambda **_: Run())
    with make(tmp_path, wandb_mode="offline") as tracker:
        tracker.log_table("card/probes", [{"name": "thanks", "gain": 0.5}, {"gain": -1.0, "name": "filler"}], 7)
        tracker.log_table("card/flags", [], 7)
    assert set(sent) == {"card/probes", "step"} and sent["step"] == 7, "an empty table has no columns"
    assert sent["card/probes"].columns == ["name", "gain"]
    assert sent["card/probes"].data == [["thanks", 0.5], ["filler", -1.0]]


def test_a_table_without_wandb_is_no_error(tmp_path: Path) -> None:
    """A disabled run that fails at its end because there is no W&B to send the card to."""
    with make(tmp_path) as tracker:
        tracker.log_table("card/flags", [{"name": "coin"}], 0)


def test_alerts_reach_wandb_and_cannot_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A critical finding sent as a mere warning, an alert without its text, and a run that ends because an alert failed."""
    sent: list[tuple[str, str, str]] = []

    class Run:
        def define_metric(self, *_: Any, **__: Any) -> None:
            pass

        def finish(self, exit_code: int) -> None:
            pass

        def alert(self, title: str, text: str, level: str) -> None:
            sent.append((title, text, level))
            if title == "third":
                raise OSError("no network")

    with make(tmp_path) as tracker:
        tracker.alert("none", "nobody listens", "warning")
    monkeypatch.setattr(wandb, "init", lambda **_: Run())
    with caplog.at_level(logging.WARNING), make(tmp_path, wandb_mode="offline") as tracker:
        tracker.alert("first", "it bends", "warning")
        tracker.alert("second", "it breaks", "critical")
        tracker.alert("third", "it is gone", "critical")
    levels = ["WARN", "ERROR", "ERROR"]
    assert sent == list(zip(("first", "second", "third"), ("it bends", "it breaks", "it is gone"), levels, strict=True))
    assert "could not send an alert" in caplog.text


def test_what_was_logged_can_be_read_again(tmp_path: Path) -> None:
    """Rows of a run that was resumed, of which the doctor would know nothing."""
    with make(tmp_path) as tracker:
        assert tracker.logged() == [] and tracker.logged_samples() == []
        tracker.log({"a": 1.0, "b": math.nan}, 1)
        tracker.log_samples([{"prompt": "p", "response": "r"}], 1)
        assert [(row["step"], row["a"], row["b"]) for row in tracker.logged()] == [(1, 1.0, None)]
        assert tracker.logged_samples() == [{"step": 1, "prompt": "p", "response": "r"}]
