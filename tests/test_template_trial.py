"""Chat templates from outside: tried before they are used, and no trial lasts or takes what the user's process has."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from rlhf.base.errors import UserError
from rlhf.models import template_trial
from rlhf.models.template_trial import try_templates
from rlhf.models.templates import TEMPLATES

PLAIN = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
MEMORY = "{% set ns = namespace(a='ab') %}{% for i in range(40) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}"
LONG = "{% for i in range(99999) %}0123456789ab{% endfor %}"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path))
    return tmp_path / "templates"


@pytest.mark.parametrize(
    "bomb", [LOOP, MEMORY, LONG, "{{ 'a' * 10**10 }}"], ids=["time", "memory", "length", "product"]
)
def test_a_template_that_never_ends_is_refused(bomb: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a stranger's template on which the run hangs, or which fills the memory of the whole machine."""
    program = template_trial._PROGRAM.replace(f"+ {template_trial.SECONDS}", "+ 2")
    monkeypatch.setattr(template_trial, "_PROGRAM", program)
    start = time.monotonic()
    with pytest.raises(UserError, match="the chat template of a stranger is not used"):
        try_templates([PLAIN, bomb], "a stranger")
    assert time.monotonic() - start < 40
    assert len(list(cache.iterdir())) == 1, "what did not pass is tried again"


def test_the_length_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a limit that refuses templates with long system prompts, or none at all."""
    monkeypatch.setattr(
        template_trial, "_PROGRAM", template_trial._PROGRAM.replace(str(template_trial.CHARACTERS), "1000")
    )
    try_templates(["a" * 1000], "a stranger")
    with pytest.raises(UserError):
        try_templates(["a" * 1001], "a stranger")


@pytest.mark.parametrize(
    "template", [PLAIN, "{{ raise_exception('no') }}", "{{ messages[9].content }}", "{% nonsense %}", "", "{{ 1 / 0 }}"]
)
def test_other_faults_are_not_its_business(template: str, cache: Path) -> None:
    """Catches: a template refused as hostile that has an error, or does not take one of the conversations: loading names it."""
    try_templates([template], "a stranger")
    assert len(list(cache.iterdir())) == 1


def test_each_template_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: seconds added to every start, and trials of the templates that ship with this package."""
    tried: list[str] = []
    monkeypatch.setattr(template_trial, "_passes", lambda text: tried.append(text) is None)
    for _ in range(2):
        try_templates([PLAIN, *TEMPLATES.values()], "a stranger")
    assert tried == [PLAIN]


def test_a_template_runs_no_module_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a data folder with a file `json.py`, which the process of the trial would import."""
    (tmp_path / "json.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nraise SystemExit(0)\n")
    monkeypatch.chdir(tmp_path)
    try_templates([PLAIN], "a stranger")
    assert not (tmp_path / "ran").exists()
