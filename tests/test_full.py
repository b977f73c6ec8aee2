"""Full fine-tuning: a model for each role behaves like the adapters it replaces, and all of its weights train."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_models import (
    VOCAB,
    answers,
    float64_norm,
    ppo_config,
    separate_models,
    sequences,
    shared_models,
)
from toys import FAMILIES, Call, build_model
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rlhf.models.adapters import lora_config
from rlhf.models.compute import Compute
from rlhf.models.packing import pack_rows
from rlhf.models.separate import SeparateModels
from rlhf.ppo import forward
from rlhf.registry import Registry


@pytest.fixture(autouse=True)
def _true_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaRMSNorm, "forward", float64_norm)


@pytest.mark.parametrize("family", FAMILIES)
def test_separate_models_answer_like_fresh_adapters(family: str, tmp_path: Path) -> None:
    """Catches: a reward adapter that is not merged, a head left behind, a value that starts elsewhere, copies that share
    the packing of another model."""
    config = ppo_config(finetuning="full")
    full = answers(separate_models(family, tmp_path / "full", config, fresh=True))
    adapters = answers(shared_models(family, tmp_path / "shared", config, fresh=True))
    assert torch.equal(full["policy"], full["reference"])
    for role, figures in adapters.items():
        torch.testing.assert_close(full[role], figures, rtol=0, atol=1e-9, msg=role)


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
    lines = map(json.loads, (tmp_path / "out" / "ppo" / "metrics.jsonl").read_text().splitlines())
    rows = [line for line in lines if "objective/kl" in line]  # the others are held-out evaluations
    assert rows[0]["objective/kl"] == 0 and rows[-1]["objective/kl_full"] > 0
