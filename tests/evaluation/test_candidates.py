"""What may be compared, what is offered instead of what is not there, and which prompts a model has seen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from registry.test_registry import FIELDS
from safetensors.torch import save_file

from rlhf.base.errors import UserError
from rlhf.config import EvaluationConfig
from rlhf.data_prep.load import load_rows
from rlhf.data_prep.overlap import TrainingPrompts
from rlhf.evaluation.candidates import Comparison, gather
from rlhf.registry import Artifact, Registry, recipe_hash


def publish(registry: Registry, stage: str, name: str, parents: Sequence[Artifact] = (), **fields: Any) -> Artifact:
    config = {"dataset": "none", "reward": ["reward/a"], "ptx_coef": 0.0, **fields.pop("config", {})}

    def write(folder: Path) -> None:
        save_file({"a": torch.tensor([*f"{stage}{name}".encode()])}, folder / "adapter_model.safetensors")

    return registry.publish(stage, name, write, parents=parents, **{**FIELDS, **fields, "config": config})


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """sft/a; reward/a and reward/b on it; ppo/one and ppo/two against reward/a; ppo/other against reward/b."""
    made = Registry(tmp_path / "registry")
    sft = publish(made, "sft", "a")
    rewards = [publish(made, "reward", name, [sft]) for name in "ab"]
    for name, reward in (("one", rewards[0]), ("two", rewards[0]), ("other", rewards[1])):
        publish(made, "ppo", name, [sft, reward])
    return made


def compared(registry: Registry, *models: str, **options: Any) -> Comparison:
    return gather(EvaluationConfig(models=list(models), dataset="p", registry=str(registry.root), **options), registry)


def test_reference_baseline_and_reward_come_from_the_policies(registry: Registry) -> None:
    """KL to the base model, or a proxy that the policies were not trained on."""
    found = compared(registry, "ppo/one", "ppo/two@1")
    assert [model.name for model in found.models] == ["sft/a@1", "ppo/one@1", "ppo/two@1"]
    assert (found.reference.reference, found.baseline, found.reward) == ("sft/a@1", "sft/a@1", "reward/a@1")
    assert found.models[0].folder is None and found.models[1].sft == found.reference and found.marks == []
    named = compared(registry, "ppo/one", baseline="ppo/two", reward="judged:toy_gold")
    assert (named.baseline, named.reward) == ("ppo/two@1", "judged:toy_gold")
    assert named.marks == ["ppo/one@1 was trained on reward/a@1; the proxy here is judged:toy_gold"]
    assert [model.name for model in named.models] == ["sft/a@1", "ppo/two@1", "ppo/one@1"]


def test_policies_of_different_rewards_are_compared_by_force_only(registry: Registry) -> None:
    """A table in which a policy looks worse because it was judged by somebody else's reward."""
    with pytest.raises(UserError, match=r"ppo/one@1 and ppo/other@1 have different reward models.*--force true"):
        compared(registry, "ppo/one", "ppo/other")
    forced = compared(registry, "ppo/one", "ppo/other", force=True)
    assert forced.marks == [
        "ppo/other@1 was trained on reward/b@1; the proxy here is reward/a@1",
        "compared by force: ppo/one@1 and ppo/other@1 have different reward models",
    ]


def test_policies_of_different_prompts_are_compared_by_force_only(registry: Registry) -> None:
    sft, reward = registry.read("sft/a"), registry.read("reward/a")
    publish(registry, "ppo", "elsewhere", [sft, reward], data={"fingerprint": "other"})
    with pytest.raises(UserError, match="have different training prompts"):
        compared(registry, "ppo/one", "ppo/elsewhere")
    functions = {"reward": ["reward/a", "judged:toy_gold"]}
    publish(registry, "ppo", "summed", [sft, reward], config=functions)
    with pytest.raises(UserError, match="have different reward models"):
        compared(registry, "ppo/one", "ppo/summed")
    (mark,) = compared(registry, "ppo/summed").marks
    assert mark == "ppo/summed@1 was trained on reward/a@1 + judged:toy_gold; the proxy here is reward/a@1"


def test_policies_of_another_sft_policy(registry: Registry) -> None:
    """KL to one of them says nothing of the other; models of another tokenizer have no KL at all, force or not."""
    second = publish(registry, "sft", "b", recipe="r2")
    reward = publish(registry, "reward", "c", [second])
    publish(registry, "ppo", "b", [second, reward])
    with pytest.raises(UserError, match="have different SFT policies and reward models"):
        compared(registry, "ppo/one", "ppo/b")
    forced = compared(registry, "ppo/one", "ppo/b", force=True)
    assert forced.models[2].sft is not None and forced.models[2].sft.reference == "sft/b@1"
    publish(registry, "sft", "foreign", tokenizer_hash="other")
    with pytest.raises(UserError, match="different tokenizers"):
        compared(registry, "ppo/one", "sft/foreign", force=True)


def test_what_is_not_there_is_refused_with_the_nearest(registry: Registry) -> None:
    with pytest.raises(UserError, match="did you mean 'ppo/one'"):
        compared(registry, "ppo/onne")
    publish(registry, "pretrain", "a")
    with pytest.raises(UserError, match="--reference sft/NAME"):
        compared(registry, "pretrain/a", reward="reward/a")
    with pytest.raises(UserError, match="reward/a@1 is no policy"):
        compared(registry, "reward/a")
    with pytest.raises(UserError, match="name one to use: --reward"):
        compared(registry, "sft/a")
    assert compared(registry, "sft/a", reward="reward/a").reward == "reward/a@1"


# Runs


def make_run(registry: Registry, folder: Path, reward: str = "reward/a", updates: Sequence[int] = (2, 10)) -> Path:
    """What PPO leaves in its output folder."""
    checkpoints = folder / "ppo" / "checkpoints"
    checkpoints.mkdir(parents=True)
    hashes = {"sft": registry.read("sft/a").hash, "reward": registry.read(reward).hash}
    made_of = {"other_rewards": [], "dataset": FIELDS["data"]["fingerprint"], **hashes}
    (checkpoints / "made_of.json").write_text(json.dumps(made_of))
    for update in updates:
        (checkpoints / f"snapshot-{update}").mkdir()
        (checkpoints / f"snapshot-{update}" / "adapter_model.safetensors").write_bytes(str(update).encode())
    return folder


def test_snapshots_of_a_run_in_the_order_of_updates(registry: Registry, tmp_path: Path) -> None:
    """Sorted by name, update 10 comes before 2; and the ppo folder itself is as good as the one above it."""
    run = make_run(registry, tmp_path / "outputs" / "mine")
    found = compared(registry, "sft/a", runs=[str(run)])
    assert [(s.name, s.run, s.update) for s in found.snapshots] == [("mine:2", "mine", 2), ("mine:10", "mine", 10)]
    assert found.reward == "reward/a@1" and found.snapshots[0].hash != found.snapshots[1].hash
    again = compared(registry, "sft/a", runs=[str(run / "ppo")])
    assert [s.name for s in again.snapshots] == ["mine:2", "mine:10"]


def test_a_broken_run_does_not_cost_the_rest(registry: Registry, tmp_path: Path) -> None:
    """A traceback over a half-written file, or a run that is left out without a word."""
    good = make_run(registry, tmp_path / "good")
    half, empty, foreign = tmp_path / "half", tmp_path / "empty", make_run(registry, tmp_path / "foreign")
    (make_run(registry, half) / "ppo" / "checkpoints" / "made_of.json").write_text('{"sft": "ab')
    make_run(registry, empty, updates=())
    made_of = foreign / "ppo" / "checkpoints" / "made_of.json"
    made_of.write_text(made_of.read_text().replace(registry.read("sft/a").hash, "0" * 64))
    found = compared(registry, "ppo/one", runs=[str(p) for p in (half, good, empty, foreign)])
    assert {s.run for s in found.snapshots} == {"good"}
    assert len(found.marks) == 3
    for mark, told in zip(
        found.marks, ("half-written", "--snapshot_steps", "holds no artefact with the hash"), strict=True
    ):
        assert "left out" in mark and told in mark


def test_runs_that_cannot_be_meant(registry: Registry, tmp_path: Path) -> None:
    run = make_run(registry, tmp_path / "mine")
    with pytest.raises(UserError, match=r"no run folder .*did you mean '.*mine'"):
        compared(registry, "ppo/one", runs=[str(tmp_path / "mime")])
    with pytest.raises(UserError, match="two runs are called mine"):
        compared(registry, "ppo/one", runs=[str(run), str(make_run(registry, tmp_path / "other" / "mine"))])
    other = make_run(registry, tmp_path / "rewarded", reward="reward/b")
    with pytest.raises(UserError, match="ppo/one@1 and rewarded have different reward models"):
        compared(registry, "ppo/one", runs=[str(other)])


# Overlap


def write_prompts(folder: Path, kind: str, split: str, prompts: Sequence[str]) -> None:
    (folder / kind).mkdir(parents=True, exist_ok=True)
    completion = {"completion": "x"} if kind == "demonstrations" else {}
    lines = [json.dumps({"prompt": prompt, **completion}) + "\n" for prompt in prompts]
    (folder / kind / f"{split}.jsonl").write_text("".join(lines))


def fingerprint(folder: Path, kind: Any) -> str:
    sets = {split: load_rows(folder, split, kind=kind).fingerprint for split in ("train", "validation")}
    return recipe_hash(sets, [], None)


def test_prompts_that_a_model_or_its_parents_trained_on_are_counted(tmp_path: Path) -> None:
    """A policy that is judged on what its SFT stage learned by heart; prompts that a stage only evaluated on do not count."""
    registry, folder = Registry(tmp_path / "registry"), tmp_path / "data"
    write_prompts(folder, "demonstrations", "train", ["one", "two", "three"])
    write_prompts(folder, "demonstrations", "validation", ["four"])
    write_prompts(folder, "prompts", "train", ["two", "five"])
    write_prompts(folder, "prompts", "validation", ["six"])
    config = {"dataset": str(folder)}
    sft = publish(registry, "sft", "a", config=config, data={"fingerprint": fingerprint(folder, "demonstrations")})
    gone = publish(registry, "reward", "a", [sft], config={"dataset": str(tmp_path / "none")})
    data = {"fingerprint": fingerprint(folder, "prompts")}
    ppo = publish(registry, "ppo", "a", [sft, gone], config=config, data=data)
    judged = [[{"role": "user", "content": text}] for text in ("one", "two", "four", "six")]
    assert TrainingPrompts(registry).overlap(ppo, judged) == {"ppo/a@1": 1, "sft/a@1": 2, "reward/a@1": None}
    # A message with its keys in another order is the same message.
    assert TrainingPrompts(registry).overlap(sft, [[{"content": "one", "role": "user"}]]) == {"sft/a@1": 1}
    write_prompts(folder, "prompts", "train", ["two", "five", "six"])
    assert TrainingPrompts(registry).overlap(ppo, judged)["ppo/a@1"] is None, "not the data that it was trained on"
