"""Models that were trained elsewhere, made here with peft and transformers themselves, score in the registry as they did."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from toys import Call
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

from rlhf.config import ComputeConfig, PPOConfig
from rlhf.models.compute import Compute
from rlhf.models.registered import merged_model
from rlhf.models.sequences import Sequences
from rlhf.models.templates import TEMPLATES
from rlhf.registry import Registry
from rlhf.reward.scorer import open_scorer
from rlhf.reward.sources import Responses
from rlhf.stages.ppo import build_models

CPU = Compute(torch.device("cpu"), torch.float32)
CHATS = [
    ("The film", "is very good"),
    ("A movie", "bad"),
    ("It was", "a very dull and awful plot, but funny"),
    ("The", ""),
]
FAMILIES = ("llama", "gpt2")
_COLON = TEMPLATES["chatml"].replace("'\n' + message['content']", "':\n' + message['content']")
#: ChatML with a colon after each role.
OTHER_TEMPLATE = _COLON.replace("assistant\n", "assistant:\n")


def token_rows(folder: Path) -> list[list[int]]:
    """The tokens of each chat up to and including the first stop token: where TRL's PPO reads the score of a response."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    rows = []
    for question, answer in CHATS:
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        text = text[: text.rindex(tokenizer.eos_token)] + tokenizer.eos_token
        rows.append(tokenizer(text, add_special_tokens=False).input_ids)
    return rows


def imported_scores(registry: Path, reference: str) -> list[float]:
    """The scores of the chats by the registered model, all in one batch, encoded by its own tokenizer and template."""
    artifact = Registry(registry).get(reference)
    config = ComputeConfig(registry=str(registry), device="cpu", dtype="float32")
    scorer = open_scorer(artifact, Registry(registry), config, CPU, batch_size=4)
    prompts = [[{"role": "user", "content": question}] for question, _ in CHATS]
    return scorer([scorer.encode(p, answer) for p, (_, answer) in zip(prompts, CHATS, strict=True)]).tolist()


@pytest.fixture
def policy(toy_base: Callable[[str], Path], tmp_path: Path, call: Callable[..., Call]) -> Callable[..., Path]:
    """`policy(family)` puts a toy base with a chat template into a new registry as sft/old; returns the base's folder."""

    def make(family: str = "llama") -> Path:
        folder = tmp_path / family
        model = AutoModelForCausalLM.from_pretrained(toy_base(family))
        model.save_pretrained(folder)
        tokenizer: Any = AutoTokenizer.from_pretrained(toy_base(family))
        tokenizer.chat_template = TEMPLATES["chatml"]
        tokenizer.save_pretrained(folder)
        assert take(call, tmp_path, folder, "sft/old").code == 0
        return folder

    return make


def take(call: Callable[..., Call], tmp_path: Path, folder: Path, target: str, *words: object) -> Call:
    """Run `rlhf registry import` on the registry of the test."""
    return call("rlhf.sharing", "import", folder, "--as", target, "--registry", tmp_path / "registry", *words)


def lora(task: str, targets: str = "all-linear", **options: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type=task, **options)


def shaken(model: Any) -> Any:
    """The model with all of its trainable weights away from where they start: no LoRA matrix is zero."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def value_head(model: Any, rows: list[list[int]], weight: torch.Tensor, bias: float) -> list[float]:
    """Scores as TRL's value head gives them: a linear layer with a bias on the last hidden state of the last token."""
    with torch.no_grad():
        states = [
            model(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states[-1][0, -1] for row in rows
        ]
    return [float(state @ weight[0] + bias) for state in states]


def classifier_scores(model: Any, rows: list[list[int]]) -> list[float]:
    with torch.no_grad():
        return [float(model(input_ids=torch.tensor([row])).logits[0, 0]) for row in rows]


def save_head(folder: Path, weight: torch.Tensor, bias: float, name: str = "value_head.safetensors") -> None:
    save_file({"v_head.summary.weight": weight, "v_head.summary.bias": torch.tensor([bias])}, folder / name)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_classifier_becomes_an_adapter_with_equal_scores(
    family: str, policy: Callable[..., Path], tmp_path: Path, call: Callable[..., Call]
) -> None:
    """Catches: TRL's reward model that loses its head or its scale, and one that is stored whole without need."""
    base = policy(family)
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0)
    adapted = shaken(get_peft_model(classifier, lora("SEQ_CLS", modules_to_save=["score"])))
    expected = classifier_scores(adapted, token_rows(base))
    adapted.save_pretrained(tmp_path / "rm")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "rm")
    done = take(call, tmp_path, tmp_path / "rm", "reward/old", "--policy", "sft/old")
    assert done.code == 0 and "an adapter" in done.out, done.err
    assert imported_scores(tmp_path / "registry", "reward/old") == pytest.approx(expected, abs=1e-5, rel=1e-5)
    assert max(expected) - min(expected) > 0.1, "scores that are all alike prove nothing"
    files = Registry(tmp_path / "registry").get("reward/old").path
    assert (files / "adapter_model.safetensors").stat().st_size < 0.5 * (base / "model.safetensors").stat().st_size


@pytest.mark.parametrize("family", FAMILIES)
def test_value_head_on_lora_becomes_an_adapter_with_equal_scores(
    family: str, policy: Callable[..., Path], tmp_path: Path, call: Callable[..., Call]
) -> None:
    """Catches: LLaMA-Factory's reward model without the bias of its head, or read at another layer or token."""
    base = policy(family)
    targets = r"^model\.layers\..*\.(q_proj|v_proj)$" if family == "llama" else "all-linear"  # ms-swift writes patterns
    adapted = shaken(get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora("CAUSAL_LM", targets)))
    weight, bias = torch.randn(1, 32, generator=torch.Generator().manual_seed(1)), -1.75
    expected = value_head(adapted, token_rows(base), weight, bias)
    adapted.save_pretrained(tmp_path / "rm")
    save_head(tmp_path / "rm", weight, bias)
    done = take(call, tmp_path, tmp_path / "rm", "reward/old", "--policy", "sft/old")
    assert done.code == 0 and "an adapter" in done.out, done.err
    assert imported_scores(tmp_path / "registry", "reward/old") == pytest.approx(expected, abs=1e-5, rel=1e-5)
    manifest = Registry(tmp_path / "registry").get("reward/old").manifest
    assert (manifest.reward_mean, manifest.reward_std) == (1.75, 1.0)


@pytest.mark.parametrize("stored", ["beside", "within"])
def test_value_head_on_a_whole_model(
    stored: str, policy: Callable[..., Path], tmp_path: Path, call: Callable[..., Call]
) -> None:
    """Catches: a head that is looked for in one of its two places only: LLaMA-Factory's file, or TRL's within the weights."""
    base = policy()
    model = shaken(AutoModelForCausalLM.from_pretrained(base))
    weight, bias = torch.randn(1, 32, generator=torch.Generator().manual_seed(1)), 0.5
    expected = value_head(model, token_rows(base), weight, bias)
    model.save_pretrained(tmp_path / "rm")
    if stored == "beside":
        save_head(tmp_path / "rm", weight, bias)
    else:
        state = load_file(tmp_path / "rm" / "model.safetensors")
        head = {"v_head.summary.weight": weight, "v_head.summary.bias": torch.tensor([bias])}
        save_file({**state, **head}, tmp_path / "rm" / "model.safetensors", metadata={"format": "pt"})
    done = take(call, tmp_path, tmp_path / "rm", "reward/old", "--policy", "sft/old")
    assert done.code == 0 and "a whole model" in done.out, done.err
    assert imported_scores(tmp_path / "registry", "reward/old") == pytest.approx(expected, abs=1e-5, rel=1e-5)


def test_temporary_files_may_lie_on_another_disk(
    policy: Callable[..., Path], tmp_path: Path, call: Callable[..., Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: an import that works only where the registry and /tmp are on one file system."""
    scratch, rename, policy_folder = tmp_path / "scratch", os.rename, policy()
    scratch.mkdir()
    AutoModelForSequenceClassification.from_pretrained(policy_folder, num_labels=1, pad_token_id=0).save_pretrained(
        tmp_path / "rm"
    )

    def rename_on_one_disk(source: Any, target: Any, **options: Any) -> None:
        if (scratch in Path(source).parents) != (scratch in Path(target).parents):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(source, target, **options)

    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setattr(os, "rename", rename_on_one_disk)
    done = take(call, tmp_path, tmp_path / "rm", "reward/old", "--policy", "sft/old")
    assert done.code == 0, done.err
    assert (Registry(tmp_path / "registry").get("reward/old").path / "model.safetensors").is_file()
    assert not any(scratch.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_classifier_keeps_its_type_and_template(
    dtype: torch.dtype, policy: Callable[..., Path], tmp_path: Path, call: Callable[..., Call]
) -> None:
    """Catches: weights that grow or are rounded at the import, and texts that are written in the policy's template."""
    base = policy()
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0).to(dtype)
    classifier.save_pretrained(tmp_path / "rm")
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = OTHER_TEMPLATE
    tokenizer.save_pretrained(tmp_path / "rm")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm", dtype=torch.float32).eval()
    expected = classifier_scores(classifier, token_rows(tmp_path / "rm"))
    assert expected != pytest.approx(classifier_scores(classifier, token_rows(base)), abs=1e-3), "the templates differ"
    done = take(call, tmp_path, tmp_path / "rm", "reward/old", "--policy", "sft/old")
    assert done.code == 0 and "a whole model" in done.out, done.err
    assert imported_scores(tmp_path / "registry", "reward/old") == pytest.approx(expected, abs=1e-5, rel=1e-5)
    stored = load_file(Registry(tmp_path / "registry").get("reward/old").path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}


@pytest.mark.parametrize("finetuning", ["lora", "full"])
def test_ppo_gives_texts_to_a_model_of_another_template(
    finetuning: str, policy: Callable[..., Path], tmp_path: Path, call: Callable[..., Call]
) -> None:
    """Catches: token ids in the policy's template that are given to a reward model which was trained with another."""
    base = policy()
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0).save_pretrained(
        tmp_path / "rm"
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = OTHER_TEMPLATE
    tokenizer.save_pretrained(tmp_path / "rm")
    assert take(call, tmp_path, tmp_path / "rm", "reward/old", "--policy", "sft/old").code == 0
    registry = Registry(tmp_path / "registry")
    options = {
        "name": "x",
        "registry": str(registry.root),
        "policy": "sft/old",
        "reward": ["reward/old"],
        "dataset": "d",
    }
    config = PPOConfig(**options, finetuning=finetuning, device="cpu", dtype="float32")  # type: ignore[arg-type]
    _, reward = build_models(config, CPU, registry.get("sft/old"), [registry.get("reward/old")])
    ones, mask = torch.ones(4, 2, dtype=torch.long), torch.ones(4, 2, dtype=torch.bool)
    responses = Responses(
        sequences=Sequences(prompts=ones, prompt_mask=mask, responses=ones, mask=mask),
        batches=[torch.arange(4)],
        texts=[answer for _, answer in CHATS],
        rows=[{"prompt": [{"role": "user", "content": question}]} for question, _ in CHATS],
    )
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    expected = classifier_scores(model, token_rows(tmp_path / "rm"))
    assert reward(responses)[0].tolist() == pytest.approx(expected, abs=1e-5, rel=1e-5)


def test_adapter_on_other_weights_than_the_policy_is_merged(
    policy: Callable[..., Path], tmp_path: Path, call: Callable[..., Call]
) -> None:
    """Catches: an adapter that is put on a policy whose weights are not those it was trained on."""
    base = policy()
    other = tmp_path / "other"
    shaken(AutoModelForCausalLM.from_pretrained(base)).save_pretrained(other)
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_pretrained(other, num_labels=1, pad_token_id=0)
    adapted = shaken(get_peft_model(classifier, lora("SEQ_CLS", modules_to_save=["score"])))
    expected = classifier_scores(adapted, token_rows(base))
    adapted.save_pretrained(tmp_path / "rm")
    done = take(call, tmp_path, tmp_path / "rm", "reward/old", "--policy", "sft/old")
    assert done.code == 0 and "a whole model" in done.out, done.err
    assert imported_scores(tmp_path / "registry", "reward/old") == pytest.approx(expected, abs=1e-5, rel=1e-5)


def test_policy_with_an_adapter_is_that_policy(
    policy: Callable[..., Path], tmp_path: Path, call: Callable[..., Call]
) -> None:
    """Catches: an SFT adapter that is lost at the import, or whose base is taken from another place."""
    base = policy()
    adapted = shaken(get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora("CAUSAL_LM")))
    adapted.save_pretrained(tmp_path / "sft")
    assert take(call, tmp_path, tmp_path / "sft", "sft/lora").code == 0
    registry, ids = Registry(tmp_path / "registry"), torch.tensor(token_rows(base)[2:3])
    for reference, expected in (("sft/lora", adapted), ("sft/old", AutoModelForCausalLM.from_pretrained(base))):
        with torch.no_grad():
            logits = merged_model(registry, registry.get(reference))(input_ids=ids).logits
            torch.testing.assert_close(logits, expected.eval()(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


def refusals(tmp_path: Path, base: Path) -> dict[str, tuple[Path, str, tuple[object, ...], str]]:
    """(folder, target, further words, message) by name."""
    policy = ("--policy", "sft/old")
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0)
    headless, two, bert, pickled = (tmp_path / name for name in ("headless", "two", "bert", "pickled"))
    get_peft_model(classifier, lora("SEQ_CLS", modules_to_save=["score"])).save_pretrained(headless)
    state = load_file(headless / "adapter_model.safetensors")
    save_file({k: v for k, v in state.items() if ".score." not in k}, headless / "adapter_model.safetensors")
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, pad_token_id=0).save_pretrained(two)
    pair = AutoModelForSequenceClassification.from_pretrained(two)
    get_peft_model(pair, lora("SEQ_CLS")).save_pretrained(tmp_path / "pair")
    get_peft_model(classifier, lora("SEQ_CLS")).save_pretrained(tmp_path / "fine")
    thin = AutoConfig.from_pretrained(base)
    thin.intermediate_size = 8
    AutoModelForCausalLM.from_config(thin).save_pretrained(tmp_path / "thin")
    small = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
        "vocab_size": 500,
    }
    BertForSequenceClassification(BertConfig(**small, num_labels=1)).save_pretrained(bert)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora("CAUSAL_LM")).save_pretrained(pickled)
    torch.save({"v_head.summary.weight": torch.zeros(1, 32)}, pickled / "value_head.bin")
    empty, torn, wide = (tmp_path / name for name in ("empty", "torn", "wide"))
    empty.mkdir()
    for folder, weight in ((torn, torch.zeros(1, 32)), (wide, torch.zeros(1, 33))):
        AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder)
        save_head(folder, weight, 0.0)
    (torn / "value_head.safetensors").write_bytes((torn / "value_head.safetensors").read_bytes()[:40])
    return {
        "an empty folder": (empty, "reward/a", policy, "holds no model"),
        "a torn file": (torn, "reward/a", policy, "holds weights that cannot be read"),
        "another width": (wide, "reward/a", policy, "the value head in"),
        "no head": (headless, "reward/a", policy, "its scores would be random"),
        "two outputs": (two, "reward/a", policy, "has 2 outputs; a reward model has one"),
        "two outputs of an adapter": (
            tmp_path / "pair",
            "reward/a",
            policy,
            "pair has 2 outputs; a reward model has one",
        ),
        "another base": (tmp_path / "fine", "reward/a", (*policy, "--base", tmp_path / "thin"), "fine does not fit on"),
        "no decoder": (bert, "reward/a", policy, "give the folder to PPO as it is: --reward"),
        "a pickle": (pickled, "reward/a", policy, "is a pickle, which can run code"),
        "no reward model": (base, "reward/a", policy, "holds no reward model"),
        "no policy": (two, "reward/a", (), "a reward model needs --policy sft/NAME"),
        "a policy of a policy": (base, "sft/a", policy, "an SFT policy has no parent"),
        "another stage": (base, "ppo/a", (), "only sft/NAME and reward/NAME can be imported"),
        "a version": (base, "sft/a@2", (), "versions are counted by the registry"),
        "no folder": (tmp_path / "none", "sft/a", (), "no folder"),
    }


def test_what_cannot_be_imported_is_named(
    policy: Callable[..., Path], tmp_path: Path, call: Callable[..., Call]
) -> None:
    """Catches: a random head that is registered, and tracebacks of libraries for folders of another kind."""
    base = policy()
    for name, (folder, target, words, message) in refusals(tmp_path, base).items():
        assert message in take(call, tmp_path, folder, target, *words).complaint, name
    adapter = tmp_path / "headless" / "adapter_config.json"
    adapter.write_text(json.dumps({**json.loads(adapter.read_text()), "base_model_name_or_path": "/gone/away"}))
    assert "give its folder: --base FOLDER" in take(call, tmp_path, adapter.parent, "sft/a").complaint
    assert [str(r) for r in Registry(tmp_path / "registry").references()] == ["sft/old@1"]


def test_plain_peft_opens_the_imported_adapter(
    policy: Callable[..., Path], tmp_path: Path, call: Callable[..., Call]
) -> None:
    """Catches: a value head that is stored in a form of our own, which `rlhf registry export` and peft cannot open."""
    base = policy()
    adapted = shaken(get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora("CAUSAL_LM")))
    weight = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    expected = value_head(adapted, token_rows(base), weight, 0.0)
    adapted.save_pretrained(tmp_path / "rm")
    save_head(tmp_path / "rm", weight, 0.0)
    assert take(call, tmp_path, tmp_path / "rm", "reward/old", "--policy", "sft/old").code == 0
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0)
    opened = PeftModel.from_pretrained(plain, Registry(tmp_path / "registry").get("reward/old").path).eval()
    assert classifier_scores(opened, token_rows(base)) == pytest.approx(expected, abs=1e-5, rel=1e-5)
