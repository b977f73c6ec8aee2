"""What a reward model is compared with, and a toy model that learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from toys import BENT, FAMILIES, Call, build_bent, build_model

from rlhf.base.errors import UserError
from rlhf.base.functions import load_function
from rlhf.evaluation.gold import vader
from rlhf.models.base import context_length
from rlhf.models.compute import Compute
from rlhf.models.likelihood import mean_logprobs
from rlhf.models.packing import pack_rows
from rlhf.models.responses import answer_prompts, answerable, sample_batch, single_answers
from rlhf.models.tokenization import encode_prompt, load_tokenizer
from rlhf.registry import Registry


@pytest.mark.parametrize("family", [*FAMILIES, *BENT])
def test_mean_logprobs_are_those_of_single_rows(family: str) -> None:
    """Read one token too late, over the prompt too, divided by the padded length, or summed: the baseline would rank by
    length or by the prompt. The bare head's product is no logit of some families. The oracle takes one row at a time through
    the whole model."""
    model = build_bent(family, 60) if family in BENT else build_model(family, 60, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    prompts = [[5, 6, 7, 8], [5, 6, 7, 8], [9, 10], [9, 10], [9, 10]]
    responses = [torch.randint(3, 60, (n,), generator=generator).tolist() for n in (3, 9, 1, 5, 2)]
    expected = []
    for prompt, response in zip(prompts, responses, strict=True):
        logprobs = model(torch.tensor([prompt + response])).logits[0].detach().log_softmax(dim=-1)
        picked = [float(logprobs[len(prompt) - 1 + t, token]) for t, token in enumerate(response)]
        expected.append(sum(picked) / len(picked))
    rows = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    lengths, prompt_of = [len(prompt) for prompt in prompts], torch.tensor([0, 0, 1, 1, 1])
    for packed in (False, True):
        assert not packed or pack_rows(model) or family == "gemma2"  # a soft cap in its attention
        compute = Compute(torch.device("cpu"), model.dtype)
        got = mean_logprobs(model, rows, lengths, prompt_of, pad_token_id=0, compute=compute, batch_size=3)
        assert got.tolist() == pytest.approx(expected, abs=1e-4)


def test_answers_belong_to_their_prompts(toy_base: Callable[[str], Path]) -> None:
    """Prompts and answers that get out of step past the first batch of samples, padding kept, or no seed."""
    tokenizer = load_tokenizer(str(toy_base("llama")), chat_template="chatml")
    model = build_model("llama", len(tokenizer))
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": "good " * (i % 5 + 1)}]) for i in range(70)]
    first, again, other = (
        answer_prompts(model, tokenizer, prompts, response_length=6, seed=seed) for seed in (0, 0, 1)
    )
    assert all(1 <= len(tokens) <= 6 for tokens in first.tokens)
    assert first == again != other
    in_parts, parts = torch.Generator().manual_seed(0), []
    for part in (prompts[:64], prompts[64:]):
        parts += single_answers(tokenizer, sample_batch(model, tokenizer, part, max_new_tokens=6, temperature=1.0, generator=in_parts))  # noqa: E501  # fmt: skip
    assert first.rows == parts


def test_prompts_without_room_for_an_answer(
    toy_base: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """An answer that runs out of the context: an IndexError where positions are a table, after the whole training. The
    longest prompt that is kept fills a model of absolute positions to the last one."""
    tokenizer = load_tokenizer(str(toy_base("llama")), chat_template="chatml")
    prompts = [[{"role": "user", "content": "good " * n}] for n in (1, 5, 40, 200, 300)]
    model = build_model("gpt2", len(tokenizer))
    context = context_length(model)
    room = context - len(encode_prompt(tokenizer, prompts[2]))
    kept = answerable(prompts, tokenizer, context, room)
    assert kept == prompts[:3] and "2 of 5 prompts leave no room" in capsys.readouterr().out
    encoded = [encode_prompt(tokenizer, prompt) for prompt in kept]
    assert len(answer_prompts(model, tokenizer, encoded, response_length=room, seed=0).texts) == 3
    assert answerable(prompts, tokenizer, context, room + 1) == prompts[:2]
    with pytest.raises(UserError, match=f"response_length={context} .*lower response_length"):
        answerable(prompts, tokenizer, context, context)


def test_load_function() -> None:
    """`package.module:function`, as entry points are written."""
    assert load_function("rlhf.evaluation.gold:vader") is vader
    assert load_function("math:sqrt")(9) == 3


@pytest.mark.parametrize("path", ["no_such_module:f", "math:no_such_function", "math", "math:", ":sqrt", "", "math.sqrt", "math:pi"])  # noqa: E501  # fmt: skip
def test_load_function_errors(path: str) -> None:
    """A misspelt scorer as a traceback, or one that is no function and fails after the training."""
    with pytest.raises(UserError, match=r"package\.module:function"):
        load_function(path)


def test_toy_reward_model_learns(
    call: Callable[..., Call], finished: tuple[Path, Path], toy_config: Path, tmp_path: Path
) -> None:
    """The whole stage with one sign wrong, a head that gets no gradient, or a base that is not the SFT policy learns nothing:
    'good' and 'great' beat 'bad' and 'awful' on held-out prompts in nine pairs of ten, or something is broken."""
    import shutil

    shutil.copytree(finished[0] / "sft", tmp_path / "registry" / "sft")
    places = ["--registry", tmp_path / "registry", "--output_dir", tmp_path / "out", "--wandb_mode", "disabled"]
    length = ["--max_steps", "60", "--eval_steps", "60", "--save_steps", "60", "--lora_r", "8"]
    done = call("rlhf.stages.reward", "--config", toy_config / "reward.yaml", *places, *length)
    assert done.code == 0, done.err[-3000:]
    metrics = Registry(tmp_path / "registry").get("reward/toy").manifest.metrics
    assert metrics["pairs"] >= 20
    assert metrics["accuracy"] > 0.9 and metrics["accuracy_held_out_raters"] > 0.9
    assert metrics["human_ceiling"] == 1.0
