"""Lengths in tokens: as the stages count them, and the rule that was chosen, on the side that was chosen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prepared import Built, text

from rlhf.models.tokenization import encode_prompt, encode_response, load_tokenizer

Build = Callable[..., Built]
LONG = "The film is good. " * 12


@pytest.fixture
def options(toy_base: Callable[[str], Path]) -> dict[str, Any]:
    return {"tokenizer": str(toy_base("llama")), "chat_template": "chatml", "stages": "shared", "validation_share": 0.3}


def rows(*more: dict[str, Any]) -> list[dict[str, Any]]:
    return [*({"prompt": text(i, 3), "completion": text(i + 500, 3)} for i in range(40)), *more]


def prompt_tokens(options: dict[str, Any], prompt: Any) -> int:
    return len(encode_prompt(load_tokenizer(options["tokenizer"], chat_template="chatml"), prompt))


def test_limits_are_exact(build_data: Build, options: dict[str, Any]) -> None:
    """Catches: a limit that is off by the template, the header or the stop token; a row at the limit dropped."""
    prompt = [{"role": "user", "content": LONG}]
    tokenizer = load_tokenizer(options["tokenizer"], chat_template="chatml")
    answer = len(encode_response(tokenizer, prompt, [{"role": "assistant", "content": "The end of it."}]))
    at = len(encode_prompt(tokenizer, prompt))
    row = {"prompt": LONG, "completion": "The end of it."}
    for limit, folder, dropped in ((at, "at", 0), (at - 1, "below", 1)):
        built = build_data(rows(row), folder=folder, max_prompt_length=limit, **options)
        assert sum(built.reasons("clean").values()) == dropped
    for limit, dropped in ((answer, 0), (answer - 1, 1)):
        few = [{"prompt": text(i, 3), "completion": "A"} for i in range(40)]
        built = build_data([*few, row], folder=f"r{limit}", max_response_length=limit, **options)
        assert built.reasons("clean") == ({f"response of more than {limit} tokens": 1} if dropped else {})


@pytest.mark.parametrize("rule", ["truncate_left", "truncate_right"])
def test_prompts_are_cut_on_the_side_named(build_data: Build, options: dict[str, Any], rule: str) -> None:
    """Catches: the end cut where the beginning was meant, a cut in the middle of a character, more cut than needed."""
    said = "开始 " + LONG + " 结束的电影"
    built = build_data(rows({"prompt": said, "completion": "yes"}), max_prompt_length=80, long_prompts=rule, **options)
    (cut,) = [p for p in built.prompts("prompts") if "film is good" in p]
    assert said.endswith(cut) if rule == "truncate_left" else said.startswith(cut)
    assert "\ufffd" not in cut
    assert 76 <= prompt_tokens(options, [{"role": "user", "content": cut}]) <= 80
    assert built.card["steps"]["prompt length"]["changed"] == 1
    longest = built.card["lengths"]["prompts/train"]["prompt_tokens"]["max"]
    assert longest <= 80


def test_a_conversation_loses_its_first_turns(build_data: Build, options: dict[str, Any]) -> None:
    """Catches: a cut that leaves an answer in front, or takes out the system message."""
    turns = [{"role": "system", "content": "Be brief."}]
    for i in range(6):
        turns += [
            {"role": "user", "content": f"question {i} {text(i, 2)}"},
            {"role": "assistant", "content": f"answer {i}"},
        ]
    turns.append({"role": "user", "content": "the last question"})
    row = {"prompt": turns, "completion": "yes"}
    built = build_data(rows(row), max_prompt_length=150, long_prompts="truncate_left", **options)
    (kept,) = [r["prompt"] for r in built.rows("prompts") if r["prompt"][-1]["content"] == "the last question"]
    assert kept[0] == turns[0] and kept[1]["role"] == "user" and kept[1:] == turns[-len(kept) + 1 :]
    assert 3 <= len(kept) < len(turns) and prompt_tokens(options, kept) <= 150
    assert prompt_tokens(options, [turns[0], *turns[-len(kept) - 1 :]]) > 150, "one exchange more would not fit"


def test_responses(build_data: Build, options: dict[str, Any]) -> None:
    """Catches: of a ranking everything dropped for one long response; a cut response over the limit."""
    ranking = {"prompt": "Which film is it?", "responses": [LONG, "The first", "The second"], "ratings": [3, 2, 1]}
    pairs = [{"prompt": text(i, 3), "responses": ["yes " + text(i, 1), "no"], "ratings": [1, 0]} for i in range(40)]
    built = build_data([*pairs, ranking], max_response_length=24, **options)
    (row,) = (r for r in built.rows("comparisons") if r["prompt"][0]["content"] == "Which film is it?")
    assert row["ratings"] == [2, 1]
    cut = build_data(
        [*pairs, ranking], folder="cut", max_response_length=24, long_responses="truncate_right", **options
    )
    (row,) = (r for r in cut.rows("comparisons") if r["prompt"][0]["content"] == "Which film is it?")
    first = row["responses"][0][0]["content"]
    assert LONG.startswith(first) and len(first) > 20 and row["ratings"] == [3, 2, 1]
    assert cut.card["lengths"]["comparisons/train"]["response_tokens"]["max"] <= 24
    assert cut.card["steps"]["response length"]["changed"] == 1
