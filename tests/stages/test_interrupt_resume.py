"""Ctrl-C and SIGTERM in the middle of a stage, and going on afterwards, with real signals to real processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from toys import Call

from rlhf.registry import Registry
from rlhf.run import checkpoint

#: Long enough that a signal sent after the third update arrives before the last.
LONG = {
    "sft": ["--max_steps", "60", "--eval_steps", "30", "--save_steps", "30"],
    "reward": ["--max_steps", "60", "--eval_steps", "30", "--save_steps", "30", "--logging_steps", "7"],
    "ppo": ["--total_episodes", "96", "--save_steps", "50", "--num_logged_samples", "2"],
}
LAST = {"sft": 60, "reward": 60, "ppo": 12}
#: Figures of the wall clock.
CLOCK = re.compile(r"time|rollout/tokens_per_second")


@dataclass(frozen=True)
class Long:
    """A stage that runs for a while, in a registry and an output folder of its own."""

    stage: str
    registry: Path
    output: Path
    words: list[str]

    @property
    def folder(self) -> Path:
        return self.output / self.stage

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def metrics(self) -> list[dict[str, Any]]:
        """The complete lines of metrics.jsonl."""
        file = self.folder / "metrics.jsonl"
        text = file.read_text() if file.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def stop(self, number: int, *, after: int = 3, times: int = 1) -> tuple[int, str]:
        """Runs the stage in a process, sends the signal once update `after` is logged; exit code and stderr."""
        process = subprocess.Popen(
            [sys.executable, "-m", f"rlhf.stages.{self.stage}", *self.words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            deadline = time.monotonic() + 120
            while max((m["step"] for m in self.metrics()), default=0) < after:
                assert process.poll() is None, process.communicate()[1][-3000:]
                assert time.monotonic() < deadline
                time.sleep(0.005)
            for _ in range(times):
                os.kill(process.pid, number)
            _, stderr = process.communicate(timeout=120)
        finally:
            process.kill()
        return process.returncode, stderr


@pytest.fixture
def long(tmp_path: Path, toy_config: Path, finished: tuple[Path, Path]) -> Callable[..., Long]:
    """`long("sft")`; each call makes a run in a place of its own."""

    def make(stage: str, place: str = "a") -> Long:
        registry, output = tmp_path / place / "registry", tmp_path / place / "out"
        for made in ("sft", "reward"):
            if made != stage:
                shutil.copytree(finished[0] / made, registry / made)
        places = ["--registry", str(registry), "--output_dir", str(output), "--wandb_mode", "disabled"]
        return Long(stage, registry, output, ["--config", str(toy_config / f"{stage}.yaml"), *LONG[stage], *places])

    return make


def partials(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.name.startswith(".partial")]


def weights(registry: Path, stage: str) -> bytes:
    return (Registry(registry).get(f"{stage}/toy").path / "adapter_model.safetensors").read_bytes()


def test_a_second_run_in_the_same_folder_is_refused(long: Callable[..., Long], call: Callable[..., Call]) -> None:
    """Two runs whose metrics and checkpoints mix, so that one resumes from the other's and registers its weights."""
    run = long("sft")
    with subprocess.Popen(
        [sys.executable, "-m", "rlhf.stages.sft", *run.words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as first:
        deadline = time.monotonic() + 120
        while not run.metrics():
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(first.pid, signal.SIGSTOP)  # so that it is still there, however slow this machine is
        before = {file: file.read_bytes() for file in run.folder.rglob("*") if file.is_file()}
        second = call("rlhf.stages.sft", *run.words, "--seed", "7")
        assert second.code == 2 and f"in use by process {first.pid} on " in second.err, second.err
        assert {file: file.read_bytes() for file in run.folder.rglob("*") if file.is_file()} == before
        os.kill(first.pid, signal.SIGCONT)
        assert first.wait(120) == 0
    assert [a.reference for a in Registry(run.registry).list() if a.stage == "sft"] == ["sft/toy@1"]


@pytest.mark.parametrize(
    "stage, number, code", [("sft", signal.SIGINT, 130), ("reward", signal.SIGTERM, 143), ("ppo", signal.SIGINT, 130)]
)
def test_stop_and_resume(
    long: Callable[..., Long], call: Callable[..., Call], stage: str, number: int, code: int
) -> None:
    """A stop that loses the updates since the last checkpoint, registers half a run, or goes on from another state.

    No checkpoint is due where the signal comes, so the one that is there was made because of it. The resumed run must end
    in the very bytes of a run that nobody stopped: a forgotten optimiser state, scheduler, or position in the data changes them.
    """
    run = long(stage)
    returned, stderr = run.stop(number)
    assert returned == code, stderr[-3000:]
    assert "Traceback" not in stderr
    (made,) = run.checkpoints.glob("checkpoint-*")
    step = int(made.name.rsplit("-")[-1])
    assert 3 <= step < LAST[stage]
    assert not (run.registry / stage).exists() and not partials(run.output) and not partials(run.registry)

    resumed = call(f"rlhf.stages.{stage}", *run.words, "--resume", "true")
    assert resumed.code == 0, resumed.err[-3000:]
    steps = [m["step"] for m in run.metrics()]
    every = 7 if stage == "reward" else 1
    assert steps == sorted(steps)
    assert set(range(every, LAST[stage] + 1, every)) <= set(steps)

    whole = long(stage, "whole")
    assert call(f"rlhf.stages.{stage}", *whole.words).code == 0
    logged, expected = (
        Counter((m["step"], name, m[name]) for m in r.metrics() for name in m if not CLOCK.match(name))
        for r in (run, whole)
    )
    assert logged == expected, "a figure is logged twice, not at all, or is the mean of what came after the stop only"
    assert weights(run.registry, stage) == weights(whole.registry, stage)
    ours, theirs = (Registry(r.registry).read(f"{stage}/toy").manifest.metrics for r in (run, whole))
    for name in ("seconds", "phases", "seconds_per_update"):
        ours.pop(name, None), theirs.pop(name, None)
    assert ours == theirs


def test_second_signal_stops_at_once(long: Callable[..., Long]) -> None:
    """Whoever presses Ctrl-C twice does not want to wait for an update of ten minutes; still nothing is half-written."""
    run = long("ppo")
    returned, stderr = run.stop(signal.SIGINT, times=2)
    assert returned == 130, stderr[-3000:]
    assert "Traceback" not in stderr
    assert not (run.registry / "ppo").exists() and not partials(run.registry)


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_resume_of_a_finished_run_trains_no_further(
    long: Callable[..., Long], call: Callable[..., Call], stage: str
) -> None:
    """After a full disk at the very end all updates are done: one more would make it another model."""
    run = long(stage)
    short = [*run.words, "--max_steps", "4", "--eval_steps", "2", "--save_steps", "2"]
    short = [*run.words, "--total_episodes", "16"] if stage == "ppo" else short
    assert call(f"rlhf.stages.{stage}", *short).code == 0
    before = weights(run.registry, stage)
    assert call(f"rlhf.stages.{stage}", *short, "--resume", "true").code == 0
    assert max(m["step"] for m in run.metrics()) == (2 if stage == "ppo" else 4)
    assert weights(run.registry, stage) == before


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_resume_without_a_checkpoint_starts(long: Callable[..., Long], call: Callable[..., Call], stage: str) -> None:
    """`--resume true` in a script that is run for the first time."""
    run = long(stage)
    short = (
        ["--total_episodes", "16"] if stage == "ppo" else ["--max_steps", "4", "--eval_steps", "2", "--save_steps", "2"]
    )
    assert call(f"rlhf.stages.{stage}", *run.words, *short, "--resume", "true").code == 0


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_checkpoints_of_other_options_are_refused(
    long: Callable[..., Long], call: Callable[..., Call], stage: str
) -> None:
    """Half a run with one learning rate and half with another would be registered under the second one's recipe."""
    run = long(stage)
    short = (
        ["--total_episodes", "16"] if stage == "ppo" else ["--max_steps", "4", "--eval_steps", "2", "--save_steps", "2"]
    )
    assert call(f"rlhf.stages.{stage}", *run.words, *short).code == 0
    complaint = call(
        f"rlhf.stages.{stage}", *run.words, *short, "--learning_rate", "2e-2", "--resume", "true"
    ).complaint
    assert "learning_rate" in complaint and str(run.checkpoints) in complaint


def test_new_run_in_an_old_folder_keeps_its_own_checkpoints(
    long: Callable[..., Long], call: Callable[..., Call]
) -> None:
    """An earlier, longer run left checkpoint-3 and -4. A new one, on an SFT policy trained anew, saved checkpoint-1, deleted
    it as older than those two, and a resume went on from the weights of the other policy, without a word."""
    run = long("ppo")
    old = [*run.words, "--total_episodes", "32", "--save_steps", "1"]
    assert call("rlhf.stages.ppo", *old).code == 0
    assert checkpoint.latest(run.checkpoints) == run.checkpoints / "checkpoint-4"
    new = [*run.words, "--total_episodes", "16", "--save_steps", "1"]
    assert call("rlhf.stages.ppo", *new).code == 0
    assert sorted(p.name for p in run.checkpoints.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_resume_on_another_parent_is_refused(
    long: Callable[..., Long], call: Callable[..., Call], toy_config: Path
) -> None:
    """The options are the same, but sft/toy is a new version: the checkpoint's adapter belongs on other base weights."""
    run = long("reward")
    short = [*run.words, "--max_steps", "4", "--eval_steps", "2", "--save_steps", "2"]
    assert call("rlhf.stages.reward", *short).code == 0
    again = ["--config", toy_config / "sft.yaml", "--seed", "1", "--max_steps", "2", "--registry", run.registry]
    assert call("rlhf.stages.sft", *again, "--output_dir", run.output, "--wandb_mode", "disabled").code == 0
    assert "sft" in call("rlhf.stages.reward", *short, "--resume", "true").complaint


def test_ctrl_c_while_libraries_are_imported_is_one_line() -> None:
    """Catches: a traceback in the first seconds of `python -m rlhf.stages.X`, when nothing of ours runs yet."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "rlhf.stages.sft", "--help"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:  # the first import after the package itself
        if line.rpartition("|")[2].strip() == "rlhf":
            process.send_signal(signal.SIGINT)
            break
    said = [line for line in process.stderr if not line.startswith("import time:")]
    assert process.wait() == 130
    assert said == ["interrupted\n"]


@pytest.mark.parametrize("name", ["generators.safetensors", "optimizer.safetensors", "made_of.json"])
def test_no_flip_is_resumed_from(
    name: str, finished: tuple[Path, Path], toy_config: Path, tmp_path: Path, call: Callable[..., Call]
) -> None:
    """Bug: at the last step transformers reads the weights alone, so a run with other damaged files was registered."""
    checkpoints = shutil.copytree(finished[1] / "sft", tmp_path / "out" / "sft") / "checkpoints"
    file = checkpoints / name if name == "made_of.json" else checkpoints / "checkpoint-4" / name
    content = bytearray(file.read_bytes())
    content[content.index(b'"inputs"') + 1 if name == "made_of.json" else -5] ^= 1
    file.write_bytes(content)
    places = ["--registry", tmp_path / "registry", "--output_dir", tmp_path / "out", "--resume", "true"]
    done = call("rlhf.stages.sft", "--config", toy_config / "sft.yaml", *places)
    assert name in done.complaint and not (tmp_path / "registry").exists()
