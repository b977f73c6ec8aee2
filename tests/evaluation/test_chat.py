"""The chat judge against a server that the test starts: orders, replies, the file, the key, failures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from judged import JudgeServer

from rlhf.base.errors import UserError
from rlhf.evaluation.chat import ChatJudge, ChatVerdicts, Pair, cost, parse_verdict

SECRET = "sk-never-to-be-written"


Serve = Callable[[Callable[[str, str], "str | int"]], JudgeServer]


@pytest.fixture
def serve() -> Iterator[Serve]:
    servers: list[JudgeServer] = []

    def start(reply: Callable[[str, str], str | int]) -> JudgeServer:
        servers.append(JudgeServer(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def judge(server: JudgeServer, cache: Path, pairs: list[Pair], parallel: int = 2) -> ChatVerdicts:
    return ChatJudge(server.url, "toy-judge", cache, parallel=parallel, timeout=5.0)(pairs)


def longest(first: str, second: str) -> str:
    return "tie" if len(first) == len(second) else "A" if len(first) > len(second) else "B"


PAIRS = [Pair("p", "long answer", "short"), Pair("p", "no", "longer"), Pair("q", "same", "size")]


def test_pairs_are_asked_about_in_both_orders(serve: Serve, tmp_path: Path) -> None:
    """A verdict on B that is read as one for the policy in both orders; and one request in place of two."""
    server = serve(longest)
    found = judge(server, tmp_path / "judge.jsonl", PAIRS)
    assert found.won == [1.0, 0.0, 0.5] and found.split == 0 and found.requests == 6
    assert found.tokens == (600, 12)
    request = server.requests[0]
    assert request["model"] == "toy-judge" and request["temperature"] == 0
    assert request["messages"][1]["content"].startswith("[Request]\n")


def test_a_judge_that_goes_by_position_has_no_favourite(serve: Serve, tmp_path: Path) -> None:
    """Asked in one order only, whoever stands first wins everything."""
    found = judge(serve(lambda *_: "A"), tmp_path / "judge.jsonl", PAIRS[:2])
    assert found.won == [0.5, 0.5] and found.split == 2


def test_a_reply_that_is_no_verdict_is_left_out(serve: Serve, tmp_path: Path) -> None:
    """Counted as a tie, a judge that refuses to answer looks like one who cannot decide."""
    found = judge(serve(lambda first, _: "I cannot say" if first == "no" else "tie"), tmp_path / "judge.jsonl", PAIRS)
    assert found.won == [0.5, None, 0.5]


@pytest.mark.parametrize(
    "reply, verdict",
    [
        ("A", 1.0),
        (" b.\n", 0.0),
        ("**Tie**", 0.5),
        ("Verdict: A", 1.0),
        ("[B]", 0.0),
        ("A is better than B", None),
        ("A or B", None),
        ("Apple", None),
        ("a tie", None),
        ("", None),
    ],
)
def test_verdicts_are_read_as_they_were_asked_for(reply: str, verdict: float | None) -> None:
    """A sentence that begins with the article 'a' is not a vote for A."""
    assert parse_verdict(reply) == verdict


def test_what_was_said_is_not_asked_again(serve: Serve, tmp_path: Path) -> None:
    """A second call that pays for everything once more; and half a line, left by a run that was killed, that spoils the
    next one or is taken for a reply."""
    server, file = serve(longest), tmp_path / "judge.jsonl"
    judge(server, file, PAIRS[:2])
    with file.open("a") as handle:
        handle.write('{"key": "abc", "rep')
    found = judge(server, file, PAIRS)
    assert (found.requests, len(server.requests)) == (2, 6)
    assert found.won == [1.0, 0.0, 0.5] and found.tokens == (600, 12)
    assert judge(server, file, PAIRS).requests == 0, "the line after the half one is whole"


def test_a_run_that_fails_goes_on_where_it_was(serve: Serve, tmp_path: Path) -> None:
    """Verdicts that are written at the end are lost, and paid for, when the endpoint goes away before it."""
    file = tmp_path / "judge.jsonl"
    server = serve(lambda first, second: longest(first, second) if "short" in (first, second) else 400)
    with pytest.raises(UserError, match=r"gave no verdict: 400 .*run again to go on"):
        judge(server, file, PAIRS, parallel=1)
    assert len(file.read_text().splitlines()) == 2
    again = serve(longest)
    assert judge(again, file, PAIRS).requests == 4 and len(again.requests) == 4


def test_the_key_is_sent_and_written_nowhere(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key in a cache file or an error message is a key in somebody's repository."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server = serve(longest)
    judge(server, tmp_path / "judge.jsonl", PAIRS)
    assert set(server.headers) == {f"Bearer {SECRET}"}
    assert SECRET not in (tmp_path / "judge.jsonl").read_text()
    with pytest.raises(UserError, match="the key in OPENAI_API_KEY is not accepted") as refused:
        judge(serve(lambda *_: 401), tmp_path / "other.jsonl", PAIRS)
    assert SECRET not in str(refused.value)


def test_without_a_key_none_is_sent(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Local servers want none; one that does is told apart from a wrong key."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = serve(longest)
    judge(server, tmp_path / "judge.jsonl", PAIRS[:1])
    assert set(server.headers) == {None}
    with pytest.raises(UserError, match="set OPENAI_API_KEY"):
        judge(serve(lambda *_: 401), tmp_path / "other.jsonl", PAIRS)


def test_equal_pairs_are_asked_about_once(serve: Serve, tmp_path: Path) -> None:
    """Toy and over-optimised policies repeat themselves: the same request ten times costs ten times."""
    found = judge(serve(longest), tmp_path / "judge.jsonl", [PAIRS[0]] * 5)
    assert found.requests == 2 and found.won == [1.0] * 5


def test_answers_that_are_alike_are_a_tie_without_a_question(serve: Serve, tmp_path: Path) -> None:
    """Paid for, and a judge that goes by position would not even call it one."""
    found = judge(serve(lambda *_: "A"), tmp_path / "judge.jsonl", [Pair("p", "x", "x"), PAIRS[0]])
    assert found.requests == 2 and found.won == [0.5, 0.5] and found.split == 1


def test_cost() -> None:
    """600 tokens at 2.50 and 12 at 10.00 a million."""
    assert cost((600, 12), [2.5, 10.0]) == pytest.approx(0.00162)
    assert cost((600, 12), []) is None
