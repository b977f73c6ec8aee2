"""Exported folders under `transformers serve` and `transformers chat`: the same greedy answers as here."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests
from toys import Call

from rlhf.registry import Registry
from rlhf.sharing.export import export

for package in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(package, reason="transformers serve needs pip install 'rlhf-stages[serve]'")

TRANSFORMERS = (sys.executable, "-m", "transformers.cli.transformers")
ASK = 'Write one sentence of a movie review that starts with "The"'
LENGTH = 12


@pytest.fixture(scope="module")
def exported(finished: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    registry = Registry(finished[0])
    return export(registry, registry.get("ppo/toy"), tmp_path_factory.mktemp("served") / "ppo-toy")


@pytest.fixture(scope="module")
def served(exported: Path) -> Iterator[str]:
    """Address of a server of the exported folder."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    log = exported.parent / "server.log"
    with log.open("w") as out:
        words = (*TRANSFORMERS, "serve", str(exported), "--port", str(port), "--device", "cpu")
        server = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT)
        try:
            for _ in range(600):
                assert server.poll() is None, log.read_text()[-3000:]
                try:
                    if requests.get(f"http://localhost:{port}/health", timeout=5).ok:
                        break
                except requests.RequestException:
                    time.sleep(0.5)
            yield f"http://localhost:{port}"
        finally:
            server.terminate()
            server.wait(timeout=60)


@pytest.fixture
def said(finished: tuple[Path, Path], exported: Path, call: Callable[..., Call], tmp_path: Path) -> str:
    """What the artefact says here, and so does its folder."""
    found = []
    for name in ("ppo/toy", exported):
        output = tmp_path / f"{len(found)}.jsonl"
        words = [
            "--model",
            name,
            "--prompt",
            ASK,
            "--temperature",
            "0",
            "--response_length",
            LENGTH,
            "--output",
            output,
        ]
        place = ["--registry", finished[0], "--device", "cpu", "--dtype", "float32"]
        assert call("rlhf.generation.generate", *words, *place).code == 0
        found.append(json.loads(output.read_text()))
    first, second = ({key: row[key] for key in ("prompt", "response", "tokens", "stopped")} for row in found)
    assert first == second and first["response"]
    return str(first["response"])


def test_a_served_folder_says_the_same(served: str, exported: Path, said: str) -> None:
    """A template, a stop token or a generation config that did not come along: another prompt, or an answer that goes on."""
    asked = {
        "model": str(exported),
        "messages": [{"role": "user", "content": ASK}],
        "temperature": 0,
        "max_tokens": LENGTH,
    }
    answer = requests.post(f"{served}/v1/chat/completions", json=asked, timeout=300)
    assert answer.ok, answer.text
    assert answer.json()["choices"][0]["message"]["content"].strip() == said


def test_transformers_chat_says_the_same(served: str, exported: Path, said: str) -> None:
    """The same through the chat program, whose options do not name stop tokens."""
    words = (*TRANSFORMERS, "chat", str(exported), f"{served}/v1", "do_sample=False", f"max_new_tokens={LENGTH}")
    typed = "\n".join([ASK, "n", "!exit", "n", "!exit", "!exit", ""])  # "n": where it asks whether to go on
    done = subprocess.run(
        words,
        input=typed,
        capture_output=True,
        text=True,
        timeout=300,
        # Offline, huggingface_hub does not even ask a server on this machine.
        env={**os.environ, "COLUMNS": "500", "TERM": "dumb", "HF_HUB_OFFLINE": "0"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    whole = said.rstrip("\ufffd")  # half a character at the end of the budget is not shown
    assert whole and " ".join(whole.split()) in " ".join(done.stdout.split()), done.stdout[-3000:]
