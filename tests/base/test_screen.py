"""What reaches a terminal: nothing of data, manifests or models may steer it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text
from toys import Call

from rlhf.base import screen
from rlhf.base.errors import UserError, run_command
from rlhf.base.screen import printable

ATTACKS = ["\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "\x08\x08", "over\rwritten", "\x00", "\x7f", "\x1b[31mred"]


def harmless(text: str) -> bool:
    return all(character.isprintable() or character in "\n\t" for character in text)


@pytest.mark.parametrize("attack", ATTACKS)
def test_control_characters_are_written_out(attack: str) -> None:
    """Catches: a text that clears the screen, renames the window or types for the user, and one that vanishes instead."""
    clean = printable(f"a{attack}b")
    assert harmless(clean) and clean.startswith("a") and clean.endswith("b") and "\\x" in clean


@pytest.mark.parametrize("text", ["plain", "two\nlines\tand a tab", "日本語 العربية é 🙂", "windows\r\nline"])
def test_other_texts_stay(text: str) -> None:
    """Catches: letters of other languages taken for control characters."""
    assert printable(text) == text.replace("\r\n", "\n")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_all_that_a_command_prints_is_clean(stream: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: one of the many prints whose text comes from a file or a model."""
    run_command(lambda: print("", *ATTACKS, file=getattr(sys, stream)))
    printed = getattr(capsys.readouterr(), stream[3:])
    assert harmless(printed) and "\\x1b[2J" in printed


def test_progress_bars_of_libraries_stay_bars(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: a download of an hour drawn as a thousand lines, and a bar's text that steers the terminal."""

    def draw() -> None:
        for text in ("\r10%", "\r20%", "\x1b[A", "\r\x1b[2J"):
            sys.stderr.write(text)

    run_command(draw)
    assert capsys.readouterr().err == "\r10%\r20%\x1b[A\r\\x1b[2J"


def test_errors_are_clean(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: a file name or a value in an error message that steers the terminal."""

    def fail() -> None:
        raise UserError(f"no file {''.join(ATTACKS)}")

    with pytest.raises(SystemExit):
        run_command(fail)
    assert harmless(capsys.readouterr().err)


def test_tracebacks_are_clean() -> None:
    """Catches: the text of an exception that nobody foresaw."""
    program = "from rlhf.base.errors import run_command\ndef f(): raise ValueError('a\x1b[2Jb')\nrun_command(f)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1 and "ValueError" in done.stderr and harmless(done.stderr)


def test_a_console_keeps_its_own_colours_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: escape sequences of a table's cells on the screen, and tables that have lost their colours."""
    written = io.StringIO()
    monkeypatch.setattr(sys, "stdout", written)
    monkeypatch.delenv("NO_COLOR", raising=False)
    with screen.clean_output():
        console = screen.console(force_terminal=True, color_system="standard", width=200, highlight=False)
        table = Table("a", "b")
        table.add_row(ATTACKS[0], Text(ATTACKS[1]))
        console.print(table)
        console.print("mine", style="bold red", markup=False)
        for attack in ATTACKS:
            console.print(attack, markup=False)
            console.print(Text(attack))
    text = written.getvalue()
    assert "\x1b[1;31mmine\x1b[0m" in text
    assert "\\x1b[2J" in text and "\x1b[2J" not in text and "\x1b]0" not in text and "\x9b" not in text
    assert not set(text) & set("\x00\x07\x08\x7f\r")


def test_output_is_as_before_afterwards() -> None:
    """Catches: streams wrapped once more by each command of a process."""
    before = sys.stdout, sys.stderr
    run_command(lambda: run_command(lambda: None))
    assert (sys.stdout, sys.stderr) == before


def test_a_hostile_registry_is_listed_harmlessly(tmp_path: Path, call: Callable[..., Call]) -> None:
    """Catches: a manifest from somebody else's registry that steers the terminal of whoever lists it."""
    folder = tmp_path / "registry" / "sft" / "demo" / "v1"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({ATTACKS[0]: 1, "stage": ATTACKS[1]}))
    for words in (["list"], ["verify"], ["show", "sft/demo"]):
        done = call("rlhf.sharing", *words, "--registry", tmp_path / "registry")
        assert harmless(done.out) and harmless(done.err)
