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
        ("https://user:p@ss@host/score", "https://***@host/score"),
        ("cannot reach user:p@ss@host", "cannot reach ***@host"),
        ("clientSecret: abc12 and AccountKey=abc12;x", "clientSecret: *** and AccountKey=***;x"),
        (r"{\"password\": \"abc12\"}", r"{\"password\": ***\"}"),
        ("api_key: !!str abc12\napi_key: >-\n  abc12", "api_key: ***\napi_key: ***"),
        ("Authorization: token abc12", "Authorization: ***"),
        ("rlhf --api_key abc12 --token abcdef12", "rlhf --api_key *** --token ***"),
        ("MY_TOKEN=abcdef12 and token: abcdef12", "MY_TOKEN=*** and token: ***"),
        ("machine host login me password abcdef12", "machine host login me password ***"),
        ("Cookie: session=abc12; n=2", "Cookie: ***; n=2"),
        ("cannot reach me:secret@host.org:80/x", "cannot reach ***@host.org:80/x"),
        ("http://host/cb?access=abc123&n=2", "http://host/cb?access=***&n=2"),
        ("http://host/cb?code=abc123", "http://host/cb?code=***"),
        (
            "http://host/f?X-Amz-Credential=AKIA1&X-Amz-Date=20260101&X-Amz-Signature=12ab&part=3",
            "http://host/f?X-Amz-Credential=***&X-Amz-Date=***&X-Amz-Signature=***&part=3",
        ),
        ("{'api_key': 'abc 123', 'n': 5}", "{'api_key': ***, 'n': 5}"),
        ('{"api_key": "abc123"}', '{"api_key": ***}'),
        ("api_key: abc123", "api_key: ***"),
        ('in "c.yaml", line 2\n  my-api-key: "abc123', 'in "c.yaml", line 2\n  my-api-key: ***'),
        ("password=abc123 was wrong", "password=*** was wrong"),
        ("password: 'it is long'", "password: ***"),
        ("Authorization: Basic dXNlcjpwYXNz", "Authorization: Basic ***"),
        ("'Authorization': 'abc123'", "'Authorization': ***"),
        ("aws_secret_access_key = wJalr/XUtn", "aws_secret_access_key = ***"),
        ("aws_access_key_id=AKIAIOSFODNN7EXAMPLE", "aws_access_key_id=***"),
        ("key AKIAIOSFODNN7EXAMPLE here", "key *** here"),
        ("client_secret=abc123&x=1", "client_secret=***&x=1"),
        ("{'token': 'abc123'}", "{'token': ***}"),
        (f"got eyJ{'a' * 10}.eyJ{'b' * 10}.{'c' * 10}!", "got ***!"),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----\nrest", "***\nrest"),
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
        "mailto:me@example.org",
        "sft/demo@2 was made from reward/demo@1: see registry/sft/demo/v2",
        "hf:owner/name and wandb:me/project@latest",
        "Basic Functionality, basic assumptions",
        "eos_token: '</s>', unk_token: <unk>",
        "http://host/a?page=2&size=10",
        "tokenizer.json: 5 tokens, token 7 of 9",
        "at 12:30 me@host said so",
        "secretary: Anna",
    ],
)
def test_ordinary_texts_stay(text: str) -> None:
    """Catches: an error that no longer names the option or the commit it is about."""
    assert redact(text) == text


@pytest.mark.parametrize(
    "name",
    ["x-api-key", "secret_key", "aws_secret_access_key", "pwd", "refresh_token", "accessToken", "cookie", "secrets"],
)
def test_entries_and_options_by_the_same_names(name: str) -> None:
    """Bug: names that were secrets in texts were none as entries, nor before their values in a list of arguments."""
    assert redact({name: "abc12"}) == {name: "***"}
    assert redact([f"--{name}", "abc12", "abc12"]) == [f"--{name}", "***", "abc12"]


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
