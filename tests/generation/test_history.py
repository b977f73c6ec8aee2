"""What of a conversation a model still reads, and conversations in files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.base.errors import UserError
from rlhf.data_prep.formats.rows import Messages
from rlhf.generation import history


def said(*texts: str, system: str | None = None) -> Messages:
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def words(messages: Messages) -> int:
    return sum(len(message["content"].split()) for message in messages)


def test_the_oldest_turns_go_first_and_whole() -> None:
    """A system prompt that is dropped with the oldest turn, an answer that stays without its question, a turn too many."""
    whole = said("a b", "c d", "e f", "g h", "i j", system="be brief")
    assert history.recent(whole, 12, words) == whole
    assert history.recent(whole, 11, words) == said("e f", "g h", "i j", system="be brief")
    assert history.recent(whole, 8, words) == said("e f", "g h", "i j", system="be brief")
    assert history.recent(whole, 7, words) == said("i j", system="be brief")


def test_the_last_question_is_never_dropped() -> None:
    """An endless loop, or an empty prompt, where the question alone is too long: who encodes it complains."""
    assert history.recent(said("a", "b", "c d e"), 2, words) == said("c d e")


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    """Texts in another encoding; a conversation that two models share, so that one hears the other's answers."""
    file = tmp_path / "new" / "talk.json"
    talk = said("你好", "Grüße", system="kurz")
    history.save(file, ["ppo/a@1"], [talk])
    assert "你好" in file.read_text(encoding="utf-8")
    assert history.load(file, 1) == [talk]
    both = history.load(file, 2)
    assert both == [talk, talk] and both[0] is not both[1]
    history.save(file, ["a", "b"], [talk, []])
    assert history.load(file, 2) == [talk, []]
    with pytest.raises(UserError, match="held with 2 models, now there are 3"):
        history.load(file, 3)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"conversations": [{"messages": [{"role": "user"}]}]}', '{"conversations": 3}',
     json.dumps({"conversations": [{"messages": [{"role": "assistant", "content": "x"}]}]})],
)  # fmt: skip
def test_what_is_no_conversation_is_refused(tmp_path: Path, content: str) -> None:
    """A traceback, or a conversation that begins with an answer."""
    file = tmp_path / "talk.json"
    file.write_text(content)
    with pytest.raises(UserError, match="is not a saved conversation"):
        history.load(file, 1)
    with pytest.raises(UserError, match="cannot read"):
        history.load(tmp_path / "none.json", 1)
