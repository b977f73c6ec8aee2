"""`show`: what is printed is what the stages train on, with the trained tokens marked; and a wrong mask is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from prepared import Built, pairs
from registry.test_registry import FIELDS
from toys import Call

from rlhf.base.errors import UserError
from rlhf.data_prep.load import load_rows
from rlhf.models.tokenization import check_encoding, load_tokenizer
from rlhf.registry import Registry
from rlhf.reward.rankings import encode_rankings
from rlhf.stages import sft

Build = Callable[..., Built]
PROMPT = [{"role": "user", "content": "Write one sentence"}]
ANSWER = [{"role": "assistant", "content": "The film is good"}]


@pytest.fixture
def recipe(tmp_path: Path, build_data: Build, toy_base: Callable[[str], Path]) -> Path:
    """A recipe whose folder is made."""
    built = build_data(pairs(60), stages="shared", validation_share=0.3)
    file = tmp_path / "data.yaml"
    file.write_text(
        f"sources: [x]\noutput_dir: {built.folder}\ntokenizer: {toy_base('llama')}\nchat_template: chatml\n"
    )
    return file


def test_rows_as_the_model_sees_them(recipe: Path, call: Callable[..., Call], tmp_path: Path) -> None:
    """Catches: marks around the prompt, or around a response without its stop token; --n not read; rows of one kind only."""
    shown = call("rlhf.data_prep.__main__", "show", "--config", recipe, "--n", 2)
    assert shown.code == 0, shown.err
    built = Built(tmp_path / "out")
    row = built.rows("demonstrations", "train")[0]
    prompt, answer = (message["content"] for message in row["messages"])
    assert f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n⟦{answer}<|im_end|>⟧" in shown.out
    assert (
        shown.out.count("-- demonstrations") == shown.out.count("-- comparisons") == shown.out.count("-- prompts") == 2
    )
    assert shown.out.count("⟦") == 2 + 2 * 2, "a demonstration has one answer, a pair two, a prompt none"
    assert "rating 1;" in shown.out and "rating 0;" in shown.out


def test_show_takes_a_stages_file(tmp_path: Path, toy_config: Path, call: Callable[..., Call]) -> None:
    """Catches: a stage's own template or tokenizer that `show` does not use."""
    shown = call(
        "rlhf.data_prep.__main__", "show", "--config", toy_config / "sft.yaml", "--n=1", "--split", "validation"
    )
    assert shown.code == 0 and "<|im_start|>assistant\n⟦This" in shown.out


def test_a_tokenizer_of_the_registry(
    tmp_path: Path, toy_config: Path, toy_base: Callable[[str], Path], call: Callable[..., Call]
) -> None:
    """Catches: pretrain/NAME looked up in another registry than the stage's."""

    def write(folder: Path) -> None:
        load_tokenizer(str(toy_base("llama")), chat_template="chatml").save_pretrained(folder)

    Registry(tmp_path / "registry").publish("pretrain", "toy", write, **{**FIELDS, "kind": "full"})
    values = yaml.safe_load((toy_config / "sft.yaml").read_text())
    values |= {"model_name_or_path": "pretrain/toy", "registry": str(tmp_path / "registry")}
    file = tmp_path / "sft.yaml"
    file.write_text(yaml.safe_dump(values))
    shown = call("rlhf.data_prep.__main__", "show", "--config", file, "--n=1")
    assert shown.code == 0 and "<|im_start|>assistant\n⟦" in shown.out, shown.err


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        (
            "sources: [x]\noutput_dir: nowhere/at/all\ntokenizer: TOKENIZER\nchat_template: chatml\n",
            [],
            "no data at nowhere/at/all",
        ),
        ("output_dir: OUT\n", [], "names no tokenizer; give one with --tokenizer"),
        ("output_dir: OUT\ntokenizer: TOKENIZER\n", [], "has no chat template"),
        ("output_dir: OUT\ntokenizer: TOKENIZER\n", ["--m", "3"], "unknown option --m"),
        ("output_dir: OUT\ntokenizer: TOKENIZER\n", ["--n", "0"], "n must be at least 1"),
    ],
)
def test_show_refuses_in_one_line(
    recipe: Path,
    toy_base: Callable[[str], Path],
    call: Callable[..., Call],
    content: str,
    words: list[str],
    message: str,
) -> None:
    """Catches: a traceback where a tokenizer, a template or the data is missing."""
    file = recipe.with_name("other.yaml")
    file.write_text(content.replace("OUT", str(recipe.parent / "out")).replace("TOKENIZER", str(toy_base("llama"))))
    assert message in call("rlhf.data_prep.__main__", "show", "--config", file, *words).complaint


def test_the_mask_is_checked_by_decoding(toy_base: Callable[[str], Path]) -> None:
    """Catches: a template that changes the answer, writes two BOS tokens, or an answer with a stop token in its middle."""
    tokenizer: Any = load_tokenizer(str(toy_base("llama")), chat_template="chatml")
    head, tail = check_encoding(tokenizer, PROMPT, ANSWER)
    assert tokenizer.decode(head).endswith("assistant\n") and tokenizer.decode(tail) == "The film is good<|im_end|>"
    with pytest.raises(UserError, match="hold no other; it holds 2"):
        check_encoding(tokenizer, PROMPT, [{"role": "assistant", "content": "The <|im_end|> film"}])
    loud = copy.deepcopy(tokenizer)
    loud.chat_template = tokenizer.chat_template.replace("message['content'] +", "message['content'] | upper +")
    with pytest.raises(
        UserError, match=r"the trained tokens read 'THE FILM IS GOOD', which is not the answer 'The film"
    ):
        check_encoding(loud, PROMPT, ANSWER)
    twice = copy.deepcopy(tokenizer)
    twice.chat_template = "{{ bos_token }}{{ bos_token }}" + tokenizer.chat_template
    twice.bos_token = "The"
    with pytest.raises(UserError, match="begins with two BOS tokens"):
        check_encoding(twice, PROMPT, ANSWER)


@pytest.mark.parametrize(
    ("encode", "kind"), [(sft.tokenize, "demonstrations"), (encode_rankings, "comparisons")], ids=["sft", "reward"]
)
def test_stages_check_the_mask_before_they_train(
    toy_base: Callable[[str], Path], toy_data: Path, encode: Callable[..., Any], kind: Any
) -> None:
    """Catches: hours of training on answers that a template has rewritten."""
    tokenizer: Any = load_tokenizer(str(toy_base("llama")), chat_template="chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content'] +", "message['content'] | upper +")
    with pytest.raises(UserError, match="which is not the answer"):
        encode(load_rows(toy_data, "train", kind=kind), tokenizer, 64)
