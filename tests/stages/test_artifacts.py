"""What the three stages leave behind, on one finished toy pipeline, opened the way a stranger would open it."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.config import PPOConfig, RewardConfig, SFTConfig
from rlhf.data_prep.load import load_rows
from rlhf.models.adapters import ADAPTER_FILE, lora_config
from rlhf.models.base import load_policy
from rlhf.models.compute import Compute
from rlhf.models.reward_model import sequence_classifier
from rlhf.models.roles import SharedModels
from rlhf.models.tokenization import encode_prompt, encode_response, load_tokenizer
from rlhf.registry import Artifact, Registry
from rlhf.reward.scorer import score_tokens
from rlhf.run.metrics import of_stage
from rlhf.stages import sft
from rlhf.stages.normalization import normalizing_data, normalizing_rows

STAGES = ("sft", "reward", "ppo")
FP32 = SFTConfig(name="n", dataset="x", model_name_or_path="x", device="cpu", dtype="float32")
COMPUTE = Compute(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def artifacts(finished: tuple[Path, Path]) -> dict[str, Artifact]:
    return {stage: Registry(finished[0]).get(f"{stage}/toy") for stage in STAGES}


@pytest.fixture(scope="module")
def merged(artifacts: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SFT policy as a plain full model on disk, made with transformers and peft alone."""
    folder = tmp_path_factory.mktemp("merged")
    artifact = artifacts["sft"]
    base = AutoModelForCausalLM.from_pretrained(artifact.manifest.base_model, dtype=torch.float32)
    PeftModel.from_pretrained(base, str(artifact.path)).merge_and_unload().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(artifacts: dict[str, Artifact], toy_data: Path) -> list[list[int]]:
    """Token rows (prompt and answer) of the demonstrations."""
    tokenizer = load_tokenizer(str(artifacts["sft"].path))
    loaded = load_rows(toy_data, "train", kind="demonstrations").rows
    return [
        encode_prompt(tokenizer, r["prompt"]) + encode_response(tokenizer, r["prompt"], r["completion"]) for r in loaded
    ]


# Manifests


@pytest.mark.parametrize("stage", STAGES)
def test_manifest_holds_what_the_house_promises(
    artifacts: dict[str, Artifact], finished: tuple[Path, Path], toy_config: Path, stage: str
) -> None:
    """A field that is there but empty: no revision of the code, no fingerprint of the data, options that were not resolved."""
    manifest = artifacts[stage].manifest
    parents = {"sft": [], "reward": ["sft"], "ppo": ["sft", "reward"]}[stage]
    assert [(p.stage, p.name, p.version, p.hash) for p in manifest.parents] == [
        (p, "toy", 1, artifacts[p].hash) for p in parents
    ]
    assert (manifest.stage, manifest.name, manifest.version, manifest.kind) == (stage, "toy", 1, "adapter")
    asked = yaml.safe_load((toy_config / f"{stage}.yaml").read_text())
    assert manifest.base_model == yaml.safe_load((toy_config / "sft.yaml").read_text())["model_name_or_path"]
    resolved = {k: v for k, v in asked.items() if k not in ("learning_rate", "policy", "reward")}
    named = {"sft": "policy", "reward": "reward"}
    for parent in parents:
        assert manifest.config[named[parent]] in (artifacts[parent].reference, [artifacts[parent].reference])
    assert all(manifest.config[k] == v for k, v in resolved.items()) and manifest.config["learning_rate"] == 0.01
    assert manifest.config["seed"] == 0, "defaults belong to the resolved config"
    assert len(manifest.recipe) == 64 and manifest.code_commit
    assert len(manifest.data["fingerprint"]) == 64
    assert set(manifest.data["rows"]) == {"train", "validation"} and min(manifest.data["rows"].values()) > 0
    assert manifest.pad_token_id not in manifest.stop_token_ids and len(manifest.stop_token_ids) == 1
    assert {"torch", "transformers", "trl", "peft"} <= manifest.library_versions.keys()
    assert manifest.metrics["seconds"] > 0 and manifest.metrics["phases"]
    on_disk = {p.name for p in artifacts[stage].path.iterdir()} - {"manifest.json"}
    assert on_disk == manifest.files.keys()
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= on_disk
    run = json.loads((finished[1] / stage / "tracking.json").read_text())
    assert manifest.wandb_run_id == run["run_id"]


def test_stages_share_tokenizer_template_and_pad(artifacts: dict[str, Artifact]) -> None:
    """A stage that saves another tokenizer than it was given: its hashes would differ from its parent's."""
    first = artifacts["sft"].manifest
    for artifact in artifacts.values():
        m = artifact.manifest
        assert (m.tokenizer_hash, m.chat_template_hash, m.pad_token_id, m.stop_token_ids) == (
            first.tokenizer_hash,
            first.chat_template_hash,
            first.pad_token_id,
            first.stop_token_ids,
        )
        saved = AutoTokenizer.from_pretrained(artifact.path)
        assert saved.pad_token_id == m.pad_token_id and [saved.eos_token_id] == m.stop_token_ids
        assert "<|im_start|>" in saved.chat_template


def test_only_the_reward_model_is_normalised(artifacts: dict[str, Artifact]) -> None:
    """PPO reads mean and std from the reward manifest; None there is taken for 0 and 1."""
    assert [a.manifest.reward_mean is None for a in artifacts.values()] == [True, False, True]
    assert [a.manifest.reward_std is None for a in artifacts.values()] == [True, False, True]


def test_registry_verifies(
    finished: tuple[Path, Path], command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """A stage that touches its artefact, or its parent's, after it was registered."""
    done = command("rlhf.registry", "verify", "--registry", finished[0])
    assert done.returncode == 0, done.stderr
    assert [line.split() for line in done.stdout.splitlines()] == [["ok", f"{s}/toy@1"] for s in STAGES]


# Weights


STRANGER = """
import json, sys
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, text, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(adapter)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
chat = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
ids = tokenizer(chat, add_special_tokens=False, return_tensors="pt").input_ids
with torch.no_grad():
    logits = model(ids).logits[0]
assert not any(name.split(".")[0] == "rlhf" for name in sys.modules)
json.dump({"ids": ids[0].tolist(), "logits": logits.tolist()}, open(out, "w"))
"""


def test_sft_adapter_opens_without_this_package(artifacts: dict[str, Artifact], tmp_path: Path) -> None:
    """An artefact that only rlhf can read is a dead end; ids and logits must be those that the stages see."""
    artifact, text = artifacts["sft"], "Write one sentence"
    words = [artifact.manifest.base_model, str(artifact.path), text, str(tmp_path / "out.json")]
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, *words], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads((tmp_path / "out.json").read_text())
    prompt = encode_prompt(load_tokenizer(str(artifact.path)), [{"role": "user", "content": text}])
    assert theirs["ids"] == prompt
    with torch.no_grad():
        ours = load_policy(artifact, FP32, COMPUTE)(torch.tensor([prompt])).logits[0]
        untrained = AutoModelForCausalLM.from_pretrained(artifact.manifest.base_model)(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(ours, torch.tensor(theirs["logits"]), atol=2e-5, rtol=0)
    assert (ours - untrained).abs().max() > 1e-2, "the adapter changes nothing: the test above would pass without it"


@torch.no_grad()
def stranger_scores(artifact: Artifact, merged: Path, rows: list[list[int]]) -> torch.Tensor:
    """Raw scores by transformers and peft alone, one row at a time; in batches the training code finds the same."""
    base = AutoModelForSequenceClassification.from_pretrained(
        merged, num_labels=1, pad_token_id=artifact.manifest.pad_token_id, dtype=torch.float32
    )
    model = PeftModel.from_pretrained(base, str(artifact.path)).eval()
    alone = torch.stack([model(torch.tensor([row])).logits[0, 0] for row in rows])
    pad = int(artifact.manifest.pad_token_id or 0)
    torch.testing.assert_close(score_tokens(model, rows, pad, batch_size=5), alone, atol=2e-5, rtol=0)
    return alone


@torch.no_grad()
def ppo_scores(artifacts: dict[str, Artifact], rows: list[list[int]], mean: float, std: float) -> torch.Tensor:
    """Scores as PPO takes them: the reward adapter on the shared base."""
    models = SharedModels(
        load_policy(artifacts["sft"], FP32, COMPUTE), lora_config(FP32, "CAUSAL_LM", dropout=0.0), COMPUTE
    )
    models.load_reward(artifacts["reward"].path, mean, std)
    scores = []
    with models.role("reward"):
        for row in rows:
            ids = torch.tensor([row])
            scores.append(models.scores(models.hidden(ids, torch.ones_like(ids, dtype=torch.bool))[:, -1])[0])
    return torch.stack(scores)


def test_reward_adapter_opens_without_this_package(
    artifacts: dict[str, Artifact], merged: Path, rows: list[list[int]]
) -> None:
    """A score head that is not saved with the adapter comes back at random, with a warning that nobody reads."""
    theirs = stranger_scores(artifacts["reward"], merged, rows)
    ours = ppo_scores(artifacts, rows, mean=0.0, std=1.0)
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)
    assert theirs.std() > 1e-2, "scores that are all alike would hide a wrong adapter"


def test_the_head_of_the_reward_model_is_trained(artifacts: dict[str, Artifact]) -> None:
    """Catches: a score head left frozen beside its adapter: such a reward model ranks by a random direction."""
    config = RewardConfig(**artifacts["reward"].manifest.config)
    base = load_policy(artifacts["sft"], FP32, COMPUTE)
    start = sequence_classifier(base, artifacts["reward"].manifest.pad_token_id, seed=config.seed).score.weight.detach()
    saved = load_file(artifacts["reward"].path / ADAPTER_FILE)["base_model.model.score.weight"]
    assert saved.shape == start.shape
    assert float((saved - start).norm()) > 0.01 * float(start.norm())


def test_demonstrations_score_zero_on_average(
    artifacts: dict[str, Artifact], merged: Path, rows: list[list[int]]
) -> None:
    """InstructGPT's convention: 0 is a demonstration. A mean over other rows, a variance for a std, or no normalisation
    at all shift the reward against the KL penalty. Training computes in bf16 where the CPU has it, hence the tolerance,
    in standard deviations of the scores."""
    manifest = artifacts["reward"].manifest
    raw = stranger_scores(artifacts["reward"], merged, rows)
    normalised = (raw - manifest.reward_mean) / manifest.reward_std
    assert len(rows) == 24  # all of them: the stage takes up to 256
    assert abs(float(normalised.mean())) < 0.05
    assert abs(float(normalised.std()) - 1) < 0.05
    shared = ppo_scores(artifacts, rows, float(manifest.reward_mean), float(manifest.reward_std))
    torch.testing.assert_close(shared, normalised, atol=1e-3, rtol=0)


def test_own_responses_of_the_policy_can_score_zero_instead(
    finished: tuple[Path, Path], toy_config: Path, tmp_path: Path, call: Callable[..., Any]
) -> None:
    """Catches: responses of the base model or of the reward model's own trunk, and a mean that is not the stored one."""
    registry = tmp_path / "registry"
    shutil.copytree(finished[0], registry)
    words = ["--config", toy_config / "reward.yaml", "--registry", registry, "--output_dir", tmp_path, "--name", "own"]
    done = call("rlhf.stages.reward", *words, "--normalize_on", "policy", "--response_length", 6, "--dtype", "float32")
    assert done.code == 0, done.err[-3000:]
    policy, reward = Registry(registry).get("sft/toy"), Registry(registry).get("reward/own")
    config = RewardConfig(**reward.manifest.config)
    models = SharedModels(load_policy(policy, FP32, COMPUTE), lora_config(FP32, "CAUSAL_LM", dropout=0.0), COMPUTE)
    with models.role("reference"):
        tokenizer, comparisons = load_tokenizer(str(policy.path)), cast(Any, None)  # which are not looked at
        prompts = normalizing_data(config)
        rows = normalizing_rows(config, models.causal, tokenizer, comparisons, prompts, 256).rows
    assert len(rows) == 256 and len({tuple(row) for row in rows}) > 50
    pad = int(
        cast(Any, tokenizer.pad_token_id)
    )  # an untrained model draws it, too, and a classifier takes it for padding
    rows = [row[: max(i for i, token in enumerate(row) if token != pad) + 1] for row in rows]
    mean, std = float(reward.manifest.reward_mean), float(reward.manifest.reward_std)
    scores = ppo_scores({"sft": policy, "reward": reward}, rows, mean, std)
    assert abs(float(scores.mean())) < 1e-3 and abs(float(scores.std()) - 1) < 1e-3


def test_ppo_adapter_opens_without_this_package(
    artifacts: dict[str, Artifact], merged: Path, rows: list[list[int]]
) -> None:
    """Saved under the name 'policy', peft would look for keys that are not there and start from an untrained adapter.
    Saved from the wrong role, it would be the value model."""
    base = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    ids = torch.tensor([rows[0]])
    with torch.no_grad():
        sft_logits = base(ids).logits
        theirs = PeftModel.from_pretrained(base, str(artifacts["ppo"].path)).eval()(ids).logits
    config = artifacts["ppo"].manifest.config
    models = SharedModels(load_policy(artifacts["sft"], FP32, COMPUTE), lora_config(
        PPOConfig(**config), "CAUSAL_LM", dropout=0.0), COMPUTE)  # fmt: skip
    last = max((Path(config["output_dir"]) / "ppo" / "checkpoints").glob("checkpoint-*"))
    models.load_reward(artifacts["reward"].path, 0.0, 1.0)
    from safetensors.torch import load_file

    trained = load_file(last / "weights.safetensors")
    with torch.no_grad():
        for name, parameter in models.trainable("policy").items():
            parameter.copy_(trained[name])
        with models.role("policy"):
            hidden = models.hidden(ids, torch.ones_like(ids, dtype=torch.bool))
            ours = models.logits(hidden)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert (theirs - sft_logits).abs().max() > 1e-3, "two PPO updates changed nothing"


# What SFT learns from


def test_labels_cover_the_answers_only(artifacts: dict[str, Artifact], toy_data: Path) -> None:
    """Loss on prompts teaches the model to ask; loss without the stop token teaches it never to end."""
    tokenizer = load_tokenizer(str(artifacts["sft"].path))
    loaded = load_rows(toy_data, "train", kind="demonstrations")
    tokenised, dropped = sft.tokenize(loaded, tokenizer, 256)
    assert not any(dropped.values()) and len(tokenised) == len(loaded.rows) == 24
    for row, source in zip(tokenised, loaded.rows, strict=True):
        kept = [label for label in row["labels"] if label != -100]
        answer = source["completion"][0]["content"]
        assert tokenizer.decode(kept) == answer + "<|im_end|>"
        assert tokenizer.decode(row["input_ids"]) == (
            f"<|im_start|>user\n{source['prompt'][0]['content']}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"
        )
        assert [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100] == kept
        border = len(row["labels"]) - len(kept)
        assert all(label == -100 for label in row["labels"][:border])


# Logs


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("stage", STAGES)
def test_wandb_run_is_kept_offline(finished: tuple[Path, Path], artifacts: dict[str, Artifact], stage: str) -> None:
    """Without a key W&B must still leave a run that `wandb sync` can send, under the id in the manifest."""
    (folder,) = (finished[1] / stage / "wandb").glob("offline-run-*")
    assert folder.name.endswith(str(artifacts[stage].manifest.wandb_run_id))
    assert (folder / f"run-{artifacts[stage].manifest.wandb_run_id}.wandb").stat().st_size > 0


@pytest.mark.parametrize(
    "stage, names, last",
    [
        ("sft", {"sft/loss", "sft/token_accuracy", "sft/eval_loss", "sft/lr", "sft/grad_norm"}, 4),
        ("reward", {"reward/loss", "reward/accuracy", "reward/margin", "reward/eval_accuracy"}, 4),
        ("ppo", {*(m.name for m in of_stage("ppo") if "gold" not in m.name), "episodes"}, 2),
    ],
)
def test_metrics_have_house_names_and_steps_that_grow(
    finished: tuple[Path, Path], stage: str, names: set[str], last: int
) -> None:
    """A metric renamed by a library upgrade vanishes from every chart; a step that falls back is dropped by W&B."""
    rows = lines(finished[1] / stage / "metrics.jsonl")
    assert names <= {name for row in rows for name in row}
    if stage == "ppo":
        assert {name for row in rows for name in row} == names | {"step", "time"}, (
            "each logged figure is described in METRICS"
        )
    steps = [row["step"] for row in rows]
    assert steps == sorted(steps) and set(range(1, last + 1)) <= set(steps) and max(steps) == last
    assert all(math.isfinite(v) for row in rows for v in row.values())


def test_first_rollout_is_the_reference(finished: tuple[Path, Path]) -> None:
    """A fresh policy adapter that is not zero, or a reference that is not the SFT model, gives a KL at step 1."""
    first = next(row for row in lines(finished[1] / "ppo" / "metrics.jsonl") if "objective/kl" in row)
    assert first["objective/kl"] == 0 and first["objective/kl_k3"] == 0
    assert first["episodes"] == 8


def test_samples_are_appended(finished: tuple[Path, Path]) -> None:
    """A file that is opened anew at each step holds the last rollout only."""
    rows = lines(finished[1] / "ppo" / "samples.jsonl")
    assert [row["step"] for row in rows] == [1] * 8 + [2] * 8
    assert all(row["prompt"] and {"response", "score", "kl"} <= row.keys() for row in rows)
    assert not any("<|" in row["response"] for row in rows)


def test_comparison_has_both_answers(finished: tuple[Path, Path], toy_data: Path) -> None:
    """The report shows SFT beside PPO on held-out prompts; training prompts there would flatter the policy."""
    (row,) = lines(finished[1] / "ppo" / "comparison.jsonl")
    held_out = load_rows(toy_data, "validation", kind="prompts").rows
    assert row["prompt"] == held_out[0]["prompt"][-1]["content"]
    assert row.keys() == {"prompt", "sft_response", "ppo_response", "sft_score", "ppo_score"}
    assert row["sft_response"] and row["ppo_response"]
    assert math.isfinite(row["sft_score"]) and math.isfinite(row["ppo_score"])


def test_reward_config_round_trips_from_the_manifest(artifacts: dict[str, Artifact]) -> None:
    """The resolved config saved beside the weights has to rebuild the run: a key that was renamed in between would show."""
    assert SFTConfig(**artifacts["sft"].manifest.config).name == "toy"
    assert RewardConfig(**artifacts["reward"].manifest.config).policy == "sft/toy@1"
