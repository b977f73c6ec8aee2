"""A Chinese sample from a file to a PPO policy: cleaned, converted, measured in tokens, through all three stages."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prepared import Built
from toys import Call, build_model
from transformers import PreTrainedTokenizerFast

from rlhf.data_prep.formats.readers import READERS, read_row
from rlhf.models.tokenization import check_encoding, encode_response, load_tokenizer
from rlhf.registry import Registry

_WORDS = "電影 故事 音樂 演員 導演 畫面 情節 結局 開頭 角色 對白 風景 節奏 氣氛 主題 劇本"
_GOOD, _BAD = "好看 精彩 動人", "難看 無聊 糟糕"
#: Tokens that the base model's tokenizer lacks: whole words, and the most frequent characters.
NEW_TOKENS = ["电影", "故事", "音乐", "好看", "精彩", "难看", "无聊", "这", "部", "的", "很", "，", "。"]


def sentence(number: int, words: str) -> str:
    generator = random.Random(number)
    said = [generator.choice(_WORDS.split()) for _ in range(6)]
    return f"這部{said[0]}的{said[1]}很{generator.choice(words.split())}，{'、'.join(said[2:])}也是。"


def rows(count: int) -> list[dict[str, Any]]:
    """Traditional characters, with full-width digits, rated by three raters."""
    first = [f"請用{random.Random(i).choice(_WORDS.split())}寫一句影評，編號ＡＢ{i * 7919}" for i in range(count)]
    return [
        {
            "prompt": p,
            "response": sentence(1000 * k + i, (_GOOD, _BAD)[k]),
            "rater": f"r{r}",
            "rating": 4 - 3 * k + r % 2,
        }
        for i, p in enumerate(first)
        for k in (0, 1)
        for r in range(3)
    ]


@pytest.fixture
def base(toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A base model whose tokenizer was extended by Chinese tokens, and whose embeddings have grown with it."""
    tokenizer = copy.deepcopy(toy_tokenizer)
    before = len(tokenizer)
    assert tokenizer.add_tokens(NEW_TOKENS) == len(NEW_TOKENS)
    model = build_model("llama", before)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def prepared(build_data: Callable[..., Built], base: Path) -> Built:
    return build_data(
        rows(80), validation_share=0.2, clean=["encoding", "control", "width", "simplified", "personal", "empty"],
        languages=["zh"], tokenizer=str(base), chat_template="chatml", max_prompt_length=60, max_response_length=100,
    )  # fmt: skip


def test_through_all_three_stages(
    prepared: Built, base: Path, toy_config: Path, call: Callable[..., Call], tmp_path: Path
) -> None:
    """Catches: a stage that cannot read the rows, tokens that were added and lost, a fingerprint that does not arrive."""
    registry = tmp_path / "registry"
    for stage in ("sft", "reward", "ppo"):
        words = ["--config", toy_config / f"{stage}.yaml", "--dataset", prepared.folder, "--registry", registry]
        words += ["--output_dir", tmp_path / "runs", "--wandb_mode", "disabled", "--max_steps", 2] if stage != "ppo" else [
            "--output_dir", tmp_path / "runs", "--wandb_mode", "disabled", "--total_episodes", 8,
        ]  # fmt: skip
        done = call(f"rlhf.stages.{stage}", *words, *(["--model_name_or_path", base] if stage == "sft" else []))
        assert done.code == 0, done.err[-3000:]
    for stage in ("sft", "reward", "ppo"):
        artifact = Registry(registry).get(f"{stage}/toy")
        assert artifact.manifest.data["prepared"] == dict.fromkeys(
            ("train", "validation"), prepared.card["fingerprint"]
        )
        tokenizer = load_tokenizer(str(artifact.path))
        assert len(tokenizer("这部电影的故事很好看，", add_special_tokens=False)["input_ids"]) == 8


def test_texts_are_simplified_and_narrow(prepared: Built) -> None:
    """Catches: traditional and simplified spellings of one word side by side; punctuation turned into ASCII."""
    texts = [r[0]["content"] for row in prepared.rows("comparisons") for r in row["responses"]]
    assert texts and all(t.startswith("这部") and "，" in t and t.endswith("也是。") for t in texts)
    assert not any(c in "電劇導員" for t in texts for c in t)
    assert all("编号AB" in p for p in prepared.prompts("prompts"))
    steps = prepared.card["steps"]
    assert steps["simplified"]["changed"] == steps["width"]["changed"] == 480 and "clean" not in steps
    assert all(len(row["raters"]) == 3 for row in prepared.rows("comparisons"))


def test_lengths_are_in_tokens_of_the_extended_tokenizer(prepared: Built, base: Path) -> None:
    """Catches: a length in characters or words; a mask that does not decode back to the Chinese answer."""
    tokenizer = load_tokenizer(str(base), chat_template="chatml")
    for row in prepared.rows("demonstrations", "train"):
        *prompt, answer = row["messages"]
        head, tail = check_encoding(tokenizer, prompt, [answer])
        assert tokenizer.decode(tail[:-1]) == answer["content"] and len(head) <= 60
    rows = [row["messages"] for row in prepared.rows("demonstrations", "train")]
    lengths = [len(encode_response(tokenizer, messages[:-1], messages[-1:])) for messages in rows]
    assert prepared.card["lengths"]["demonstrations/train"]["response_tokens"]["max"] == max(lengths)


def test_pandalm_shape_in_chinese() -> None:
    """Catches: a reader that depends on spaces or on ASCII."""
    row = {"idx": 1, "instruction": "写一句影评。", "input": "电影：冬天", "response1": "很好看。", "response2": "不好看。",
           "annotator1": 1, "annotator2": 1, "annotator3": 0}  # fmt: skip
    (record,) = read_row(READERS["pandalm"], json.loads(json.dumps(row)))
    assert record.last_turn == "写一句影评。\n\n电影：冬天" and record.ratings == [2.5 / 3, 0.5 / 3]
