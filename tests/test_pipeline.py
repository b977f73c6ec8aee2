"""The whole chain at toy size, through the command line, as its user runs it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

#: A pipeline of one stage, which takes 10 ms an update and does what the last word says. The stage is found in `sys.modules`: its
#: process imports this script again, and no library.
SCRIPT = """
import os, signal, sys, time, types
from pathlib import Path
from rlhf.base.errors import UserError, run_command
from rlhf.base.interrupt import StopRequest
from rlhf.pipeline import _run_stage

def run(config, reuse):
    if config == "fail": raise UserError("no such data")
    if config == "crash": raise ValueError("http://me:pw1234@host")
    if config == "killed": os.kill(os.getpid(), signal.SIGKILL)
    with StopRequest() as stop:
        Path("started").write_text(str(os.getpid()))
        for _ in range(3000 if config == "long" else 3):
            time.sleep(0.01)
            if stop.requested:
                Path("saved").touch()
                while Path("slow").exists(): time.sleep(0.01)
                stop.raise_if_requested()
    return types.SimpleNamespace(reference="sft/toy@1")

sys.modules["rlhf.stages.toy"] = types.ModuleType("rlhf.stages.toy")
sys.modules["rlhf.stages.toy"].run = run
if __name__ == "__main__":
    run_command(lambda: print("made", _run_stage("toy", sys.argv[1])))
"""


def wait_for(happened: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def start(tmp_path: Path) -> Callable[[str], subprocess.Popen[str]]:
    """Starts the pipeline as a terminal does, in a process group of its own."""
    (tmp_path / "script.py").write_text(SCRIPT)

    def run(how: str) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        command = [sys.executable, "script.py", how]
        environment = {**os.environ, "PYTHONPATH": ":".join(path for path in sys.path if path)}
        return subprocess.Popen(command, cwd=tmp_path, text=True, process_group=0, env=environment, **pipes)

    return run


@pytest.mark.parametrize(
    "number, everybody, code", [(signal.SIGTERM, False, 143), (signal.SIGINT, False, 130), (signal.SIGINT, True, 130)]
)
def test_a_stop_reaches_the_stage(
    start: Callable[[str], subprocess.Popen[str]], tmp_path: Path, number: int, everybody: bool, code: int
) -> None:
    """Bug: SIGTERM ends the pipeline and the stage trains on, or the pipeline waits for its last update; a Ctrl-C on the terminal
    that comes twice, straight and through the pipeline, and so stops at once, without a checkpoint."""
    process = start("long")
    wait_for((tmp_path / "started").exists)
    os.killpg(process.pid, number) if everybody else process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and (tmp_path / "saved").exists() and not out
    assert err == "stopping after this update, with a checkpoint (once more: at once)\n"


def test_a_second_ctrl_c_stops_at_once(start: Callable[[str], subprocess.Popen[str]], tmp_path: Path) -> None:
    """Bug: a stage that cannot be stopped before the end of a long update."""
    process = start("long")
    (tmp_path / "slow").touch()
    wait_for((tmp_path / "started").exists)
    process.send_signal(signal.SIGINT)
    wait_for((tmp_path / "saved").exists)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err


def test_a_stage_does_not_outlive_its_pipeline(start: Callable[[str], subprocess.Popen[str]], tmp_path: Path) -> None:
    """Bug: after kill -9 of the pipeline the stage trains on, unseen, and a second start writes into the same folder."""
    process = start("long")
    wait_for(lambda: (tmp_path / "started").exists() and (tmp_path / "started").read_text() != "")
    stage = psutil.Process(int((tmp_path / "started").read_text()))
    process.kill()
    process.communicate(timeout=60)
    wait_for(lambda: not stage.is_running() or stage.status() == psutil.STATUS_ZOMBIE, seconds=20)
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    "how, code, out, err",
    [
        ("short", 0, "made sft/toy@1", ""),
        ("fail", 2, "", "error: no such data"),
        ("killed", 2, "", "error: the toy stage was killed by signal 9"),
        ("crash", 1, "", "ValueError: http://***@host"),
    ],
)
def test_the_pipeline_ends_as_its_stage(
    start: Callable[[str], subprocess.Popen[str]], how: str, code: int, out: str, err: str
) -> None:
    """Bug: a traceback of the process pool on top of the one clear line, or success after a failure."""
    process = start(how)
    said, complained = (text.strip() for text in process.communicate(timeout=60))
    assert (process.returncode, said) == (code, out)
    assert err in complained if err else complained == ""
    assert complained.count("Traceback") == (how == "crash") and "pw1234" not in complained


def test_results_hold_every_promised_figure(finished: tuple[Path, Path]) -> None:
    """A figure that a stage forgets to report, or reports under another name, would be missing from results.json."""
    results = json.loads((finished[1] / "results.json").read_text())
    promised = {
        "sft": "eval_loss_before eval_loss_after seconds",
        "reward": "accuracy accuracy_held_out_raters human_ceiling vader_accuracy pairs seconds",
        "ppo": "episodes updates seconds seconds_per_update kl score_before score_after gold_positive_before "
        "gold_positive_after gold_negative_before gold_negative_after reward_positive_before reward_positive_after "
        "distinct2_before distinct2_after length_before length_after stop_rate_after",
    }
    for stage, names in promised.items():
        assert set(names.split()) <= results[stage].keys()
    assert results["ppo"]["episodes"] == 16 and results["ppo"]["updates"] == 2
    assert results["total_seconds"] > 0 and results["peak_rss_gb"] > 0
    assert (finished[1] / "report.html").stat().st_size > 10_000


def test_a_folder_of_one_stage_ends_with_the_commands_that_come_next(
    finished: tuple[Path, Path],
    toy_config: Path,
    tmp_path: Path,
    command: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """Catches: a pipeline without PPO, as `rlhf init` writes it for data without preferences, that crashes at its end."""
    folder = tmp_path / toy_config.name
    folder.mkdir()
    shutil.copy(toy_config / "sft.yaml", folder)
    done = command("rlhf.pipeline", "--config", folder, "--registry", finished[0], "--output_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("skipped") == 1 and (tmp_path / "out" / "report.html").exists()
    assert "next:\n  rlhf reward --policy sft/" in done.stdout


def test_second_run_skips_what_is_registered(
    finished: tuple[Path, Path], toy_config: Path, command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """A recipe hash that depends on the place or the time would train everything again."""
    done = command("rlhf.pipeline", "--config", toy_config, "--registry", finished[0], "--output_dir", finished[1])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("skipped") == 3
