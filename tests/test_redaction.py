"""Secrets stay out of what is kept and shown, and ordinary words stay in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.base.redaction import redact


def test_secrets_are_blanked_and_ordinary_names_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a key in the config is stored in W&B for a whole team; or `pad_token` is taken for one."""
    monkeypatch.setenv("SOME_API_KEY", "sesame-open-42")
    config = {
        "reward_url": "https://me:pw123@host/score?k=sesame-open-42", "api_key": "a", "hf_token": "b", "token": "c",
        "headers": {"Authorization": "Bearer d"}, "password": None, "pad_token": "<pad>", "num_tokens": 5,
        "tokenizer": "t", "layers": (1, 2), "folder": Path("/data"),
    }  # fmt: skip
    assert redact(config) == {
        "reward_url": "https://***@host/score?k=***", "api_key": "***", "hf_token": "***", "token": "***",
        "headers": {"Authorization": "***"}, "password": None, "pad_token": "<pad>", "num_tokens": 5,
        "tokenizer": "t", "layers": [1, 2], "folder": "/data",
    }  # fmt: skip


@pytest.mark.parametrize(
    "text, left",
    [
        ("https://me:pw1234@host/score", "https://***@host/score"),
        ("http://host/score?token=abc123&n=2", "http://host/score?token=***&n=2"),
        ("/score?n=2&x-api-key=abc123 failed", "/score?n=2&x-api-key=*** failed"),
        ("WANDB_API_KEY=abc123 was refused", "WANDB_API_KEY=*** was refused"),
        ("Authorization: Bearer abcdef.ghi-jkl_123", "Authorization: Bearer ***"),
        (f"401 for hf_{'a1B2' * 8}", "401 for hf_***"),
    ],
)
def test_keys_in_texts(text: str, left: str) -> None:
    """Catches: a key in the message of an HTTP library, or in the address of an endpoint, that a log would keep."""
    assert redact(text) == left


@pytest.mark.parametrize(
    "text",
    [
        "pad_token='<pad>' equals eos_token",
        "max_tokens=5, key=value",
        "0b19d3a8c1f4e5d6b7a8990011223344556677ff",  # a commit
        "a bearer of news",
        "basic functionality and task-oriented-dialogue-data",
        "me@example.org asked http://host/a?page=2",
    ],
)
def test_ordinary_texts_stay(text: str) -> None:
    """Catches: an error that no longer names the option or the commit it is about."""
    assert redact(text) == text


def test_errors_are_printed_without_secrets(tmp_path: Path) -> None:
    """Catches: a key on the terminal, and so in the log of a cluster, by a user's error or by a traceback."""
    (tmp_path / "command.py").write_text(
        "import sys\nfrom rlhf.base.errors import UserError, run_command\n"
        "def main():\n    raise (UserError if sys.argv[1] == 'user' else ValueError)("
        "'no answer from http://me:pw1234@host/x?token=abc123')\n"
        "run_command(main)\n"
    )
    for kind, code in (("user", 2), ("bug", 1)):
        command = [sys.executable, str(tmp_path / "command.py"), kind]
        done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)})
        assert done.returncode == code
        assert "no answer from http://***@host/x?token=***" in done.stderr
        assert "pw1234" not in done.stderr and "abc123" not in done.stderr, done.stderr
