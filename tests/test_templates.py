"""Chat templates of strangers: what they change, refuse, leave out, or write besides the texts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from rlhf.base.errors import UserError
from rlhf.data_prep.load import Loaded
from rlhf.data_prep.writable import TextsChanged, writable
from rlhf.models.templates import TEMPLATES, template_text
from rlhf.models.tokenization import (
    TemplateChange,
    TemplateRefusal,
    check_encoding,
    check_header,
    check_texts,
    closing_text,
    encode_prompt,
    freeze_date,
    load_tokenizer,
    tokenizer_hashes,
)

USER = {"role": "user", "content": "What is the film?"}
ANSWER = {"role": "assistant", "content": "The plot is good"}
THOUGHT = {"role": "assistant", "content": "<think>\nIt was not bad.\n</think>\n\nThe plot is good"}
SYSTEM = {"role": "system", "content": "Be very funny"}
#: Prompt and answer by name.
TALKS = {
    "plain": ([USER], ANSWER),
    "turns": ([USER, ANSWER, USER], ANSWER),
    "thought": ([USER], THOUGHT),
    "earlier thought": ([USER, THOUGHT, USER], ANSWER),
    "system": ([SYSTEM, USER], ANSWER),
}
FOLDER = Path(trl.__file__).parent / "chat_templates"
#: Talks that a published template cannot be trained on; all others can. Each outcome was read in the template.
_THINKS_FIRST = {
    "plain",
    "turns",
    "earlier thought",
    "system",
}  # their prompts begin with <think>, these answers do not
UNFIT = {
    "deepseek_r1_distill": _THINKS_FIRST | {"thought"},  # and the thought is cut
    "deepseek_r1_distill_training": _THINKS_FIRST,
    "deepseekv3": _THINKS_FIRST | {"thought"},
    "deepseekv3_training": _THINKS_FIRST | {"thought"},
    **{f"nemotron_3_{name}": _THINKS_FIRST for name in ("5_lightning", "nano", "super", "ultra")},
    **{f"nemotron_3_{name}_training": _THINKS_FIRST for name in ("5_lightning", "nano", "super", "ultra")},
    "qwen3_5_nothink": {"thought"},  # its prompts end with an empty thought
    "qwen3_5_nothink_training": {"thought"},
    "gemma": {"system"},
    "gemma_training": {"system"},
    **{name: set(TALKS) for name in ("idefics3", "idefics3_training", "smolvlm", "smolvlm_training")},  # contents are lists
    **{name: set(TALKS) for name in ("llava_next", "llava_next_training")},
}  # fmt: skip


@pytest.fixture
def tokenizer(toy_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The toy tokenizer with a BOS token that is no turn mark, and ChatML."""
    made = copy.deepcopy(toy_tokenizer)
    made.add_special_tokens({"bos_token": "<s>", "pad_token": "<|endoftext|>"})
    made.chat_template = TEMPLATES["chatml"]
    return made


def chatml(content: str = "m.content", *, header: str = "<|im_start|>assistant\n", before: str = "") -> str:
    """ChatML that writes something else for a content, or as the header."""
    return (
        f"{before}{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{{{{ {content} }}}}<|im_end|>\n{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{header}{{% endif %}}"
    )


# Published templates


@pytest.mark.parametrize("name", sorted(file.stem for file in FOLDER.glob("*.jinja")))
def test_templates_of_trl(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """Sound templates of real families are refused, or rows that they cut are trained on."""
    tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text()
    unfit = set()
    for talk, (prompt, answer) in TALKS.items():
        try:
            check_texts(tokenizer, prompt, [[answer]])
            check_header(tokenizer, prompt)
        except (TemplateChange, TemplateRefusal):
            unfit.add(talk)
            continue
        text = tokenizer.decode([token for tokens in check_encoding(tokenizer, prompt, [answer]) for token in tokens])
        for message in (*prompt, answer):
            assert "".join(message["content"].rpartition("</think>")[2].split()) in "".join(text.split())
    assert unfit == UNFIT.get(name, set())


# Headers

HEADERS = {
    "chatml": (chatml(), True),
    "no generation prompt": (chatml(header=""), False),
    "half a header": (chatml(header="<|im_start|>"), False),
    "another header": (chatml(header="\n"), False),
    "empty thought after the header": (chatml("'<think>\n\n</think>\n\n' + m.content if loop.last else m.content"), True),
    "channel": (
        "{% for m in messages %}<start>{{ m.role }}{% if m.role == 'assistant' %}<channel>final{% endif %}<message>"
        "{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<start>assistant{% endif %}",
        True,
    ),
    "Llama 2": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}",
        True,
    ),
    "always a header after the user": (
        "{% for m in messages %}{% if m.role == 'user' %}User: {{ m.content }}\nBot:{% else %} {{ m.content }}\n{% endif %}"
        "{% endfor %}",
        True,
    ),
    "words without generation prompt": (
        "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}",
        False,
    ),
    "words as half a header": (
        "{% for m in messages %}### {{ 'Response' if m.role == 'assistant' else 'Instruction' }}:\n{{ m.content }}\n\n"
        "{% endfor %}{% if add_generation_prompt %}### {% endif %}",
        False,
    ),
    **{name: (text, True) for name, text in TEMPLATES.items()},
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_answers(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """The header is trained and sampled, as if the model had to write whose turn it is; or a format without one is refused."""
    tokenizer.chat_template, sound = HEADERS[name]
    if sound:
        check_header(tokenizer, [USER])
    else:
        with pytest.raises(UserError, match="between the prompt and the answer"):
            writable(loaded([([USER], ANSWER)] * 2), tokenizer)


def test_an_answer_that_is_written_twice(tokenizer: PreTrainedTokenizerFast) -> None:
    """Each text stands in what the template writes, and the model is trained to say everything twice."""
    tokenizer.chat_template = chatml("m.content ~ m.content")
    with pytest.raises(UserError, match="the chat template writes an answer 2 times"):
        writable(loaded([([USER], ANSWER)] * 2), tokenizer)


def test_an_answer_of_one_letter_that_is_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    """A letter stands somewhere in every prompt, so an answer `A` that the template drops seemed to be written."""
    tokenizer.chat_template = chatml(
        "(m.content if m.content | length > 1 else '')", header="<|im_start|>assistant\nA:"
    )
    answer = {"role": "assistant", "content": "A"}
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ m.role }}\n", "{{ m.role }}\n{{ 'A:' if m.role == 'assistant' }}"
    )
    with pytest.raises(TextsChanged, match="changes the answer 'A'"):
        writable(loaded([([USER], ANSWER), ([USER], answer)]), tokenizer)


@pytest.mark.parametrize(
    ("template", "closing"),
    [
        (chatml(), ""),
        (chatml().replace("<|im_end|>", "<|eot|>"), "<|eot|>"),
        (chatml().replace("<|im_end|>", "<s>"), ""),  # a token, though not the stop token
        (chatml().replace("<|im_end|>", "<|eot|>{{ eos_token }}"), "<|eot|>"),
        (TEMPLATES["dialogue"], ""),
        (TEMPLATES["plain"], ""),
    ],
)
def test_marks_that_are_text(tokenizer: PreTrainedTokenizerFast, template: str, closing: str) -> None:
    """ChatML on a model without its tokens: every sampled answer ends in `<|im_end|>`, letter by letter."""
    tokenizer.chat_template = template
    assert closing_text(tokenizer) == closing


# Texts


def loaded(talks: list[tuple[Any, Any]]) -> Loaded:
    """Demonstrations from a file whose first line holds something else."""
    rows = [{"prompt": prompt, "completion": [answer]} for prompt, answer in talks]
    numbers = list(range(2, len(rows) + 2))
    return Loaded(Dataset.from_list(rows), {}, "", numbers=numbers, source="talks.jsonl")


CHANGES = {
    "cuts reasoning": ("m.content.split('</think>')[-1]", "thought"),
    "another case": ("m.content | replace('The', 'THE')", "plain"),
    "cuts long texts": ("m.content[:10]", "plain"),
    "drops earlier answers": ("'' if m.role == 'assistant' and not loop.last else m.content", "turns"),
    "drops the system": ("'' if m.role == 'system' else m.content", "system"),
    "escapes": ("m.content | replace('good', 'bad')", "earlier thought"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_text_that_the_template_changes_in_one_late_row(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """Only the first eight rows were looked at: what a template cuts from later ones is lost without a word."""
    content, talk = CHANGES[name]
    tokenizer.chat_template = chatml(content)
    good = ([{**USER, "content": "A film"}], {**ANSWER, "content": "A plot"})
    writable(loaded([good] * 20), tokenizer)
    with pytest.raises(
        TextsChanged, match=r"^talks.jsonl, row 13: .* in 2 of 21 rows; give another --chat_template"
    ) as error:
        writable(loaded([*[good] * 11, TALKS[talk], *[good] * 8, TALKS[talk]]), tokenizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["m.content | trim", "m.content | replace('\\n', ' ')", "' ' + m.content + ' '"])
def test_white_space_may_change(tokenizer: PreTrainedTokenizerFast, content: str) -> None:
    """Half of the published templates strip texts: a check of every character refuses them."""
    tokenizer.chat_template = chatml(content)
    check_texts(tokenizer, [{**USER, "content": " a\nfilm "}], [[{**ANSWER, "content": "\na  plot \n"}]])


def test_results_of_tools_may_be_json(tokenizer: PreTrainedTokenizerFast) -> None:
    """Llama 3.1 and gpt-oss write them with tojson."""
    tokenizer.chat_template = chatml("m.content | tojson if m.role == 'tool' else m.content")
    check_texts(tokenizer, [USER, ANSWER, {"role": "tool", "content": 'é "a"\n'}], [[ANSWER]])


def test_rows_that_the_template_refuses(tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]) -> None:
    """One system turn stops a run of thousands of rows, without its file and row; or the row is lost without a word."""
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = chatml(before=refuse)
    stop = ([USER], {**ANSWER, "content": "a <|im_end|> b"})
    data, refused = writable(loaded([TALKS["plain"], TALKS["system"], TALKS["plain"], stop]), tokenizer)
    reasons = [
        "the chat template cannot write a conversation of system, user: no system; another --chat_template may",
        "the answer holds the stop token <|im_end|> in its middle",
    ]
    assert data.numbers == [2, 4] and refused == {reasons[0]: [3], reasons[1]: [5]}
    assert f"left out: {reasons[0]} (row 3 of talks.jsonl)" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"can write none of the 2 rows .*: no system; .*: 2"):
        writable(loaded([TALKS["system"]] * 2), tokenizer)


@pytest.mark.parametrize(
    "error", ["{{ 1 // 0 }}", "{{ messages[9].role }}", "{{ none + 'a' }}", "{{ strftime_now(1) }}"]
)
def test_an_error_within_a_template_is_a_refusal(tokenizer: PreTrainedTokenizerFast, error: str) -> None:
    """A traceback out of jinja."""
    tokenizer.chat_template = chatml(before=error)
    with pytest.raises(TemplateRefusal):
        check_texts(tokenizer, [USER], [[ANSWER]])


# BOS

WRITES, WRITES_NONE = "{{ bos_token }}" + TEMPLATES["chatml"], TEMPLATES["chatml"]
MARK = "{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("adds", "own", "given", "count"),
    [
        (True, WRITES, None, 1),
        (True, WRITES, "chatml", 1),
        (True, WRITES, WRITES, 1),
        (True, WRITES, "plain", 1),
        (True, WRITES_NONE, None, 1),
        (True, WRITES_NONE, "chatml", 1),
        (True, None, "chatml", 1),
        (True, None, WRITES, 1),
        (False, WRITES, None, 1),
        (False, WRITES, "chatml", 1),
        (False, WRITES, "dialogue", 1),
        (False, WRITES_NONE, None, 0),
        (False, WRITES_NONE, "chatml", 0),
        (False, None, "plain", 0),
        (False, MARK, "plain", 0),  # a token before each turn is no BOS
        (True, {"default": WRITES_NONE, "tool_use": WRITES}, None, 1),
    ],
)
def test_one_bos(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, adds: bool, own: Any, given: str | None, count: int
) -> None:
    """A named template drops the BOS token that the base is used to, or a template and a tokenizer write one each."""
    if adds:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    tokenizer.chat_template = own
    tokenizer.save_pretrained(tmp_path / "base")
    if given and given not in TEMPLATES:
        (tmp_path / "file.jinja").write_text(given)
        given = str(tmp_path / "file.jinja")
    first = load_tokenizer(str(tmp_path / "base"), chat_template=given, untrained=True)
    first.save_pretrained(tmp_path / "artefact")
    later = load_tokenizer(str(tmp_path / "artefact"))
    exported = later.apply_chat_template([USER], add_generation_prompt=True, tokenize=True, return_dict=True)
    for ids in (encode_prompt(first, [USER]), encode_prompt(later, [USER]), exported["input_ids"]):
        assert ids.count(tokenizer.bos_token_id) == count
        assert (ids[0] == tokenizer.bos_token_id) == bool(count)
    assert tokenizer_hashes(first) == tokenizer_hashes(later)


def test_a_trained_tokenizer_keeps_its_template(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """An artefact of an earlier version, trained without BOS, would be sampled with one."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).chat_template == TEMPLATES["chatml"]


def test_bos_before_a_template_that_begins_with_a_block(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Blanks before a block at the beginning of a line are no text; after something else they would be."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = "  " + TEMPLATES["chatml"]
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path), untrained=True)
    text = loaded.apply_chat_template([USER], tokenize=False)
    assert text == f"<s><|im_start|>user\n{USER['content']}<|im_end|>\n"


# Dates

DATED = {
    "{{ strftime_now('%d %b %Y') }}": "05 Mar 2024",
    "{{ strftime_now(\"%Y-%m-%d\") }}": "2024-03-05",
    "{% set form = '%-d %B' %}{{ strftime_now(form) }}, {{ strftime_now('%A') }}": "5 March, Tuesday",
    "{%- if strftime_now is defined %}{%- set day = strftime_now('%d %b %Y') %}{%- else %}{%- set day = '26 Jul 2024' %}"
    "{%- endif %}{{ day }}": "05 Mar 2024",
    "{% macro head() %}on {{ strftime_now('%H:%M %j') }}{% endmacro %}{{ head() }}": "on 00:00 065",
    "{% for m in messages %}{{ strftime_now('%y')|int + 1 }}{% endfor %}": "25",
}  # fmt: skip


@pytest.mark.parametrize("text", DATED)
def test_a_date_is_frozen(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, text: str) -> None:
    """Prompts of PPO a week later are others than those of SFT, and no run can be made again."""
    tokenizer.chat_template = chatml(before=text + "|")
    assert freeze_date(tokenizer, date(2024, 3, 5))
    tokenizer.save_pretrained(tmp_path)
    written = load_tokenizer(str(tmp_path)).apply_chat_template([USER], tokenize=False)
    assert written == f"{DATED[text]}|<|im_start|>user\n{USER['content']}<|im_end|>\n"


def test_templates_without_a_date_stay(tokenizer: PreTrainedTokenizerFast) -> None:
    """Every artefact would have another template than its base, for nothing."""
    assert not freeze_date(tokenizer, date(2024, 3, 5)) and tokenizer.chat_template == TEMPLATES["chatml"]


@pytest.mark.parametrize("name", [file.stem for file in FOLDER.glob("*.jinja") if "strftime_now" in file.read_text()])
def test_dated_templates_of_trl(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """A macro in front of a real template changes something else in it."""
    tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text()
    before = tokenizer.apply_chat_template([SYSTEM, USER], add_generation_prompt=True, tokenize=False)
    freeze_date(tokenizer, date.today())
    assert tokenizer.apply_chat_template([SYSTEM, USER], add_generation_prompt=True, tokenize=False) == before
    freeze_date(tokenizer, date(1999, 3, 5))  # the outer macro is the later one, and the inner one keeps its day
    assert tokenizer.apply_chat_template([SYSTEM, USER], add_generation_prompt=True, tokenize=False) == before


# Files


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_template_files(tmp_path: Path, encoding: str, end: str) -> None:
    """A byte order mark, or the carriage returns of an editor, at the beginning of every prompt."""
    file = tmp_path / "mine.jinja"
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    file.write_bytes((mark + f"é{end}{{{{ messages }}}}").encode(encoding))
    assert template_text(str(file)) == "é\n{{ messages }}"


def test_a_mark_in_the_models_own_template(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The mark is part of a template that was saved from such a file."""
    tokenizer.chat_template = "\ufeff" + TEMPLATES["chatml"]
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path), untrained=True).chat_template == TEMPLATES["chatml"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("caf\xe9".encode("latin-1"), "mine.jinja is not UTF-8: line 1, byte 4"),
        (b"{% for m in messages %}\n{{ m.content }}", "mine.jinja has an error in line 2: Unexpected end of template"),
        (b"\n\n{{ messages | turn }}", "mine.jinja has an error in line 3: No filter named 'turn'"),
    ],
)
def test_template_files_that_cannot_be_used(
    toy_base: Callable[[str], Path], tmp_path: Path, content: bytes, message: str
) -> None:
    """A traceback, or a message without the place."""
    file = tmp_path / "mine.jinja"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(str(toy_base("llama")), chat_template=str(file))


def test_templates_by_name(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """A tokenizer with one template for talks and one for tools."""
    tokenizer.chat_template = {"default": TEMPLATES["chatml"], "tool_use": "{{ strftime_now('%Y') }}" + TEMPLATES["plain"]}  # type: ignore[assignment]  # fmt: skip
    assert freeze_date(tokenizer, date(2024, 3, 5))
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert tokenizer.decode(encode_prompt(loaded, [USER])).startswith("<|im_start|>user\n")
    assert loaded.apply_chat_template([USER], tools=[{"name": "f"}], tokenize=False) == f"2024{USER['content']}"
