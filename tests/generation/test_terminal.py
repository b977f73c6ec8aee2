"""Answers on a terminal and in a pipe."""

from __future__ import annotations

import sys

import pytest

from rlhf.generation.terminal import answer_view, score_line


def test_several_models_stand_side_by_side_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An answer that is read as markup, or that stands below the other."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with answer_view(["sft/a@1", "ppo/b@1"]) as show:
        for number, text in ((0, "very "), (0, "[bold]good"), (1, "bad")):
            show(number, text)
    lines = capsys.readouterr().out.splitlines()
    assert any("sft/a@1" in line and "ppo/b@1" in line for line in lines)
    assert any("very [bold]good" in line and "bad" in line.split("good")[1] for line in lines)


def test_in_a_pipe_they_follow_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    """A single model's answer with anything around it; two without their names."""
    with answer_view(["a"]) as show:
        show(0, "very ")
        show(0, "good")
    assert capsys.readouterr().out == "very good\n"
    with answer_view(["a", "b"]) as show:
        show(0, "good")
        show(1, "bad")
    assert capsys.readouterr().out == "[a]\ngood\n[b]\nbad\n"


def test_scores_name_their_models() -> None:
    """The score of one model under the name of another."""
    assert score_line(["a", "b"], [-0.125, 2.0]) == "score: a -0.12, b +2.00"
    assert score_line(["a"], [0.5]) == "score: +0.50"
