"""The live view: what a terminal shows while a run goes on, and that nothing of it reaches a log file."""

from __future__ import annotations

import io
import os
import pty
import select
import subprocess
import sys
import time

import pytest
from rich.console import Console

from rlhf.run import terminal
from rlhf.run.progress import Progress
from rlhf.run.terminal import LiveView, sparkline, view

RUN = """
import sys
from rlhf.run import terminal
from rlhf.run.progress import Progress
with terminal.view("ppo: demo on cpu"), Progress(2, "ppo") as bar:
    for step in (1, 2):
        terminal.show_metrics({"objective/score": step / 4, "objective/kl": 3.5, "ppo/lr": 1e-5})
        terminal.show_samples([{"prompt": "Say\\x1b[2J it", "response": "good\\nfilm", "score": 0.5, "kl": 1.25}])
        bar.update(1, score=step / 4)
    print("said to stdout")
"""


def screen(view: LiveView) -> str:
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    console.print(view)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_view_shows_progress_figures_and_samples() -> None:
    """Bug: a run of hours that shows a bar and no sign of what it is learning."""
    with view("ppo: demo", Console(file=io.StringIO(), force_terminal=True, width=100)) as shown:
        assert shown is not None
        with Progress(4, "ppo") as bar:
            for step in range(3):
                terminal.show_metrics({"objective/score": 0.1 * step, "objective/kl": 2.5, "time/score": 9.0})
                terminal.show_samples([{"prompt": f"p{step}", "response": "fine", "score": 0.25, "kl": 1.5}] * 9)
                bar.update(1, score=0.1 * step)
            text = screen(shown)
    assert "ppo: demo" in text and "3/4" in text and "score 0.2" in text and "left" in text
    assert ("KL, nats a response  2.5" in text and "▁▅█" in text) or "▁▄█" in text
    assert text.count("p2") == terminal.SAMPLES and "p1" not in text and "score 0.25 kl 1.5 | fine" in text
    assert "time/score" not in text
    assert terminal.bar(1, "after", leave=True) is None, "the view is closed"


def test_a_bar_that_is_not_left_vanishes() -> None:
    """Bug: each evaluation of a long run leaves a line, until the figures are off the screen."""
    with view("sft", Console(file=io.StringIO(), force_terminal=True, width=100)) as shown:
        assert shown is not None
        with Progress(2, "sft evaluation", leave=False) as bar:
            bar.update(1)
            assert "sft evaluation" in screen(shown)
        assert "sft evaluation" not in screen(shown)


def test_off_a_terminal_there_are_plain_lines() -> None:
    """Bug: a job's log full of escape sequences and of the same screen again and again."""
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, check=True)
    assert done.stdout == "said to stdout\n"
    assert "\x1b" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("ppo 2/2 100% score 0.5 took ")


def test_on_a_terminal_it_is_drawn_in_place() -> None:
    """Bug: two displays that overwrite each other; or a model that steers the terminal with what it writes."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
    process = subprocess.Popen(
        [sys.executable, "-c", RUN], stdin=follower, stdout=subprocess.DEVNULL, stderr=follower, env=environment
    )
    os.close(follower)
    said = b""
    ends = time.monotonic() + 120
    while time.monotonic() < ends and (process.poll() is None or select.select([leader], [], [], 0.2)[0]):
        try:
            said += os.read(leader, 65536) if select.select([leader], [], [], 0.2)[0] else b""
        except OSError:  # the other end is closed
            break
    assert process.wait(timeout=60) == 0
    os.close(leader)
    text = said.decode(errors="replace")
    assert "ppo: demo on cpu" in text and "2/2" in text and "good film" in text and "score 0.5 kl 1.25" in text
    assert "\x1b[2J" not in text and "said to stdout" not in text


@pytest.mark.parametrize(
    ("values", "text"), [([1, 2, 3], "▁▄█"), ([2, 2], "▁▁"), ([0, float("nan"), 1], "▁ █"), ([], "")]
)
def test_sparkline(values: list[float], text: str) -> None:
    """Bug: division by zero on a flat curve, or NaN as an index."""
    assert sparkline(values) in (text, text.replace("▄", "▅"))
