"""The reward stage: its options reach the training, what it registers is what was trained, and bad data is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_models import VOCAB, sequences
from toys import Call, build_model
from transformers import AutoModelForSequenceClassification

from rlhf.base.errors import UserError
from rlhf.config import PPOConfig, RewardConfig, parse_config
from rlhf.data_prep.load import load_rows
from rlhf.models.base import load_policy
from rlhf.models.compute import Compute
from rlhf.models.packing import pack_rows
from rlhf.models.reward_model import sequence_classifier
from rlhf.models.separate import SeparateModels
from rlhf.ppo import forward
from rlhf.registry import Artifact, Registry
from rlhf.reward import parity
from rlhf.reward.ranking import Objective, RankingTrainer
from rlhf.reward.scorer import open_scorer
from rlhf.stages import ppo as ppo_stage
from rlhf.stages import reward as reward_stage

FULL = ("--finetuning", "full", "--name", "full", "--learning_rate", "1e-3", "--dtype", "float32")


@pytest.fixture
def stage(
    finished: tuple[Path, Path], toy_config: Path, tmp_path: Path, call: Callable[..., Call]
) -> Callable[..., Call]:
    """Runs the reward stage on the toy policy, in a registry of the test's own: `tmp_path / "registry"`."""
    shutil.copytree(finished[0] / "sft", tmp_path / "registry" / "sft")
    places = ["--registry", tmp_path / "registry", "--output_dir", tmp_path / "out", "--wandb_mode", "disabled"]
    return lambda *words: call("rlhf.stages.reward", "--config", toy_config / "reward.yaml", *places, *words)


@pytest.fixture(scope="module")
def full(finished: tuple[Path, Path], toy_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with a reward model all of whose weights were trained: reward/full."""
    registry = tmp_path_factory.mktemp("full") / "registry"
    shutil.copytree(finished[0], registry)
    places = ["--registry", registry, "--output_dir", registry.parent / "out", "--wandb_mode", "disabled"]
    words = ["--config", toy_config / "reward.yaml", *places, *FULL]
    reward_stage.run(parse_config(RewardConfig, [str(word) for word in words]))
    return registry


# Options


def test_options_reach_the_trainer(stage: Callable[..., Call], monkeypatch: pytest.MonkeyPatch) -> None:
    """An option that is accepted and not passed on; another length or course of training than the documented default."""
    seen: dict[str, Any] = {}

    def spy(self: RankingTrainer, *args: Any, **kwargs: Any) -> None:
        seen.update(kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(RankingTrainer, "__init__", spy)
    asked = {
        "min_rating_difference": 0.5,
        "margin_per_rating": 0.2,
        "label_smoothing": 0.1,
        "center_rewards_coefficient": 0.01,
    }
    stage("--max_steps", -1, *(word for name, value in asked.items() for word in (f"--{name}", value)))
    assert seen["objective"] == Objective(
        min_difference=0.5, margin_per_rating=0.2, label_smoothing=0.1, center_rewards_coefficient=0.01
    )
    assert not seen["data_collator"].weight_by_agreement
    assert seen["args"].num_train_epochs == 1 and seen["args"].optim == "adamw_bnb_8bit"
    assert seen["args"].lr_scheduler_type == "cosine_with_min_lr" and seen["args"].lr_scheduler_kwargs == {
        "min_lr_rate": 0.1
    }


@pytest.mark.parametrize(
    "words, told",
    [
        (["--label_smoothing", "0.5"], "label_smoothing"),
        (["--margin_per_rating", "-1"], "margin_per_rating"),
        (["--min_responses", "1"], "min_responses"),
        (["--card_probe_answers", "0"], "card_probe_answers"),
        (["--finetuning", "full", "--quantization", "4bit"], "finetuning lora"),
        (["--weight_by_agreement", "true"], "rater_ratings"),
    ],
)
def test_impossible_options(stage: Callable[..., Call], words: list[str], told: str) -> None:
    """Labels smoothed to a coin, weights that nobody gave, full fine-tuning of 4-bit numbers: all train on nonsense."""
    assert told in stage(*words).complaint


def test_agreement_of_raters_changes_the_training(stage: Callable[..., Call], toy_data: Path, tmp_path: Path) -> None:
    """Weights that are read and then not used: the weights of the model have to come out different."""
    folder = tmp_path / "data"
    shutil.copytree(toy_data, folder)
    for split in ("train", "validation"):
        file = folder / "comparisons" / f"{split}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            row["rater_ratings"] = [[rating + 3, rating - 3] for rating in row["ratings"]]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained = []
    for name, weigh in (("plain", "false"), ("weighed", "true")):
        words = ("--dataset", folder, "--name", name, "--weight_by_agreement", weigh, "--optim", "adamw_torch")
        done = stage(
            *words, "--max_grad_norm", 1e9, "--adam_epsilon", 1.0
        )  # so that a smaller gradient is a smaller step
        assert done.code == 0, done.err[-3000:]
        trained.append(
            (Registry(tmp_path / "registry").get(f"reward/{name}").path / "adapter_model.safetensors").read_bytes()
        )
    assert trained[0] != trained[1]


def test_a_4bit_base_is_trained_saved_and_scored(stage: Callable[..., Call], tmp_path: Path) -> None:
    """QLoRA whose saved adapter sits on other weights than the trained one: parity, zero and unit are of the 4-bit model."""
    done = stage("--quantization", "4bit", "--dtype", "float32", "--attn_implementation", "sdpa")
    assert done.code == 0, done.err[-3000:]
    manifest = Registry(tmp_path / "registry").get("reward/toy").manifest
    assert manifest.kind == "adapter" and manifest.config["quantization"] == "4bit"
    assert manifest.metrics["reload_difference"] < 1e-3 and manifest.reward_std > 0


# Full fine-tuning


def test_a_whole_reward_model_opens_without_this_package(full: Path, finished: tuple[Path, Path]) -> None:
    """An adapter saved under the name of a model, a head at random, or weights that stayed those of the policy."""
    artifact = Registry(full).get("reward/full")
    assert artifact.manifest.kind == "full"
    theirs = AutoModelForSequenceClassification.from_pretrained(artifact.path, dtype=torch.float32).eval()
    rows = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14]]
    with torch.no_grad():
        alone = torch.stack([theirs(torch.tensor([row])).logits[0, 0] for row in rows])
    scorer = open_scorer(artifact, Registry(full), config("reward"), compute(), 4)
    torch.testing.assert_close(scorer.raw(rows), alone, atol=2e-5, rtol=0)
    normalised = (alone - artifact.manifest.reward_mean) / artifact.manifest.reward_std
    torch.testing.assert_close(scorer(rows), normalised, atol=1e-4, rtol=0)
    start = sequence_classifier(build_base(finished), artifact.manifest.pad_token_id, seed=0).state_dict()
    moved = [name for name, weight in theirs.state_dict().items() if not torch.equal(weight, start[name])]
    assert len(moved) > 0.9 * len(start)


@pytest.mark.parametrize("finetuning", ["lora", "full"])
def test_ppo_takes_a_whole_reward_model(
    full: Path, toy_config: Path, tmp_path: Path, call: Callable[..., Call], finetuning: str
) -> None:
    """PPO that reads a whole reward model as an adapter, or scores with the policy's own trunk."""
    registry = tmp_path / "registry"
    shutil.copytree(full, registry)
    done = call(
        "rlhf.stages.ppo",
        *("--config", toy_config / "ppo.yaml", "--registry", registry, "--output_dir", tmp_path / "out"),
        *("--reward", "reward/full", "--finetuning", finetuning, "--name", "onfull", "--wandb_mode", "disabled"),
    )
    assert done.code == 0, done.err[-3000:]
    sample = json.loads((tmp_path / "out" / "ppo" / "samples.jsonl").read_text().splitlines()[0])
    assert torch.isfinite(torch.tensor(sample["score"]))


def test_ppo_scores_are_those_of_the_saved_model(full: Path) -> None:
    """Scores by another head, another trunk, twice or never normalised, or read at the padding."""
    registry = Registry(full)
    policy, reward = registry.get("sft/toy"), registry.get("reward/full")
    batch = sequences()
    rows = [ids[mask].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
    expected = open_scorer(reward, registry, config("reward"), compute(), 2)(rows)
    for finetuning in ("lora", "full"):
        options = config("ppo", finetuning=finetuning, registry=str(full))
        assert isinstance(options, PPOConfig)
        models, total = ppo_stage.build_models(options, compute(), policy, [reward])
        responses: Any = type("R", (), {"sequences": batch, "batches": [torch.arange(3)], "texts": ["", "", ""]})
        scores, parts = total(responses)
        torch.testing.assert_close(scores.float(), expected, atol=1e-4, rtol=0)
        assert set(parts) == {"full"}
        if finetuning == "full":  # values start as the normalised score there, and at 0 beside an adapter
            with models.role("value"):
                hidden = models.hidden(torch.tensor([rows[0]]), torch.ones(1, len(rows[0]), dtype=torch.bool))
                torch.testing.assert_close(models.values(hidden[:, -1]).float(), expected[:1], atol=1e-4, rtol=0)
        else:
            assert float(forward.token_values(models, batch).detach().abs().max()) == 0.0


def test_whole_reward_model_of_another_shape_is_refused(tmp_path: Path) -> None:
    """A traceback of torch's, two hundred lines of layer names."""
    other = sequence_classifier(build_model("llama", VOCAB + 8), 0, seed=0)
    other.save_pretrained(tmp_path)
    base = build_model("llama", VOCAB, dtype=torch.float64)
    assert pack_rows(base)
    models = SeparateModels(base, Compute(torch.device("cpu"), torch.float64))
    with pytest.raises(UserError, match="was made for another model"):
        models.load_reward(tmp_path, 0.0, 1.0)


def config(kind: str, **options: Any) -> Any:
    made = {"name": "n", "dataset": "x", "policy": "sft/toy", "device": "cpu", "dtype": "float32", **options}
    return RewardConfig(**made) if kind == "reward" else PPOConfig(**{"reward": ["reward/full"], "lora_r": 4, **made})


def compute() -> Compute:
    return Compute(torch.device("cpu"), torch.float32)


def build_base(finished: tuple[Path, Path]) -> Any:
    return load_policy(Registry(finished[0]).get("sft/toy"), config("reward"), compute())


# What is registered is what was trained


def test_a_model_that_is_not_saved_whole_fails_the_stage(
    stage: Callable[..., Call], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The classic: the score head is left behind, training looks well, and PPO is rewarded at random. Here the head that is
    saved is another one."""
    saving = reward_stage.save_reward_model

    def spoil(model: Any, folder: Path, *, base_model: str) -> None:
        with torch.no_grad():
            model.get_base_model().score.modules_to_save["default"].weight.mul_(1.5)
        saving(model, folder, base_model=base_model)
        with torch.no_grad():
            model.get_base_model().score.modules_to_save["default"].weight.div_(1.5)

    monkeypatch.setattr(reward_stage, "save_reward_model", spoil)
    complaint = stage().complaint
    assert "the saved reward model is not the trained one" in complaint and "nothing was registered" in complaint
    assert not (tmp_path / "registry" / "reward").exists()
    assert not list((tmp_path / "out" / "reward").glob("tmp*")), "what was saved for the comparison is cleaned up"


def test_64_held_out_texts_are_compared(
    stage: Callable[..., Call], toy_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A comparison of one text, or of training texts."""
    seen: list[Any] = []
    checking = parity.require_parity
    monkeypatch.setattr(reward_stage, "require_parity", lambda *given: seen.append(given) or checking(*given))
    assert stage("--dtype", "float32").code == 0
    trained, _, rows = seen[0]
    held_out = load_rows(toy_data, "validation", kind="comparisons").rows["responses"]
    assert parity.PARITY_TEXTS == 64 and len(rows) == len(trained) == sum(map(len, held_out)) < 64
    assert len(set(map(tuple, rows))) > 10


def test_registered_folder_holds_its_card(finished: tuple[Path, Path]) -> None:
    """A card that is lost with the run's folder, or that is not the one whose figures the manifest holds."""
    artifact: Artifact = Registry(finished[0]).get("reward/toy")
    card = json.loads((artifact.path / "card.json").read_text())
    assert card == json.loads((finished[1] / "reward" / "card.json").read_text())
    metrics = artifact.manifest.metrics
    assert metrics["accuracy"] == card["accuracy"]["value"] and metrics["verdict"] == card["verdict"]
    assert 0 <= metrics["reload_difference"] < 0.05


# Data


def test_rows_that_are_left_out_are_in_manifest_and_card(
    stage: Callable[..., Call], toy_data: Path, tmp_path: Path
) -> None:
    """A row that is dropped in silence: the counts of loading and of tokenising both have to be there, with the rows."""
    folder = tmp_path / "data"
    shutil.copytree(toy_data, folder)
    file = folder / "comparisons" / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    kept = len(rows)
    long = {**rows[0], "prompt": [{"role": "user", "content": "good " * 400}]}
    rows += [{**rows[0], "responses": rows[0]["responses"][:1], "ratings": [1.0], "ratings_held_out": [1.0]}, long]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert stage("--dataset", folder).code == 0
    artifact = Registry(tmp_path / "registry").get("reward/toy")
    data = artifact.manifest.data
    reasons = {"fewer than two responses": 1, "prompt of 256 tokens or more": 1}  # the model's context, not max_length
    assert data["rows"]["train"] == kept and data["dropped"] == {"train": reasons}
    assert data["dropped_rows"] == {
        "train": {"fewer than two responses": [kept + 1], "prompt of 256 tokens or more": [kept + 2]}
    }
    left_out = json.loads((artifact.path / "card.json").read_text())["left_out"]["train"]
    assert left_out["fewer than two responses"] == {"count": 1, "rows": [kept + 1]}
    assert left_out["prompt of 256 tokens or more"] == {"count": 1, "rows": [kept + 2]}


# Zero


@pytest.fixture
def data(toy_data: Path, tmp_path: Path) -> Path:
    """A copy of the data, to be spoilt."""
    shutil.copytree(toy_data, tmp_path / "data")
    return tmp_path / "data"


def test_demonstrations_that_set_the_zero(
    stage: Callable[..., Call], data: Path, tmp_path: Path, toy_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A demonstration beyond the context, which is scored after the training and fails it there; and other demonstrations,
    that is another zero, under the recipe of the old ones."""
    file = data / "demonstrations" / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    long = {**rows[0], "completion": [{"role": "assistant", "content": "good " * 400}]}
    file.write_text("".join(json.dumps(row) + "\n" for row in [long, *rows]))
    done = stage("--dataset", data)
    assert done.code == 0, done.err[-3000:]
    assert f"{len(rows)} demonstrations score 0 on average; 1 of more than 256 tokens are left out" in done.out
    artifact = Registry(tmp_path / "registry").get("reward/toy")
    note = artifact.manifest.data["normalization"]
    assert (note["kind"], note["responses"]) == ("demonstrations", len(rows))
    assert note["dropped"] == {"prompt and response of more than 256 tokens": 1}

    words = ["--config", toy_config / "reward.yaml", "--registry", tmp_path / "registry", "--dataset", data]
    options = parse_config(RewardConfig, [str(word) for word in [*words, "--output_dir", tmp_path / "out"]])
    again = reward_stage.run(options, reuse=True)
    assert again is not None and again.hash == artifact.hash
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def trained_anew(*_: Any) -> Any:
        raise InterruptedError

    monkeypatch.setattr(reward_stage, "open_run", trained_anew)
    with pytest.raises(InterruptedError):
        reward_stage.run(options, reuse=True)


def test_only_where_there_are_no_demonstrations_comparisons_set_the_zero(
    stage: Callable[..., Call], data: Path, tmp_path: Path
) -> None:
    """A slip in the demonstrations, after which the zero is another one and nobody is told."""
    file = data / "demonstrations" / "train.jsonl"
    for spoilt in ('{"prompt": "p", "completion": 3}\n', '{"promt": "p", "completion": "c"}\n', ""):
        file.write_text(spoilt)
        assert "demonstrations/train.jsonl" in stage("--dataset", data).complaint
    shutil.rmtree(file.parent)
    done = stage("--dataset", data)
    assert done.code == 0, done.err[-3000:]
    assert "best responses of the comparisons (there are no demonstrations) score 0 on average" in done.out
    note = Registry(tmp_path / "registry").get("reward/toy").manifest.data["normalization"]
    assert note["kind"].startswith("best responses") and note["fingerprint"] is None


@pytest.mark.parametrize("words", [["--response_length", 300], ["--normalize_on", "policy", "--response_length", 300]])
def test_samples_without_room_are_told_before_the_training(
    stage: Callable[..., Call], tmp_path: Path, words: list[object]
) -> None:
    """Answers beyond the context: a traceback, or scores of texts that the model was never meant for."""
    assert "response_length=300" in stage(*words).complaint
    assert not (tmp_path / "out" / "reward" / "metrics.jsonl").exists()
