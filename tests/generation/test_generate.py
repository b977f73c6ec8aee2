"""`rlhf generate`: answers of artefacts and folders, as text and as lines, against transformers' own generation."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from judged import toy_gold
from peft import PeftModel
from toys import Call
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.base.errors import UserError
from rlhf.generation.chat_model import open_model
from rlhf.generation.config import GenerateConfig, GenerationConfig
from rlhf.generation.generate import _lines, _prompts
from rlhf.models.base import load_base
from rlhf.models.compute import Compute
from rlhf.models.registered import merged_model
from rlhf.models.tokenization import encode_prompt
from rlhf.registry import Registry

MODULE = "rlhf.generation.generate"
ASK = 'Write one sentence of a movie review that starts with "The"'
GREEDY = ["--temperature", "0", "--response_length", "12"]
Caller = Callable[..., Call]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def bare(text: str) -> str:
    """Without white space, at which streams break texts, and which answers are stripped of."""
    return "".join(text.split())


def expected(finished: tuple[Path, Path], prompt: str) -> str:
    """What the PPO policy says by greedy search, opened by hand and written by transformers."""
    registry = Registry(finished[0])
    m, sft = registry.read("ppo/toy").manifest, registry.read("sft/toy")
    base = AutoModelForCausalLM.from_pretrained(m.base_model, dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, str(sft.path)).merge_and_unload()
    model = PeftModel.from_pretrained(model, str(registry.read("ppo/toy").path)).eval()
    tokenizer = AutoTokenizer.from_pretrained(sft.path)
    ids = torch.tensor([encode_prompt(tokenizer, [{"role": "user", "content": prompt}])])
    said = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
                          eos_token_id=m.stop_token_ids, pad_token_id=m.pad_token_id)[0, ids.shape[1] :]  # fmt: skip
    return str(tokenizer.decode(said, skip_special_tokens=True)).strip()


def test_an_artefact_says_what_its_weights_say(finished: tuple[Path, Path], place: list[str], call: Caller) -> None:
    """A PPO policy without the SFT adapter below it, or a sampling habit that is left on."""
    said = call(MODULE, "--model", "ppo/toy", "--prompt", ASK, *GREEDY, *place)
    assert (said.code, bare(said.out)) == (0, bare(expected(finished, ASK)))


def test_standard_input_is_a_prompt(
    finished: tuple[Path, Path], place: list[str], call: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe whose text is taken for several prompts, or whose answer comes with headings."""
    text = f"{ASK}\nand ends with good"
    monkeypatch.setattr(sys, "stdin", io.StringIO(text + "\n"))
    said = call(MODULE, "--model", "ppo/toy", *GREEDY, *place)
    assert bare(said.out) == bare(expected(finished, text))


@pytest.mark.parametrize("module", [MODULE, "rlhf.generation.chat"])
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the second in a C locale
def test_input_that_is_no_text(
    module: str, errors: str, place: list[str], call: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback of the decoder, or of the tokenizer, which takes no half pairs."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9 au lait\n"), "utf-8", errors))
    told = call(module, "--model", "ppo/toy", *place).complaint
    assert "standard input is not UTF-8 (byte 4)" in told or "character 4 is a byte that is not UTF-8" in told


def test_a_file_of_prompts_becomes_lines(place: list[str], call: Caller, tmp_path: Path) -> None:
    """Answers that depend on the batch that they were made in; a sample that repeats another; a score of another answer."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{ASK}\n\nA\nOf the plot and the acting\n")
    words = ["--model", "ppo/toy", "--dataset", prompts, "--samples_per_prompt", "2", "--response_length", "10"]
    words += ["--reward", "judged:toy_reward", *place]
    for size in (1, 4):
        assert (
            call(MODULE, *words, "--per_device_eval_batch_size", size, "--output", tmp_path / f"{size}.jsonl").code == 0
        )
    rows = lines(tmp_path / "4.jsonl")
    assert rows == lines(tmp_path / "1.jsonl")
    assert [(row["number"], row["sample"]) for row in rows] == [(n, s) for n in (1, 2, 3) for s in (0, 1)]
    assert {row["model"] for row in rows} == {"ppo/toy@1"}
    assert rows[0]["response"] != rows[1]["response"]
    assert [row["score"] for row in rows] == pytest.approx(toy_gold([row["response"] for row in rows]), abs=1e-6)
    shown = call(MODULE, *words)
    assert bare(shown.out) == bare("".join(row["response"] for row in rows))
    assert "exists already" in call(MODULE, *words, "--output", tmp_path / "4.jsonl").complaint
    other = call(MODULE, *words, "--seed", "1", "--output", tmp_path / "other.jsonl")
    assert other.code == 0 and lines(tmp_path / "other.jsonl") != rows


def test_models_side_by_side(place: list[str], call: Caller, tmp_path: Path) -> None:
    """Models that draw with different random numbers; a comparison without the reward that one of them was trained on."""
    words = ["--compare", "ppo/toy", "ppo/toy@1", "sft/toy", "--prompt", ASK, "--response_length", "10", *place]
    assert call(MODULE, *words, "--output", tmp_path / "out.jsonl").code == 0
    first, same, other = lines(tmp_path / "out.jsonl")
    assert {**first, "model": ""} == {**same, "model": ""} and other["model"] == "sft/toy@1"
    shown = call(MODULE, *words)
    assert shown.out.count("[ppo/toy@1]") == 2 and shown.out.count("[sft/toy@1]") == 1
    assert f"ppo/toy@1 {first['score']:+.2f}" in shown.err and f"sft/toy@1 {other['score']:+.2f}" in shown.err


def test_a_stop_string_ends_the_answer(place: list[str], call: Caller, tmp_path: Path) -> None:
    """A stop string that is accepted and not used."""
    words = ["--model", "sft/toy", "--prompt", ASK, "--samples_per_prompt", "16", "--response_length", "12", *place]
    for name, more in (("free", []), ("stopped", ["--stop_strings", "e"])):
        assert call(MODULE, *words, *more, "--output", tmp_path / f"{name}.jsonl").code == 0
    free, stopped = lines(tmp_path / "free.jsonl"), lines(tmp_path / "stopped.jsonl")
    for whole, part in zip(free, stopped, strict=True):
        assert whole["response"].startswith(part["response"])
        assert ("e" in whole["response"]) == ("e" in part["response"]) <= part["stopped"]
    assert sum(row["tokens"] for row in stopped) < sum(row["tokens"] for row in free)


def test_a_folder_needs_a_chat_template(base_folder: Path, place: list[str], call: Caller) -> None:
    """A base model that is talked to without any template, or is refused without a way out."""
    words = ["--model", base_folder, "--prompt", ASK, *GREEDY, *place]
    assert "plain" in call(MODULE, *words).complaint and "--chat_template" in call(MODULE, *words).complaint
    assert call(MODULE, *words, "--chat_template", "plain").code == 0


def test_the_folder_of_an_artefact_is_that_artefact(
    finished: tuple[Path, Path], place: list[str], call: Caller, tmp_path: Path
) -> None:
    """A PPO adapter on the base model, without the SFT policy between: it answers, and is nobody's policy."""
    folder = finished[0] / "ppo" / "toy" / "v1"
    elsewhere = ["--registry", tmp_path / "none", *place[2:]]
    said = call(MODULE, "--model", folder, "--prompt", ASK, *GREEDY, *elsewhere)
    assert bare(said.out) == bare(expected(finished, ASK))
    compared = call(MODULE, "--compare", folder, folder, "--prompt", ASK, *GREEDY, *elsewhere)
    assert compared.code == 0 and "score: ppo/toy@1" in compared.err
    assert "writes no text" in call(MODULE, "--model", finished[0] / "reward/toy/v1", "--prompt", ASK, *place).complaint
    shutil.copytree(folder, tmp_path / "copy")
    complaint = call(MODULE, "--model", tmp_path / "copy", "--prompt", ASK, *place).complaint
    assert "copy of ppo/toy@1" in complaint and "--form merged" in complaint


def test_a_quantised_policy_is_quantised_once(finished: tuple[Path, Path], tmp_path: Path) -> None:
    """An adapter merged into 4-bit weights: they are rounded a second time, and a small adapter is rounded away."""
    registry = Registry(finished[0])
    common: dict[str, Any] = {"registry": str(registry.root), "device": "cpu", "dtype": "float32"}
    shutil.copytree(registry.read("sft/toy").path, tmp_path / "adapter")
    for name, stage in (("ppo/toy", "ppo"), (str(tmp_path / "adapter"), "sft")):
        whole = tmp_path / stage
        merged_model(registry, registry.read(f"{stage}/toy")).save_pretrained(whole)
        config = GenerationConfig(model=name, quantization="4bit", **common)
        compute = Compute.choose(config)
        ours = open_model(name, config, registry, compute).model
        right = load_base(str(whole), config, compute).eval()
        assert any(type(module).__name__ == "Linear4bit" for module in ours.modules())
        ids = torch.arange(3, 40)[None]
        with torch.no_grad():
            assert torch.equal(ours(ids).logits, right(ids).logits), name


def test_figures_of_a_check(place: list[str], call: Caller, tmp_path: Path) -> None:
    """A check of other rows than those that were answered."""
    file = tmp_path / "right.jsonl"
    said = call(MODULE, "--model", "ppo/toy", "--prompt", ASK, *GREEDY, *place).out.strip()
    rows = [{"prompt": ASK, "reference": said or "x"}, {"prompt": "A", "reference": "nothing of the kind"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    checked = call(MODULE, "--model", "ppo/toy", "--dataset", file, "--check", "question_answering", *GREEDY, *place)
    assert "ppo/toy@1 exact_match: 0.500" in checked.err
    words = ["--dataset", file, "--check", "question_answering", "--output", tmp_path / "said.jsonl", *GREEDY, *place]
    assert call(MODULE, "--model", "ppo/toy", *words).code == 0
    kept = json.loads((tmp_path / "said.check.json").read_text())
    assert kept["check"] == "question_answering" and kept["models"]["ppo/toy@1"]["exact_match"]["value"] == 0.5
    (tmp_path / "said.jsonl").unlink()
    assert "said.check.json exists already" in call(MODULE, "--model", "ppo/toy", *words).complaint


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "A"], "--model NAME"),
        (["--model", "ppo/toy", "--compare", "sft/toy", "--prompt", "A"], "--model NAME"),
        (["--model", "ppo/toi", "--prompt", "A"], "did you mean 'ppo/toy'"),
        (["--model", "reward/toy", "--prompt", "A"], "writes no text"),
        (["--model", "ppo/toy", "--prompt", " "], "prompt 1: the prompt is empty"),
        (["--model", "ppo/toy", "--prompt", "film " * 300], "context of 256 tokens"),
        (["--model", "ppo/toy", "--dataset", "none.jsonl"], "no file none.jsonl"),
        (["--model", "ppo/toy", "--prompt", "A", "--top_p", "0"], "top_p"),
        (["--model", "ppo/toy", "--prompt", "A", "--check", "summary"], "check is one of"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, place: list[str], call: Caller) -> None:
    """A traceback, or an answer to something else."""
    assert message in call(MODULE, *words, *place).complaint


def test_a_line_of_prompts_ends_at_a_newline_only(tmp_path: Path) -> None:
    """Catches: a prompt cut at U+2028 or a form feed, and a byte order mark in the first one."""
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffone\u2028two\x0cthree\u0085four\r\nfive\n".encode())
    assert _lines(file) == ["one\u2028two\x0cthree\u0085four", "five"]
    file.write_bytes("\ufeffone\u2028two\r\nfive\n".encode("utf-16-le"))
    assert _lines(file) == ["one\u2028two", "five"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "fine\ncafé\n".encode("latin-1"), "p.txt is not UTF-8: line 2, byte 4 (0xe9"),
        ("p.txt", b"fine\na\0b\n", "p.txt is no text: line 2, byte 2 is a zero byte"),
        ("p.txt", "fine\nhalf \ud83d\n".encode("utf-8", "surrogatepass"), "p.txt is not UTF-8: line 2, byte 6"),
        ("p.txt", "fine\nline\n".encode("utf-16-le"), "p.txt is UTF-16LE, and no mark"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "half \\ud83d"}', "p.jsonl, row 2: holds half of a surrogate pair"),
        ("p.jsonl", b'{"prompt": "a", "reference": "\\ud83d"}', "p.jsonl, row 1: holds half of a surrogate pair"),
        ("p.csv", "prompt\ncafé\n".encode("latin-1"), "p.csv, row 1: not UTF-8 (character 4 of 'prompt')"),
        ("p.csv", b'prompt\na\n"b\nc\n', "p.csv: a quote in row 2 is not closed"),
    ],
)
def test_prompts_that_are_no_text(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """Catches: a traceback of a tokenizer or of the file of answers, and a line without the place."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        _prompts(GenerateConfig(model=["x"], dataset=str(tmp_path / name)))
    assert message in str(error.value)


def test_prompts_in_a_table(tmp_path: Path) -> None:
    """Catches: a prompt cut at a newline in its cell, and a mark in the name of the first column."""
    file = tmp_path / "p.csv"
    file.write_bytes('\ufeffprompt,id\r\n"one\ntwo ""2""\u2028",1\r\nthree,2\r\n'.encode())
    rows = _prompts(GenerateConfig(model=["x"], dataset=str(file)))
    assert [row["prompt"][0]["content"] for row in rows] == ['one\ntwo "2"\u2028', "three"]


def test_half_a_surrogate_pair_in_system(place: list[str], call: Caller, tmp_path: Path) -> None:
    """Catches: a traceback of the tokenizer for a system text of a config file."""
    (tmp_path / "c.yaml").write_text('system: "half \\ud83d"\n')
    words = ["--config", str(tmp_path / "c.yaml"), "--model", "ppo/toy", "--prompt", "A", *place]
    assert "c.yaml is not valid YAML: 'utf-8' codec can't encode character" in call(MODULE, *words).complaint
