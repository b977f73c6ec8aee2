"""Progress: readable in a log file, honest about what was done."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rlhf.run import progress as module
from rlhf.run.progress import Progress, format_seconds, progress


class Clock:
    """A monotonic clock that moves only when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


def test_lines_come_at_most_every_ten_seconds_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: a line a step floods the log of a job, or a short run leaves no line at all."""
    clock = Clock(monkeypatch)
    with Progress(24, "ppo") as bar:
        for step in range(24):
            clock.now += 4.0
            bar.update(score=0.8 + step / 1000, kl=3.2)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert len(lines) == 24 // 3 + 1
    assert lines[0] == "ppo 3/24 12% score 0.802 kl 3.2 left 1:24"
    assert lines[-1] == "ppo 24/24 100% score 0.823 kl 3.2 took 1:36"


def test_a_failed_loop_does_not_claim_to_have_finished(capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a crash prints the closing line, which reads as success in a log."""
    with pytest.raises(RuntimeError), Progress(3, "sft") as bar:
        bar.update()
        raise RuntimeError
    assert capsys.readouterr().err == ""


def test_the_iterator_yields_everything_and_counts_what_was_done(capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: an item is lost, or the length is not found, or a generator without a length crashes."""
    assert list(progress([3, 1, 2], "score")) == [3, 1, 2]
    assert list(progress((i for i in range(2)), "read")) == [0, 1]
    assert list(progress([], "nothing")) == []
    assert capsys.readouterr().err.splitlines() == [
        "score 3/3 100% took 0:00",
        "read 2 took 0:00",
        "nothing 0 took 0:00",
    ]


def test_a_terminal_gets_a_bar_with_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: no bar on a terminal, or the figures are not on it."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress(2, "ppo") as bar:
        bar.update(2, kl=3.25)
        bar.update(0, kl=4.0)
    err = capsys.readouterr().err
    assert "ppo: 100%" in err and "kl 4" in err and "took" not in err


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (250, "4:10"), (3725, "1:02:05")])
def test_seconds_are_written_as_a_clock(seconds: float, text: str) -> None:
    """Bug: `0:60`, or minutes above 59."""
    assert format_seconds(seconds) == text


def test_the_module_is_light() -> None:
    """Bug: a progress bar that takes five seconds to import, because it pulls in transformers."""
    code = "import sys, rlhf.run.progress; print([m for m in ('torch', 'transformers', 'wandb', 'tqdm') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
