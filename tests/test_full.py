"""Full fine-tuning: a model for each role behaves like the adapters it replaces, and all of its weights train."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ppo.conftest import PROMPTS, STOPS
from test_models import (
    REWARD_MEAN,
    REWARD_STD,
    VOCAB,
    answers,
    float64_norm,
    ppo_config,
    reward_model,
    sequences,
    shared_models,
)
from toys import FAMILIES, Call, build_model
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rlhf.config import PPOConfig
from rlhf.full import SeparateModels
from rlhf.models import Compute, lora_config
from rlhf.packing import pack_rows
from rlhf.ppo import forward
from rlhf.ppo.trainer import PPOTrainer
from rlhf.registry import Registry
from rlhf.tokenization import load_tokenizer
from rlhf.tracking import PhaseTimer, Tracker


@pytest.fixture(autouse=True)
def _true_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaRMSNorm, "forward", float64_norm)


def separate_models(family: str, folder: Path, config: PPOConfig) -> SeparateModels:
    reward_model(family, folder, config)
    base = build_model(family, VOCAB, dtype=torch.float64)
    assert pack_rows(base)
    compute = Compute(torch.device("cpu"), torch.float64)
    models = SeparateModels(base, compute, shared_trunk=config.value_model == "shared_trunk")
    models.load_reward(folder, REWARD_MEAN, REWARD_STD)
    return models


@pytest.mark.parametrize("family", FAMILIES)
def test_separate_models_answer_like_fresh_adapters(family: str, tmp_path: Path) -> None:
    """Catches: a reward adapter that is not merged, a head left behind, a value that starts elsewhere, copies that share
    the packing of another model."""
    config = ppo_config(finetuning="full")
    full = answers(separate_models(family, tmp_path / "full", config))  # type: ignore[arg-type]
    adapters = answers(shared_models(family, tmp_path / "shared", config, fresh=True))
    assert torch.equal(full["policy"], full["reference"])
    for role, figures in adapters.items():
        torch.testing.assert_close(full[role], figures, rtol=0, atol=1e-9, msg=role)


@pytest.mark.parametrize("value_model", ["adapter", "shared_trunk"])
def test_update_moves_all_weights_of_policy_and_value_and_no_other(
    value_model: str, tmp_path: Path, toy_base: Callable[[str], Path]
) -> None:
    """Catches: weights shared between copies, a frozen layer, a reference or reward model that trains along, and a resumed
    run that starts from other weights."""
    config = ppo_config(finetuning="full", value_model=value_model, learning_rate=1e-3, total_episodes=16)
    models = separate_models("llama", tmp_path / "reward", config)
    tokenizer = load_tokenizer(str(toy_base("llama")), chat_template="chatml")
    before = {name: tensor.clone() for name, tensor in models.state_dict().items()}
    with Tracker(tmp_path, stage="ppo", name="toy", group="toy", config={}, wandb_mode="disabled") as tracker:
        trainer = PPOTrainer(models, PROMPTS, tokenizer, config, tracker, tmp_path / "checkpoints", PhaseTimer())
        trainer.sampling.stop_token_ids[:] = STOPS
        metrics = trainer.step()
        assert metrics["objective/kl"] == metrics["objective/kl_full"] == 0
        assert metrics["ppo/first_ratio_error"] == 0
        trainer.save()
        after = {name: tensor.clone() for name, tensor in models.state_dict().items()}
        again = separate_models("llama", tmp_path / "reward", config)
        resumed = PPOTrainer(again, PROMPTS, tokenizer, config, tracker, tmp_path / "checkpoints", PhaseTimer())
        assert resumed.resume() == 1
    trained = {*models.trainable("policy"), *models.trainable("value")}
    roles = {name.split(".")[1] for name in before if name.startswith("models.")}
    assert roles == {"policy", "reference", "reward"} | ({"value"} if value_model == "adapter" else set())
    for name, tensor in after.items():
        bare = name.removeprefix("models.")
        is_output = "value.lm_head" in name  # the value model's own output embedding is never read
        assert torch.equal(tensor, before[name]) == (bare not in trained or is_output), name
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_a_fresh_value_model_says_zero() -> None:
    """Catches: a value model that starts with a reward where there is none."""
    base = build_model("gpt2", VOCAB, dtype=torch.float64)
    assert pack_rows(base)
    models = SeparateModels(base, Compute(torch.device("cpu"), torch.float64))
    models.fresh_value(lora_config(ppo_config(), "CAUSAL_LM"))
    assert float(forward.token_values(models, sequences()).abs().max()) == 0.0
    assert len(models.trainable("value")) > len(models.trainable("policy"))


def test_full_fine_tuning_through_the_command_line(
    finished: tuple[Path, Path], toy_config: Path, tmp_path: Path, call: Callable[..., Call]
) -> None:
    """Catches: an artefact that only this package can open, weights saved from another role or not at all."""
    registry = tmp_path / "registry"
    shutil.copytree(finished[0], registry)
    words = ["--config", toy_config / "ppo.yaml", "--registry", registry, "--output_dir", tmp_path / "out"]
    done = call("rlhf.stages.ppo", *words, "--finetuning", "full", "--name", "full", "--learning_rate", 1e-3)
    assert done.code == 0, done.err[-3000:]
    artifact = Registry(registry).get("ppo/full")
    assert artifact.manifest.kind == "full"
    plain = AutoModelForCausalLM.from_pretrained(artifact.path)
    sft = AutoModelForCausalLM.from_pretrained(artifact.manifest.base_model)
    moved = [n for n, p in plain.named_parameters() if not torch.equal(p.float(), sft.get_parameter(n).float())]
    assert len(moved) > 0.9 * len(list(plain.parameters()))
    rows = [json.loads(line) for line in (tmp_path / "out" / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["objective/kl"] == 0 and rows[-1]["objective/kl_full"] > 0
