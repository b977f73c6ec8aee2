"""A chat model as the judge of pairs: any OpenAI-compatible endpoint, each pair asked about in both orders.

Replies are saved in a file as they come, so that a run that was interrupted, or is repeated, requests only the missing ones.
The key is read from the environment variable OPENAI_API_KEY, sent in the request's header, and written nowhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.base.errors import UserError
from rlhf.base.http import HttpError, post_json
from rlhf.base.json_files import read_jsonl
from rlhf.base.redaction import redact
from rlhf.run.progress import Progress

INSTRUCTIONS = (
    "You compare two answers to the same request. Judge how well each does what the request asks: correct, helpful, clear, "
    "natural. Neither length nor order counts. Reply with one word only: A if the first answer is better, B if the second "
    "is, tie if neither is."
)
#: Longest verdict, tokens: one word, and room for a model that adds to it.
_VERDICT_TOKENS = 16
_KEY = "OPENAI_API_KEY"
#: A judge's word -> its worth for answer A.
VERDICTS = {"a": 1.0, "b": 0.0, "tie": 0.5}


@dataclass(frozen=True)
class Pair:
    """A policy's answer to a prompt, and the baseline's."""

    prompt: str
    answer: str
    baseline: str

    @property
    def equal(self) -> bool:
        """True if the answers are the same text: a tie, which needs no judge."""
        return self.answer == self.baseline


@dataclass(frozen=True, kw_only=True)
class ChatVerdicts:
    """Verdicts on n pairs."""

    won: list[float | None]
    """(n,) mean of the verdicts in both orders: 1 for the policy's answer, 0 for the baseline's, 0.5 for ties and split
    verdicts; None where a reply was no verdict."""
    split: int
    """Pairs whose verdict followed the position."""
    requests: int
    """Requests made now; the other replies were in the file."""
    tokens: tuple[int, int]
    """Tokens of all requests and of all replies, including those in the file, by the endpoint's count."""


class ChatJudge:
    """A chat endpoint that judges pairs.

    Args:
        url: base URL, up to and including `/v1`.
        model: the endpoint's name of the model.
        cache: the file with replies.
        parallel: requests at a time.
        timeout: seconds for a request.
    """

    def __init__(self, url: str, model: str, cache: Path, *, parallel: int, timeout: float) -> None:
        self.url, self.model, self.cache = url.rstrip("/"), model, cache
        self.parallel, self.timeout = parallel, timeout
        rows = read_jsonl(cache)[0] if cache.is_file() else []
        self._replies = {str(row["key"]): row for row in rows if {"key", "reply", "tokens"} <= row.keys()}
        self._lock = threading.Lock()
        self._requests = 0

    def __call__(self, pairs: Sequence[Pair]) -> ChatVerdicts:
        """Return verdicts on pairs.

        Raises:
            UserError: the endpoint refuses or fails; the replies so far stay in the file.
        """
        earlier = self._requests
        requests = [[self._request(p.prompt, *order) for order in _orders(p)] for p in pairs if not p.equal]
        self._ask_all([r for both in requests for r in both if _digest(r) not in self._replies])
        rows = [[self._replies[_digest(r)] for r in both] for both in requests]
        verdicts = iter([[parse_verdict(str(row["reply"])) for row in both] for both in rows])
        won: list[float | None] = []
        split = 0
        for pair in pairs:
            first, second = (0.5, 0.5) if pair.equal else next(verdicts)
            if first is None or second is None:
                won.append(None)
            else:
                won.append((first + 1 - second) / 2)
                split += first == second and first != 0.5
        prompt, reply = (sum(int(row["tokens"][i]) for both in rows for row in both) for i in (0, 1))
        return ChatVerdicts(won=won, split=split, requests=self._requests - earlier, tokens=(prompt, reply))

    def _request(self, prompt: str, first: str, second: str) -> dict[str, Any]:
        content = f"[Request]\n{prompt}\n\n[Answer A]\n{first}\n\n[Answer B]\n{second}\n\n[Verdict: A, B or tie]"
        messages = [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": content}]
        return {"model": self.model, "messages": messages, "temperature": 0.0, "max_tokens": _VERDICT_TOKENS}

    def _ask_all(self, missing: list[dict[str, Any]]) -> None:
        """Send requests and write each reply to the file as it comes; stop at the first failure, after the running requests."""
        distinct = {_digest(request): request for request in missing}
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        with (
            Progress(len(distinct), "judge", unit="request") as bar,
            self.cache.open("a", encoding="utf-8") as file,
            ThreadPoolExecutor(self.parallel) as pool,  # last, so that it is closed first: its requests still write
        ):
            if file.tell() and not self.cache.read_bytes().endswith(b"\n"):
                file.write("\n")  # half a line of a run that was killed

            def ask(key: str, request: dict[str, Any]) -> None:
                row = {"key": key, **self._ask(request)}
                with self._lock:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    file.flush()
                    self._replies[key] = row
                    self._requests += 1
                    bar.update(1)

            running = [pool.submit(ask, key, request) for key, request in distinct.items()]
            try:
                for one in running:
                    one.result()
            finally:
                for one in running:
                    one.cancel()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        key = os.environ.get(_KEY)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            body = post_json(f"{self.url}/chat/completions", request, timeout=self.timeout, headers=headers)
            reply = str(body["choices"][0]["message"]["content"])
            usage = body.get("usage") or {}
            tokens = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        except (HttpError, KeyError, IndexError, TypeError, ValueError) as error:
            if isinstance(error, HttpError) and error.status in (401, 403):
                problem = f"is not accepted: set {_KEY}" if key is None else f"in {_KEY} is not accepted"
                raise UserError(f"the key {problem} (judge {redact(self.url)}, {error.status})") from error
            reason = " ".join(redact(str(error)).split())[:300]
            raise UserError(
                f"the judge {redact(self.url)} gave no verdict: {reason}; its replies so far are saved in {self.cache}: "
                "run again to go on"
            ) from error
        return {"reply": reply, "tokens": tokens}


def parse_verdict(reply: str) -> float | None:
    """Return 1 for A, 0 for B, 0.5 for a tie; None for any other reply, which is not guessed at."""
    match = re.fullmatch(r"\W*(?:verdict|answer)?\W*(a|b|tie)\W*", reply.strip(), re.IGNORECASE)
    return VERDICTS[match[1].lower()] if match else None


def _orders(pair: Pair) -> list[tuple[str, str]]:
    return [(pair.answer, pair.baseline), (pair.baseline, pair.answer)]


def _digest(request: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def cost(tokens: tuple[int, int], prices: Sequence[float]) -> float | None:
    """Return the cost of (request, reply) tokens at prices for a million of each; None without prices."""
    return sum(n * price for n, price in zip(tokens, prices, strict=True)) / 1e6 if prices else None
