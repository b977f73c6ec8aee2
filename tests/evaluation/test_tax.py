"""Perplexity against a loop over tokens, and tasks of the harness from a local file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.base.errors import UserError
from rlhf.config import RewardCardConfig
from rlhf.evaluation.tax import PLAIN_TEXT, Tasks, perplexity, text_logprobs, text_windows
from rlhf.models.base import load_base
from rlhf.models.compute import Compute
from rlhf.models.tokenization import load_tokenizer

CPU = Compute(torch.device("cpu"), torch.float32)


def test_perplexity_is_of_tokens_and_not_of_texts(toy_base: Callable[[str], Path], tmp_path: Path) -> None:
    """A mean of the texts' perplexities, or one in which short texts count as much as long ones, or the first token, which
    nothing predicts, counted in. The oracle walks over the tokens with transformers alone."""
    tokenizer = load_tokenizer(str(toy_base("llama")), chat_template="chatml")
    file = tmp_path / "text.txt"
    file.write_text("The film is great\n\nbad\n\n\n\nThis movie was not very funny but good\n")
    rows = text_windows(tokenizer, file)
    assert len(rows) == 3
    options = RewardCardConfig(model="", dataset="", device="cpu", dtype="float32")
    model = load_base(str(toy_base("llama")), options, CPU)
    means = text_logprobs(model, rows, pad_token_id=int(tokenizer.pad_token_id), compute=CPU, batch_size=2)
    plain = AutoModelForCausalLM.from_pretrained(toy_base("llama")).eval()
    nll = []
    with torch.no_grad():
        for row in rows:
            logprobs = plain(torch.tensor([row])).logits[0].log_softmax(-1)
            nll += [-float(logprobs[i, row[i + 1]]) for i in range(len(row) - 1)]
    tokens = np.array([len(row) - 1 for row in rows])
    found = perplexity(np.array(means), tokens, np.arange(3))
    assert found is not None and found["value"] == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-4)
    assert found["low"] is not None and found["high"] is not None and found["low"] < found["value"] < found["high"]


def test_long_paragraphs_are_cut(toy_base: Callable[[str], Path], tmp_path: Path) -> None:
    """A book without a blank line does not fit into any model."""
    tokenizer = load_tokenizer(str(toy_base("llama")), chat_template="chatml")
    file = tmp_path / "text.txt"
    file.write_text("good " * 2000)
    rows = text_windows(tokenizer, file)
    assert all(2 <= len(row) <= 512 for row in rows) and len(rows) > 1
    assert max(map(len, text_windows(tokenizer, file, context=96))) == 96, "learned positions end in an IndexError"
    file.write_text(" \n\n ")
    with pytest.raises(UserError, match="no paragraph"):
        text_windows(tokenizer, file)
    with pytest.raises(UserError, match=r"cannot read the plain text .*none\.txt"):
        text_windows(tokenizer, tmp_path / "none.txt")


def test_the_plain_text_that_comes_along(toy_base: Callable[[str], Path]) -> None:
    """A package without its text file fails on the first user, not here."""
    tokenizer = load_tokenizer(str(toy_base("llama")), chat_template="chatml")
    assert len(PLAIN_TEXT.read_text(encoding="utf-8").split("\n\n")) == 14
    assert sum(map(len, text_windows(tokenizer, PLAIN_TEXT))) > 900


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A folder with a multiple-choice task on four examples, in the harness's own format."""
    rows = [{"question": f"The film {i} is", "choices": ["good", "bad"], "gold": i % 2} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = ["task: toy_sentiment", "dataset_path: json", "dataset_kwargs:", "  data_files:"]
    lines += [f"    test: {tmp_path / 'rows.jsonl'}", "test_split: test", "output_type: multiple_choice"]
    lines += ['doc_to_text: "{{question}}"', 'doc_to_target: "{{gold}}"', 'doc_to_choice: "{{choices}}"']
    lines += ["metric_list:", "  - metric: acc", "    aggregation: mean", "    higher_is_better: true"]
    (tmp_path / "toy_sentiment.yaml").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_a_task_of_a_local_file(toy_base: Callable[[str], Path], task: Path) -> None:
    """The harness given another model than the policy, or a figure that is lost with its filter's name. The oracle picks the
    choice with the higher log-likelihood by transformers alone."""
    pytest.importorskip("lm_eval")
    tokenizer = load_tokenizer(str(toy_base("llama")), chat_template="chatml")
    options = RewardCardConfig(model="", dataset="", device="cpu", dtype="float32")
    model = load_base(str(toy_base("llama")), options, CPU)
    found = Tasks(["toy_sentiment"], str(task), None)(model, tokenizer, 2, 0)
    plain = AutoModelForCausalLM.from_pretrained(toy_base("llama")).eval()
    right = []
    with torch.no_grad():
        for i in range(4):
            head = tokenizer(f"The film {i} is")["input_ids"]
            likelihoods = []
            for choice in ("good", "bad"):
                row = tokenizer(f"The film {i} is {choice}")["input_ids"]
                logprobs = plain(torch.tensor([row])).logits[0].log_softmax(-1)
                likelihoods.append(sum(float(logprobs[j - 1, row[j]]) for j in range(len(head), len(row))))
            right.append(likelihoods.index(max(likelihoods)) == i % 2)
    accuracy = found["toy_sentiment"]["acc"]
    assert accuracy["value"] == sum(right) / 4
    assert accuracy["error"] is not None
    few = Tasks(["toy_sentiment"], str(task), 1)(model, tokenizer, 2, 0)
    assert few["toy_sentiment"]["acc"]["value"] == right[0]


def test_a_task_that_is_not_there(task: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(UserError, match=r"no task 'toy_sentimant' .did you mean 'toy_sentiment'"):
        Tasks(["toy_sentimant"], str(task), None)
    with pytest.raises(UserError, match="no task folder"):
        Tasks(["toy_sentiment"], str(task / "none"), None)


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ModuleNotFoundError after an hour of sampling."""
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    with pytest.raises(UserError, match=r"pip install 'rlhf-stages\[eval\]'"):
        Tasks(["toy"], None, None)
