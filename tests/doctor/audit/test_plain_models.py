"""The audit's own way to open models and write texts: it agrees with the package's, with which it shares no code."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from toys import FAMILIES, build_model
from transformers import PreTrainedTokenizerFast

from rlhf.config import ComputeConfig, SFTConfig, build
from rlhf.doctor.audit import plain_models, plain_text
from rlhf.doctor.audit.plain_models import load_base, load_causal, load_reward, token_logprobs
from rlhf.doctor.audit.plain_text import decode_answer, labels_of, render_pair, render_prompt
from rlhf.models.adapters import save_adapter, with_adapter
from rlhf.models.base import load_base as packages_load
from rlhf.models.compute import Compute
from rlhf.models.messages import with_parts
from rlhf.models.registered import causal_model
from rlhf.models.templates import TEMPLATES
from rlhf.models.tokenization import decode_response, encode_prompt, encode_response, load_tokenizer
from rlhf.registry import Registry
from rlhf.reward.scorer import open_scorer

ROWS = [[5, 6, 7, 8, 9], [20, 21, 22], [30, 31, 33, 34, 35, 36, 37]]
CPU = torch.device("cpu")


def compute(dtype: torch.dtype) -> tuple[ComputeConfig, Compute]:
    """Options and device of the package's own loading, on a CPU."""
    return ComputeConfig(device="cpu", attn_implementation="sdpa"), Compute(CPU, dtype)


@torch.no_grad()
def logprobs(model: Any) -> torch.Tensor:
    """Log-probabilities of all tokens of `ROWS` but the first of each, one row at a time, without the package."""
    parts = []
    for row in ROWS:
        logits = model(input_ids=torch.tensor([row])).logits[0, :-1].float()
        parts.append(logits.log_softmax(dim=-1).gather(1, torch.tensor(row[1:])[:, None]).squeeze(1))
    return torch.cat(parts)


def test_nothing_of_the_stages_is_shared() -> None:
    """Catches: an audit that recomputes with the code that it audits, and so agrees with its faults."""
    for module in (plain_models, plain_text):
        tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
        own = [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert [name for name in own if name.startswith("rlhf.") and not name.startswith("rlhf.base.")] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reference", ["sft/toy", "ppo/toy"])
def test_policies_are_those_of_the_registry(finished: tuple[Path, Path], reference: str, dtype: torch.dtype) -> None:
    """Catches: an adapter that is lost, merged twice, or put on a base without its parent's."""
    registry = Registry(finished[0])
    artifact = registry.get(reference)
    plain = load_causal(artifact.path, registry.root, dtype)
    expected = causal_model(registry, artifact, *compute(dtype))
    for name, parameter in expected.named_parameters():
        assert torch.equal(plain.get_parameter(name), parameter)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(token_logprobs(plain, ROWS)), logprobs(plain), rtol=0, atol=0.05)
    base = load_base(artifact.manifest.base_model, registry.root, dtype)
    assert not torch.allclose(logprobs(base), logprobs(plain), atol=0.05)


def test_a_policy_of_all_weights_is_itself(tmp_path: Path) -> None:
    """Catches: a whole model that is opened as an adapter on its base, with the weights of before the training."""
    folder = tmp_path / "ppo" / "toy" / "v1"
    model = build_model("llama", 60)
    model.save_pretrained(folder)
    (folder / "manifest.json").write_text(json.dumps({"kind": "full", "stage": "ppo", "base_model": "gone"}))
    torch.testing.assert_close(logprobs(load_causal(folder, tmp_path, torch.float32)), logprobs(model))


def test_scores_are_those_of_the_registry(finished: tuple[Path, Path], tmp_path: Path) -> None:
    """Catches: a head on another model, a score read elsewhere than at the last token, a lost mean or spread."""
    registry = Registry(finished[0])
    artifact = registry.get("reward/toy")
    plain = load_reward(artifact.path, registry.root, torch.float32)
    expected = open_scorer(artifact, registry, *compute(torch.float32), 4)
    torch.testing.assert_close(plain(ROWS), expected(ROWS), rtol=1e-4, atol=1e-4)
    assert plain.mean == artifact.manifest.reward_mean and plain.std == artifact.manifest.reward_std
    by_token = plain.by_token(ROWS)
    for row, scores in zip(ROWS, by_token, strict=True):
        torch.testing.assert_close(scores, torch.cat([plain.raw([row[: n + 1]]) for n in range(len(row))]))
    other = shutil.copytree(finished[0], tmp_path / "registry")
    file = other / "sft" / "toy" / "v1" / "adapter_model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file)
    moved = load_reward(other / "reward" / "toy" / "v1", other, torch.float32)(ROWS)
    assert not torch.allclose(moved, plain(ROWS), atol=1e-3)


def test_a_reward_model_of_all_weights(tmp_path: Path) -> None:
    """Catches: a head that is drawn anew, or a backbone without its weights: both load without an error."""
    from transformers import AutoModelForSequenceClassification, LlamaConfig

    folder, registry = tmp_path / "reward" / "toy" / "v1", tmp_path
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings: dict[str, Any] = {"vocab_size": 60, "num_labels": 1, "pad_token_id": 0, "initializer_range": 0.2, **sizes}
    config = LlamaConfig(**settings)
    model: Any = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(folder)
    manifest = {"kind": "full", "stage": "reward", "reward_mean": 0.5, "reward_std": 2.0}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with torch.no_grad():
        expected = torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in ROWS])
    plain = load_reward(folder, registry, torch.float32)
    torch.testing.assert_close(plain(ROWS), (expected - 0.5) / 2)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_all_kinds(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Catches: a scale without its square root, lengths of columns left out, transposed layers of GPT-2."""
    base = build_model(family, 60)
    config = LoraConfig(r=3, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    model = with_adapter(build_model(family, 60), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, mean=float("magnitude" in name), std=0.3)
    save_adapter(model, tmp_path, adapter="default", base_model="toy")
    saved: Any = LoraConfig.from_pretrained(str(tmp_path))
    tensors = load_file(tmp_path / plain_models.ADAPTER)
    state = torch.get_rng_state()
    plain = plain_models.adapted(base, saved, tensors)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(logprobs(plain), logprobs(model), rtol=1e-4, atol=1e-4)
    del tensors[next(name for name in tensors if "lora_B" in name)]
    with pytest.raises(ValueError, match="one side only"):
        plain_models.adapted(build_model(family, 60), saved, tensors)


def test_new_tokens_have_their_rows(tmp_path: Path) -> None:
    """Catches: embeddings that are too short for the tokens of an adapter, or rows of the mean in place of the trained ones."""
    base = tmp_path / "base"
    build_model("llama", 60).save_pretrained(base)
    grown = build_model("llama", 60)
    grown.resize_token_embeddings(62, mean_resizing=False)
    rows = {"model.embed_tokens": [60, 61], "lm_head": [60, 61]}
    model: Any = get_peft_model(grown, LoraConfig(r=2, target_modules="all-linear", trainable_token_indices=rows))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path / "sft" / "toy" / "v1"
    folder.mkdir(parents=True)
    save_adapter(model, folder, adapter="default", base_model=str(base))
    manifest: dict[str, Any] = {
        "kind": "adapter",
        "stage": "sft",
        "base_model": str(base),
        "base_model_revision": None,
        "parents": [],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    plain = load_causal(folder, tmp_path, torch.float32)
    with torch.no_grad():
        ids = torch.tensor([[60, 5, 61]])
        torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantization, product, rounding", [("4bit", 1e-4, (0.05, 0.4)), ("8bit", 0.1, (0.002, 0.02))])
def test_quantised_bases_are_expanded(
    quantization: str, product: float, rounding: tuple[float, float], tmp_path: Path
) -> None:
    """Catches: weights that are not rounded at all, or in another way. Products with 8 bits round their inputs, too."""
    model = build_model("llama", 64)
    model.save_pretrained(tmp_path)
    settings = {"name": "toy", "dataset": "none", "model_name_or_path": str(tmp_path), "quantization": quantization}
    expected = packages_load(str(tmp_path), build(SFTConfig, settings, "test"), Compute(CPU, torch.float32))
    plain = load_base(str(tmp_path), tmp_path, torch.float32, quantization=quantization)
    assert (logprobs(plain) - logprobs(expected)).abs().max() < product
    name = "model.layers.0.mlp.up_proj.weight"
    weight, original = plain.get_parameter(name), model.get_parameter(name)
    assert weight.dtype == torch.float32
    assert rounding[0] < (weight - original).norm() / original.norm() < rounding[1]


# Texts

USER, ANSWER = [{"role": "user", "content": "The film "}], [{"role": "assistant", "content": "was very good"}]
TURNS = [{"role": "system", "content": "be short"}, *USER, *ANSWER, {"role": "user", "content": "And the plot?"}]


@pytest.mark.parametrize("template", sorted(TEMPLATES))
@pytest.mark.parametrize("prompt", [USER, TURNS])
@pytest.mark.parametrize("content", ["was very good", "was good<|im_end|>", " ", "it is <|im_start|> odd\n"])
def test_texts_are_written_as_by_the_package(
    toy_base: Callable[[str], Path], template: str, prompt: list[dict[str, str]], content: str
) -> None:
    """Catches: another border between prompt and answer, two stop tokens or none, the line break after the stop token."""
    tokenizer = load_tokenizer(str(toy_base("llama")), chat_template=template)
    answer = [{"role": "assistant", "content": content}]
    head, tail = render_pair(tokenizer, prompt, answer)
    assert head == render_prompt(tokenizer, prompt) == encode_prompt(tokenizer, prompt)
    assert tail == encode_response(tokenizer, prompt, answer) and tail.count(int(tokenizer.eos_token_id)) == 1
    assert decode_answer(tokenizer, tail) == decode_response(tokenizer, tail)
    assert labels_of(head, tail) == [-100] * len(head) + tail


def test_further_parts_of_messages_are_written(toy_tokenizer: PreTrainedTokenizerFast) -> None:
    """Catches: tools and reasoning that the plain way leaves out, and then calls wrong in a run that has them."""
    tokenizer = type(toy_tokenizer)(tokenizer_object=toy_tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    tokenizer.chat_template = (
        "{% if tools %}tools {{ tools[0]['name'] }} {% endif %}{% for m in messages %}{{ m['role'] }} "
        "{{ m['reasoning_content'] or '' }} {{ m['content'] }}{% if m['role'] == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    )
    prompt = [with_parts(USER[0], {"tools": [{"name": "film"}]})]
    answer = [with_parts(ANSWER[0], {"reasoning_content": "the plot is dull"})]
    head, tail = render_pair(tokenizer, prompt, answer)
    assert head == encode_prompt(tokenizer, prompt) and tail == encode_response(tokenizer, prompt, answer)
    assert "tools film" in tokenizer.decode(head) and "dull" in tokenizer.decode(tail)


def test_a_template_that_rewrites_the_prompt_is_refused(toy_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = type(toy_tokenizer)(tokenizer_object=toy_tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="in another way"):
        render_pair(tokenizer, USER, ANSWER)
