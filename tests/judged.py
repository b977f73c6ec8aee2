"""What the tests of evaluation judge by, and where their toy models are."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

#: Words that the toy's raters like and dislike: a gold scorer that needs no model.
LIKED = {"good": 1.0, "great": 2.0, "bad": -1.0, "awful": -2.0}


def toy_gold(responses: list[str]) -> list[float]:
    """What the toy's raters would say, less a little for each letter, so that few answers tie."""
    return [sum(LIKED.get(word, 0.0) for word in text.split()) - len(text) / 100 for text in responses]


def toy_reward(prompts: list[Any], responses: list[str], **columns: Any) -> list[float]:
    """The same as PPO asks for it."""
    return toy_gold(responses)


def broken_gold(responses: list[str]) -> list[float]:
    """One score too few."""
    return [0.0] * (len(responses) - 1)


@dataclass(frozen=True)
class World:
    """A registry with sft/toy, reward/toy, ppo/toy and ppo/snaps, and the folder of the last one's run, with snapshots."""

    registry: Path
    run: Path
    prompts: Path
    common: tuple[str, ...]
    """Words of an evaluation at toy size."""


class JudgeServer:
    """A chat endpoint that answers with `reply(first answer, second answer)`, or fails with the status that it returns."""

    def __init__(self, reply: Callable[[str, str], str | int]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(body)
                outer.headers.append(self.headers["Authorization"])
                text = body["messages"][1]["content"]
                first, second = text.split("[Answer A]\n")[1].split("\n\n[Verdict")[0].split("\n\n[Answer B]\n")
                said = reply(first, second)
                answer = {
                    "choices": [{"message": {"content": said}}],
                    "usage": {"prompt_tokens": 100, "completion_tokens": 2},
                }
                content = json.dumps(answer).encode()
                self.send_response(said if isinstance(said, int) else 200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def prompted(prompts: list[list[dict[str, str]]], responses: list[str]) -> list[float]:
    """A reward as PPO takes it: the length of the question less that of the answer."""
    return [float(len(p[-1]["content"]) - len(r)) for p, r in zip(prompts, responses, strict=True)]
