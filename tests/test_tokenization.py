"""One tokenizer policy: pad is not stop, answers end in one stop token, and training sees the tokens that sampling sees."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf.base.errors import UserError
from rlhf.models.messages import with_parts
from rlhf.models.sequences import pad
from rlhf.models.tokenization import (
    TEMPLATES,
    TemplateRefusal,
    check_texts,
    decode_response,
    encode_prompt,
    encode_response,
    last_user_text,
    load_tokenizer,
    stop_token_ids,
    tokenizer_hashes,
)

PROMPT = [{"role": "user", "content": "Write one sentence"}]
ANSWER = [{"role": "assistant", "content": "The film is good"}]


@pytest.fixture
def saved(toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Callable[..., str]:
    """`saved(pad_token=None)`: folder of the toy tokenizer with some attributes changed."""

    def save(**changes: Any) -> str:
        tokenizer = copy.deepcopy(toy_tokenizer)
        for name, value in changes.items():
            setattr(tokenizer, name, value)
        folder = tmp_path / f"tokenizer{len(list(tmp_path.iterdir()))}"
        tokenizer.save_pretrained(folder)
        return str(folder)

    return save


# Pad and stop


@pytest.mark.parametrize("pad_token", ["<|im_end|>", None])
def test_pad_is_not_stop(saved: Callable[..., str], pad_token: str | None) -> None:
    """Padding with the stop token, or `pad = eos` where there is none: a mask from `token != pad` loses the stop token."""
    folder = saved(pad_token=pad_token)
    plain = AutoTokenizer.from_pretrained(folder)
    assert plain.pad_token_id in (None, plain.eos_token_id), "the toy tokenizer has to have the fault that is mended"
    tokenizer = load_tokenizer(folder, chat_template="chatml")
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.pad_token_id not in stop_token_ids(tokenizer) == [plain.eos_token_id]
    assert len(tokenizer) == len(plain), "a new token would need a new row in the embedding"


def test_own_pad_token_is_kept(saved: Callable[..., str]) -> None:
    """A tokenizer that pads rightly already must not be given another pad token than its model was trained with."""
    assert load_tokenizer(saved(pad_token="<|im_start|>"), chat_template="chatml").pad_token == "<|im_start|>"


def test_no_token_to_pad_with(saved: Callable[..., str]) -> None:
    """With no spare token the choice must be the user's: any silent one is a token that means something."""
    folder = saved(eos_token="<|endoftext|>", pad_token="<|endoftext|>", unk_token="<|endoftext|>", bos_token=None)
    with pytest.raises(UserError, match="no spare special token; add a pad_token"):
        load_tokenizer(folder, chat_template="plain")


def test_no_stop_token(saved: Callable[..., str]) -> None:
    """Answers would have no end, and PPO would crash on `int(None)` much later."""
    with pytest.raises(UserError, match="no stop token"):
        load_tokenizer(saved(eos_token=None, pad_token="<|endoftext|>"), chat_template="chatml")


def test_no_tokenizer(tmp_path: Path) -> None:
    """transformers' message about a missing tokenizer is a paragraph."""
    with pytest.raises(UserError, match="no tokenizer at") as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)


# Templates


def test_no_template(saved: Callable[..., str]) -> None:
    """A base model without a template: the message names those that can be given."""
    with pytest.raises(
        UserError, match=r"no chat template; give one of \['chatml', 'dialogue', 'plain'\] with --chat_template"
    ):
        load_tokenizer(saved())


def test_unknown_template(saved: Callable[..., str]) -> None:
    """A misspelt name taken for a template would render every prompt as that word."""
    with pytest.raises(UserError, match="did you mean 'chatml'"):
        load_tokenizer(saved(), chat_template="chatlm")


def test_template_from_a_file_and_the_models_own(saved: Callable[..., str], tmp_path: Path) -> None:
    """The option has to win over the model's own template, and without it the model's own has to stay."""
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}<{{ m['content'] }}>{% endfor %}")
    folder = saved(chat_template="OWN")
    assert load_tokenizer(folder).chat_template == "OWN"
    assert load_tokenizer(folder, chat_template=str(file)).chat_template == file.read_text()
    assert load_tokenizer(folder, chat_template="plain").chat_template == TEMPLATES["plain"]


def test_template_that_changes_the_prompt(saved: Callable[..., str]) -> None:
    """Templates that drop the thinking of past turns, or number them, render the prompt differently once an answer follows:
    the labels would then start at the wrong token."""
    template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer = load_tokenizer(saved(chat_template=template))
    with pytest.raises(UserError, match=r"differently when an answer follows: '2Write one .*' in place of '1Write one"):
        encode_response(tokenizer, PROMPT, ANSWER)


def test_a_template_that_refuses_a_role(saved: Callable[..., str]) -> None:
    """A traceback out of jinja, as with Gemma's templates and a system prompt."""
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer = load_tokenizer(saved(chat_template=refuses + TEMPLATES["chatml"]))
    assert encode_prompt(tokenizer, PROMPT)
    with pytest.raises(UserError, match=r"of system, user: System role not supported; .* --chat_template"):
        encode_prompt(tokenizer, [{"role": "system", "content": "be brief"}, *PROMPT])


# Prompt and answer


@pytest.mark.parametrize("name, head, tail", [
    ("chatml", "<|im_start|>user\nWrite one sentence<|im_end|>\n<|im_start|>assistant\n", "The film is good<|im_end|>"),
    ("plain", "Write one sentence", "The film is good<|im_end|>"),
])  # fmt: skip
def test_texts_of_prompt_and_answer(saved: Callable[..., str], name: str, head: str, tail: str) -> None:
    """A header that is missing, doubled, or counted to the answer; ChatML's line break after the stop token taken for text."""
    tokenizer = load_tokenizer(saved(), chat_template=name)
    prompt, answer = encode_prompt(tokenizer, PROMPT), encode_response(tokenizer, PROMPT, ANSWER)
    assert tokenizer.decode(prompt) == head and tokenizer.decode(answer) == tail
    stop = tokenizer.eos_token_id
    assert answer.count(stop) == 1 and answer[-1] == stop
    assert tokenizer.pad_token_id not in prompt + answer


def test_prompt_is_what_sampling_sees(saved: Callable[..., str]) -> None:
    """A stage that renders the prompt without the answer's header trains on other prompts than it is asked later. The
    oracle is transformers' own way from messages to ids."""
    tokenizer = load_tokenizer(saved(), chat_template="chatml")
    oracle = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert encode_prompt(tokenizer, PROMPT) == oracle["input_ids"]


def test_no_double_bos(toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Llama's template writes the BOS token and its tokenizer adds one: two of them, which no model has seen."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(toy_tokenizer)
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATES["plain"]
    tokenizer.save_pretrained(tmp_path / "bos")
    loaded = load_tokenizer(str(tmp_path / "bos"))
    assert loaded("a")["input_ids"][0] == loaded.bos_token_id, "the toy tokenizer has to add one by itself"
    prompt, answer = encode_prompt(loaded, PROMPT), encode_response(loaded, PROMPT, ANSWER)
    assert prompt.count(loaded.bos_token_id) == 1 and prompt[0] == loaded.bos_token_id
    assert loaded.bos_token_id not in answer


def test_no_token_spans_the_border(saved: Callable[..., str]) -> None:
    """Tokenised in one go, 'review' + 's' may be one token: the first token of the answer is then never sampled."""
    tokenizer = load_tokenizer(saved(), chat_template="plain")
    prompt, answer = [{"role": "user", "content": "The fi"}], [{"role": "assistant", "content": "lm"}]
    apart = encode_prompt(tokenizer, prompt) + encode_response(tokenizer, prompt, answer)
    together = tokenizer("The film<|im_end|>", add_special_tokens=False)["input_ids"]
    assert apart != together, "'film' has to be one token of the toy tokenizer"
    assert tokenizer.decode(apart) == tokenizer.decode(together)


def test_turns_before_stay_in_the_prompt(saved: Callable[..., str]) -> None:
    """In a conversation the earlier answers end in stop tokens too; only the last answer is the response."""
    tokenizer = load_tokenizer(saved(), chat_template="chatml")
    talk = [*PROMPT, {"role": "assistant", "content": "A film"}, {"role": "user", "content": "Again"}]
    prompt, answer = encode_prompt(tokenizer, talk), encode_response(tokenizer, talk, ANSWER)
    assert prompt.count(tokenizer.eos_token_id) == 3
    assert tokenizer.decode(answer) == "The film is good<|im_end|>"
    assert last_user_text(talk) == "Again"


def test_answer_that_writes_the_stop_token_itself(saved: Callable[..., str]) -> None:
    """Data that was exported with its end marker: the response must still end in one, not two."""
    tokenizer = load_tokenizer(saved(), chat_template="plain")
    plain, marked, line = (
        encode_response(tokenizer, PROMPT, [{"role": "assistant", "content": text}])
        for text in ("good", "good<|im_end|>", "good<|im_end|>\n")
    )
    assert plain == marked == line
    answer = plain
    assert answer[-1] == tokenizer.eos_token_id and answer.count(tokenizer.eos_token_id) == 1
    assert decode_response(tokenizer, answer) == "good"
    assert decode_response(tokenizer, [*answer, tokenizer.pad_token_id]) == "good"


def test_empty_answer_is_a_stop_token(saved: Callable[..., str]) -> None:
    """An empty tail must not fail, nor take the prompt's own stop token for its own."""
    tokenizer = load_tokenizer(saved(), chat_template="chatml")
    assert encode_response(tokenizer, PROMPT, [{"role": "assistant", "content": ""}]) == [tokenizer.eos_token_id]


# Padding


@pytest.mark.parametrize("side", ["left", "right"])
def test_pad(side: str) -> None:
    """The mask comes from lengths: row 2 holds the pad token as a real token, which `token != pad` would drop."""
    ids, mask = pad([[5, 6, 7], [8], [0, 9]], 0, side=side)
    expected = {
        "left": ([[5, 6, 7], [0, 0, 8], [0, 0, 9]], [[1, 1, 1], [0, 0, 1], [0, 1, 1]]),
        "right": ([[5, 6, 7], [8, 0, 0], [0, 9, 0]], [[1, 1, 1], [1, 0, 0], [1, 1, 0]]),
    }[side]
    assert ids.tolist() == expected[0] and mask.int().tolist() == expected[1]
    assert ids.dtype == torch.long and mask.dtype == torch.bool


# Hashes


def test_hashes_survive_saving_and_use(saved: Callable[..., str], tmp_path: Path) -> None:
    """A hash that depends on how the tokenizer was last called makes every stage refuse its parent."""
    tokenizer = load_tokenizer(saved(), chat_template="chatml")
    before = tokenizer_hashes(tokenizer)
    assert all(len(value) == 64 for value in before.values())
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hashes(tokenizer) == before
    tokenizer.save_pretrained(tmp_path / "again")
    assert tokenizer_hashes(load_tokenizer(str(tmp_path / "again"))) == before


def test_hashes_tell_templates_and_tokens_apart(saved: Callable[..., str]) -> None:
    """Two hashes, each for its own: a changed template must not look like another vocabulary, nor the reverse."""
    chatml = tokenizer_hashes(load_tokenizer(saved(), chat_template="chatml"))
    plain = tokenizer_hashes(load_tokenizer(saved(), chat_template="plain"))
    other = tokenizer_hashes(load_tokenizer(saved(eos_token="<|im_start|>"), chat_template="chatml"))
    assert chatml["tokenizer_hash"] == plain["tokenizer_hash"] != other["tokenizer_hash"]
    assert chatml["chat_template_hash"] == other["chat_template_hash"] != plain["chat_template_hash"]


# Parts beyond role and content

CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"q": "tea"}}}
WRITES_PARTS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content and loop.last %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
    "{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments.q }})"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("at", "name", "value", "writes"),
    [
        (1, "tool_calls", [CALL], True),
        (1, "reasoning_content", "It is hot.", True),  # left out of earlier turns, written in the last
        (3, "reasoning_content", "It is cold.", True),
        (0, "tools", [CALL], True),
        (1, "tool_call_id", "c1", False),  # no template needs it
    ],
)
def test_parts_that_the_template_writes_or_not(
    toy_tokenizer: PreTrainedTokenizerFast, at: int, name: str, value: Any, writes: bool
) -> None:
    """A call or the reasoning is dropped by the template without a word, and the model is trained to stop before it; or a
    template that leaves out old reasoning on purpose is refused."""
    tokenizer = copy.deepcopy(toy_tokenizer)
    turns = [*PROMPT, *ANSWER, *PROMPT, *ANSWER]
    turns[at] = with_parts(turns[at], {name: value})
    tokenizer.chat_template = WRITES_PARTS
    check_texts(tokenizer, turns[:3], [turns[3:]])
    tokenizer.chat_template = TEMPLATES["chatml"]
    if writes:
        with pytest.raises(TemplateRefusal, match=f"^the chat template does not write '{name}'$"):
            check_texts(tokenizer, turns[:3], [turns[3:]])
    else:
        check_texts(tokenizer, turns[:3], [turns[3:]])


def test_a_call_is_part_of_the_answer(toy_tokenizer: PreTrainedTokenizerFast) -> None:
    """The answer ends where the call should come; or the tools are missing in the prompt."""
    tokenizer = copy.deepcopy(toy_tokenizer)
    tokenizer.chat_template = WRITES_PARTS
    prompt, answer = [with_parts(PROMPT[0], {"tools": [CALL]})], [with_parts(ANSWER[0], {"tool_calls": [CALL]})]
    tail = tokenizer.decode(encode_response(tokenizer, prompt, answer)).replace(" ", "")
    assert tail.endswith("goodlook_up(tea)<|im_end|>"), tail
    assert len(encode_prompt(tokenizer, prompt)) > len(encode_prompt(tokenizer, PROMPT))
