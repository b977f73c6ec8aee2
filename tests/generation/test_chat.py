"""`rlhf chat`: what a model is asked, what it goes on from, and what Ctrl-C does."""

from __future__ import annotations

import builtins
import io
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import Call

from rlhf.base.errors import UserError
from rlhf.config import parse_config
from rlhf.generation import history
from rlhf.generation.chat import Chat
from rlhf.generation.config import ChatConfig
from rlhf.generation.terminal import Stream

MODULE = "rlhf.generation.chat"
SHORT = ["--temperature", "0", "--response_length", "10"]
FIRST, SECOND = 'Write one sentence of a movie review that starts with "The"', "A movie"
INPUT = builtins.input
Caller = Callable[..., Call]


def piped(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    monkeypatch.setattr(builtins, "input", INPUT)  # after `typed` in the same test


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    """What a person does at a terminal, Ctrl-C and Ctrl-D included."""
    left: Iterator[str | type[BaseException]] = iter(lines)

    def ask(_: str = "") -> str:
        line = next(left)
        if isinstance(line, str):
            return line
        raise line

    stdin = io.StringIO()
    stdin.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr(builtins, "input", ask)


def messages(file: Path, number: int = 0) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads(file.read_text())["conversations"][number]["messages"]
    return found


def test_the_second_answer_knows_the_first_turn(
    place: list[str], call: Caller, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A history that is shown and never read. The oracle asks for the same turn as a batch of one prompt of three messages."""
    file, words = tmp_path / "talk.json", ["--model", "ppo/toy", *SHORT, *place]
    piped(monkeypatch, FIRST, "", SECOND)
    said = call(MODULE, *words, "--system", "of the film", "--save", file)
    assert said.code == 0
    talk = messages(file)
    assert [m["role"] for m in talk] == ["system", "user", "assistant", "user", "assistant"]
    assert said.out.split() == [word for m in talk if m["role"] == "assistant" for word in m["content"].split()]
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps({"prompt": talk[:4]}) + "\n")
    again = call("rlhf.generation.generate", *words, "--dataset", asked)
    assert again.out.split() == talk[4]["content"].split()


def test_a_saved_conversation_goes_on(
    place: list[str], call: Caller, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A loaded conversation that begins anew, and /new that does not."""
    whole, half, rest, fresh = (tmp_path / f"{name}.json" for name in ("whole", "half", "rest", "fresh"))
    words = ["--model", "ppo/toy", *SHORT, *place]
    piped(monkeypatch, FIRST, f"/save {half}", SECOND, f"/save {whole}", "/new", SECOND, f"/save {fresh}", "/quit", "A")
    assert call(MODULE, *words).code == 0
    piped(monkeypatch, SECOND)
    assert call(MODULE, *words, "--load", half, "--save", rest).code == 0
    assert messages(rest) == messages(whole) and len(messages(half)) == len(messages(fresh)) == 2


def test_a_system_prompt_for_a_saved_conversation(place: list[str], tmp_path: Path) -> None:
    """--system beside --load, which nobody read: put in where there is none, and never in place of another."""
    file, talk = tmp_path / "talk.json", [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
    words = ["--model", "ppo/toy", *place, "--system", "of the film", "--load", str(file)]
    config, system = parse_config(ChatConfig, words), {"role": "system", "content": "of the film"}
    history.save(file, ["ppo/toy"], [talk])
    chat = Chat(config)
    assert chat.conversations == [[system, *talk]]
    history.save(file, ["ppo/toy"], chat.conversations)
    chat.command(f"/load {file}")
    assert chat.conversations == [[system, *talk]]
    history.save(file, ["ppo/toy"], [[{**system, "content": "of the play"}, *talk]])
    with pytest.raises(UserError, match="another system prompt"):
        chat.command(f"/load {file}")


def test_old_turns_are_left_out_and_kept_in_the_file(place: list[str], tmp_path: Path) -> None:
    """A budget that nobody reads, or one that deletes what was said."""
    words = ["--model", "ppo/toy", *SHORT, *place, "--history_tokens", "60"]
    chat = Chat(parse_config(ChatConfig, list(map(str, words))))
    asked: list[int] = []
    encode = chat.models[0].encode
    chat.models[0].encode = lambda said: asked.append(len(encode(said))) or encode(said)  # type: ignore[method-assign, func-returns-value]
    for _ in range(5):
        chat.turn(SECOND)
    assert asked[0] < asked[1] and max(asked) <= 60
    assert len(chat.conversations[0]) == 10 and len(encode(chat.conversations[0])) > 60


def test_ctrl_c_stops_the_answer_and_not_the_program(
    place: list[str], call: Caller, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A program that ends, an answer that is lost or goes on, a question that stays without an answer."""
    put, count = Stream.put, [0]

    def interrupted(self: Stream, value: torch.Tensor) -> None:
        put(self, value)
        count[0] += 1
        if count[0] == 4:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Stream, "put", interrupted)
    file, words = tmp_path / "talk.json", ["--model", "sft/toy", *SHORT, *place]
    typed(monkeypatch, FIRST, f"/save {file}", KeyboardInterrupt, SECOND, f"/save {tmp_path / 'both.json'}", EOFError)
    said = call(MODULE, *words)
    assert said.code == 0 and "Ctrl-D ends" in said.err
    cut = messages(file)[1]["content"]
    plain = call("rlhf.generation.generate", "--model", "sft/toy", "--prompt", FIRST, *SHORT, *place).out.strip()
    assert cut and plain.startswith(cut) and len(cut) < len(plain)
    assert [m["role"] for m in messages(tmp_path / "both.json")] == ["user", "assistant"] * 2


def test_each_model_of_a_comparison_has_its_own_history(
    place: list[str], call: Caller, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A model that is shown the other's answer as its own; scores of the wrong answers or none."""
    file = tmp_path / "talk.json"
    piped(monkeypatch, FIRST, SECOND)
    words = ["--compare", "sft/toy", "ppo/toy", *SHORT, *place, "--save", file]
    said = call(MODULE, *words)
    assert said.code == 0 and said.err.count("score: sft/toy@1 ") == 2
    for number, name in enumerate(("sft/toy", "ppo/toy")):
        piped(monkeypatch, FIRST, SECOND)
        alone = tmp_path / f"{number}.json"
        assert call(MODULE, "--model", name, *SHORT, *place, "--save", alone).code == 0
        assert messages(alone) == messages(file, number)


def test_an_answer_without_a_score_is_remembered(
    place: list[str], call: Caller, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A reward that fails after the answer was read, and takes the turn with it."""
    (tmp_path / "sulking.py").write_text("def score(prompts, responses, **columns):\n    raise OSError('gone')\n")
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "talk.json"
    words = ["--model", "sft/toy", *SHORT, *place, "--reward", "sulking:score", "--save", file]
    typed(monkeypatch, FIRST, SECOND, "/quit")
    said = call(MODULE, *words)
    assert said.code == 0 and said.err.count("error: sulking:score failed") == 2
    assert [m["role"] for m in messages(file)] == ["user", "assistant"] * 2


def test_mistakes_at_a_terminal_do_not_end_it(place: list[str], call: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slip in a command, or a question that is too long, that costs the conversation; in a pipe it must not pass."""
    slips: list[Any] = ["/sav x", "/save", "/load none.json", "film " * 300, "/help", "/quit"]
    words = ["--model", "ppo/toy", *SHORT, *place]
    typed(monkeypatch, *slips)
    said = call(MODULE, *words)
    assert said.code == 0 and said.err.count("error: ") == 4
    for text in ("did you mean '/save'", "/save needs a file name", "none.json", "context of 256 tokens", "/new"):
        assert text in said.err
    piped(monkeypatch, "film " * 300, SECOND)
    assert "context of 256 tokens" in call(MODULE, *words).complaint
