"""What an artefact reached: in `rlhf registry list`, and at the end of a stage with the commands that come next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from registry.test_registry import FIELDS, chain, publish
from toys import Call

from rlhf.config import PPOConfig, PretrainConfig, RewardConfig, SFTConfig, build
from rlhf.registry import Artifact, Registry
from rlhf.registry.outcome import deciding_figure, outcome
from rlhf.stages.next_steps import next_commands, print_next, print_outcome

METRICS: dict[str, dict[str, Any]] = {
    "pretrain": {"eval_bits_per_character": 1.7812, "eval_perplexity": 40.26},
    "sft": {"eval_loss_before": 4.5033, "eval_loss_after": 3.6636},
    "reward": {"accuracy": 0.93844, "human_ceiling": 0.98656, "accuracy_held_out_raters": None},
    "ppo": {"score_before": -0.168, "score_after": 1.25, "kl": 5.562, "gold_positive_before": None},
}
DECIDING = {
    "pretrain": "held-out bits a character 1.781",
    "sft": "held-out loss 4.503 -> 3.664",
    "reward": "accuracy 93.8%, ceiling 98.7%",
    "ppo": "score -0.17 -> 1.25, KL 5.56",
}
STAGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "pretrain": (PretrainConfig, {}),
    "sft": (SFTConfig, {"model_name_or_path": "m"}),
    "reward": (RewardConfig, {"policy": "sft/demo"}),
    "ppo": (PPOConfig, {"policy": "sft/demo", "reward": "reward/demo"}),
}


@pytest.mark.parametrize("stage", DECIDING)
def test_the_figure_that_decides(stage: str) -> None:
    """The list of artefacts had dates, and no word about which version is the good one."""
    assert deciding_figure(stage, METRICS[stage]) == DECIDING[stage]
    assert deciding_figure(stage, {}) == "" and outcome(stage, {}) == []


def test_figures_that_are_not_there() -> None:
    """A reward model of raw pairs has no raters, so no ceiling; a damaged manifest may have texts for numbers."""
    assert deciding_figure("reward", {"accuracy": 0.5}) == "accuracy 50.0%"
    assert deciding_figure("sft", {"eval_loss_after": 2.0}) == "held-out loss 2.000"
    assert outcome("sft", {"eval_loss_after": "2.0"}) == [] and outcome("other", {"loss": 1.0}) == []


def test_registry_list_has_the_figures(tmp_path: Path, call: Any) -> None:
    """Catches: a column without the figure, a broken version without its reason."""
    registry = Registry(tmp_path / "registry")
    publish(registry, "sft", metrics=METRICS["sft"])
    broken = publish(registry, "sft")
    (broken.path / "manifest.json").write_text("{")
    shown: Call = call("rlhf.sharing.__main__", "list", "--registry", registry.root)
    lines = {line.split()[0]: line for line in shown.out.splitlines()}
    assert DECIDING["sft"] in lines["sft/demo@1"] and "BROKEN: " in lines["sft/demo@2"]


def test_the_end_of_a_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A stage ended with `registered`, and its figures were in a file."""
    artifact = publish(Registry(tmp_path), "sft", metrics=METRICS["sft"])
    print_outcome(artifact)
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].split() == ["sft/demo@1", "┃", "before", "┃", "after"]
    assert "held-out loss, nats a token │  4.503 │ 3.664" in shown
    print_next(artifact, config_of("sft"), ["--config", "demo/sft.yaml"])
    assert capsys.readouterr().out == "next:\n  rlhf reward --config demo/reward.yaml --policy sft/demo@1\n"
    print_next(None, config_of("sft"), [])
    assert capsys.readouterr().out == ""


def config_of(stage: str, **options: Any) -> Any:
    kind, inputs = STAGES[stage]
    return build(kind, {"name": "demo", "dataset": "my data", **inputs, **options}, stage)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    registry = Registry(tmp_path_factory.mktemp("registry"))
    sft, reward, ppo = chain(registry)
    return {
        "pretrain": publish(registry, "pretrain", config=FIELDS["config"]),
        "sft": sft,
        "reward": reward,
        "ppo": ppo,
    }


def test_next_commands_without_a_file(artifacts: dict[str, Artifact]) -> None:
    """Catches: a name, folder or registry of this run that the next command would not have."""
    words = ["--name", "demo", "--dataset=my data", "--registry", "r", "--learning_rate", "1", "--output-dir", "o"]
    config = {stage: config_of(stage, registry="r", output_dir="o") for stage in STAGES}
    place = ["--name", "demo", "--dataset", "my data", "--registry", "r", "--output_dir", "o"]
    commands = {stage: next_commands(artifacts[stage], config[stage], words) for stage in STAGES}
    without_data = ["--name", "demo", "--registry", "r", "--output_dir", "o"]
    assert commands["pretrain"] == [["rlhf", "sft", *without_data, "--model_name_or_path", "pretrain/demo@1"]]
    assert commands["sft"] == [["rlhf", "reward", *place, "--policy", "sft/demo@1"]]
    assert commands["reward"] == [
        ["rlhf", "ppo", *place, "--policy", "sft/demo@1", "--reward", "reward/demo@1"],
        ["rlhf", "card", "--model", "reward/demo@1", "--dataset", "my data", "--registry", "r"],
    ]
    assert commands["ppo"] == [
        ["rlhf", "chat", "--compare", "sft/demo@1", "ppo/demo@1", "--registry", "r"],
        ["rlhf", "evaluate", "--models", "sft/demo@1", "ppo/demo@1", "--dataset", "my data", "--registry", "r"],
        ["rlhf", "report", "o"],
    ]


def test_next_commands_of_a_pipeline(artifacts: dict[str, Artifact]) -> None:
    """Bug: a pipeline, whose stages have no command line, ended with a traceback."""
    chat, evaluate, report = next_commands(artifacts["ppo"], config_of("ppo", output_dir="o"), [])
    assert chat == ["rlhf", "chat", "--compare", "sft/demo@1", "ppo/demo@1"] and report == ["rlhf", "report", "o"]
    assert evaluate[-2:] == ["--dataset", "my data"]


def test_next_commands_beside_a_file(artifacts: dict[str, Artifact], tmp_path: Path) -> None:
    """Catches: a file of the next stage that is not there, or one that is there and not used."""
    (tmp_path / "reward.yaml").write_text("")
    file = tmp_path / "sft.yaml"
    (command,) = next_commands(artifacts["sft"], config_of("sft"), ["--config", str(file)])
    assert command == ["rlhf", "reward", "--config", str(tmp_path / "reward.yaml"), "--policy", "sft/demo@1"]
    first, _ = next_commands(artifacts["reward"], config_of("reward"), ["--config", str(file), "--device", "cpu"])
    assert first == ["rlhf", "ppo", "--device", "cpu", "--policy", "sft/demo@1", "--reward", "reward/demo@1"]
